"""What a backward pass rebuilds, against what the forward had.

Note [What the checks see]
    In exact mode: any change of the rebuilt state, and of samples of the branch's result and of what its last layers
    saved. In float mode: changes beyond the tolerances of `FloatStreams`; a branch whose result is zero in forward and
    recompute hides what else it computes. Version counters see every in-place write that PyTorch sees, in both modes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from revwire._runtime.chain import Chain
from revwire._runtime.entries import UnitRecord
from revwire._runtime.faults import fault
from revwire._runtime.recompute import Again
from revwire._runtime.unit import Unit
from revwire._streams.base import Streams
from revwire._streams.samples import Fingerprint, same_bits


class _Pending(NamedTuple):
    """What is to be compared: nothing else of a unit's record stays alive for it."""

    unit: Unit
    before: Fingerprint
    after: Fingerprint


class Checks:
    """The comparisons of one backward pass; where they are ``deferred``, they are read at its end.

    A ``spoiled`` forward has nothing to be compared with: its gradients are NaN.
    """

    def __init__(self, chain: Chain, streams: Streams, *, deferred: bool, spoiled: bool = False) -> None:
        self.chain, self.streams, self.deferred, self.spoiled = chain, streams, deferred, spoiled
        self.pending: list[_Pending] = []

    def compare(self, record: UnitRecord, previous: Tensor, again: Again, summary: Tensor | None = None) -> None:
        """Compare the rebuilt state x_{k-1} (with its summary, if known), and a recompute, with the forward.

        Raises:
            ReconstructionError: they differ.
        """
        before = record.fingerprint
        assert before is not None
        if self.spoiled or (again.f is None and not record.by_result):  # then it was compared
            return
        if record.stop and not record.by_result:
            summary = before.state
        branch = before[1:] if again.f is None else self.streams.sample(again.f, again.witnesses)
        after = Fingerprint(self.streams.summary(previous) if summary is None else summary, *branch)
        pending = _Pending(record.unit, before, after)
        if self.deferred:
            self.pending.append(pending)
        elif not before.same_bits(after):
            self._judge(pending, self.streams.difference(before, after).tolist())

    def settle(self) -> None:
        """Read the deferred comparisons: one synchronisation, or one more where not all is equal to the bit.

        Raises:
            ReconstructionError: one of them failed.
        """
        pending, self.pending = self.pending, []
        if not pending:
            return
        exact = bool(self.streams.witnesses)  # floats come back with other bits
        before = [t for p in pending for t in (p.before.state, p.before.branch)]
        after = [t for p in pending for t in (p.after.state, p.after.branch)]
        if exact and same_bits(before, after):
            return
        read = torch.stack([self.streams.difference(p.before, p.after) for p in pending]).tolist()
        for one, values in zip(pending, read, strict=True):
            self._judge(one, values)

    def _judge(self, pending: _Pending, values: list[float]) -> None:
        unit, before, after = pending
        self.chain.drifted(values[0])
        whats = ("its rebuilt input differs", "its branch computed other values")
        for what, value, allowed in zip(whats, values, self.streams.allowed(before), strict=True):
            if not value <= allowed and not self.streams.hopeless(before, after):
                got = f"{what} (by {value:.3g}; {allowed:.3g} is allowed)"
                raise fault(unit, self.chain, got, "the same as in the forward pass")
