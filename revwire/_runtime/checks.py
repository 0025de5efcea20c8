"""What a backward pass rebuilds, against what the forward had.

Note [What the checks see]
    In exact mode: any change of the rebuilt state, and of samples of the branch's result and of what its last layers
    saved. In float mode: changes beyond the tolerances of `FloatStreams`; a branch whose result is zero in forward and
    recompute hides what else it computes. Version counters see every in-place write that PyTorch sees, in both modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revwire._runtime.chain import Chain
from revwire._runtime.entries import UnitRecord
from revwire._runtime.recompute import Again
from revwire._streams.base import Streams
from revwire._streams.samples import Fingerprint


class Checks:
    """The comparisons of one backward pass; where they are ``deferred``, they are read at its end.

    A ``spoiled`` forward has nothing to be compared with: its gradients are NaN.
    """

    def __init__(self, chain: Chain, streams: Streams, *, deferred: bool, spoiled: bool = False) -> None:
        self.chain, self.streams, self.deferred, self.spoiled = chain, streams, deferred, spoiled
        self.pending: list[tuple[UnitRecord, Fingerprint, Tensor]] = []

    def compare(self, record: UnitRecord, previous: Tensor, again: Again, summary: Tensor | None = None) -> None:
        """Compare the rebuilt state x_{k-1} (with its summary, if known), and a recompute, with the forward.

        Raises:
            ReconstructionError: they differ.
        """
        assert record.fingerprint is not None
        if self.spoiled or (again.f is None and not record.by_result):  # then it was compared
            return
        if record.stop and not record.by_result:
            summary = record.fingerprint.state
        branch = record.fingerprint[1:] if again.f is None else self.streams.sample(again.f, again.witnesses)
        after = Fingerprint(self.streams.summary(previous) if summary is None else summary, *branch)
        if self.deferred:
            self.pending.append((record, after, self.streams.difference(record.fingerprint, after)))
        elif not record.fingerprint.same_bits(after):
            self._judge(record, after, self.streams.difference(record.fingerprint, after).tolist())

    def settle(self) -> None:
        """Read the deferred comparisons: one synchronisation.

        Raises:
            ReconstructionError: one of them failed.
        """
        if not self.pending:
            return
        read = torch.stack([difference for _, _, difference in self.pending]).tolist()
        for (record, after, _), values in zip(self.pending, read, strict=True):
            self._judge(record, after, values)

    def _judge(self, record: UnitRecord, after: Fingerprint, values: list[float]) -> None:
        before = record.fingerprint
        assert before is not None
        self.chain.drifted(values[0])
        whats = ("its rebuilt input differs", "its branch computed other values")
        for what, value, allowed in zip(whats, values, self.streams.allowed(before), strict=True):
            if not value <= allowed and not self.streams.hopeless(before, after):
                got = f"{what} (by {value:.3g}; {allowed:.3g} is allowed)"
                raise record.fault(self.chain, got, "the same as in the forward pass")
