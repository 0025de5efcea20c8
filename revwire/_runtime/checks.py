"""What a backward pass rebuilds, against what the forward had.

Note [What the checks see]
    In exact mode: any change of the rebuilt state, and of samples of the branch's result and of what its last layers
    saved. In float mode: changes beyond the tolerances of `FloatStreams`; a branch whose result is zero in forward and
    recompute hides what else it computes. Version counters see every in-place write that PyTorch sees, in both modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from revwire._runtime.chain import Chain
from revwire._runtime.entries import UnitRecord
from revwire._runtime.faults import fault
from revwire._runtime.range import RangeCheck
from revwire._runtime.recompute import Again
from revwire._runtime.unit import Unit
from revwire._streams.base import Streams
from revwire._streams.samples import Fingerprint, same_bits_of, same_glances


class _Pending(NamedTuple):
    """What is to be compared: nothing else of a unit's record stays alive for it."""

    unit: Unit
    before: Fingerprint
    after: Fingerprint


class _Stopped(NamedTuple):
    """The same of a recompute that stopped early: glances at what it saved."""

    unit: Unit
    before: Sequence[Tensor]
    after: Sequence[Tensor]


class Checks:
    """The comparisons of one backward pass; where they are ``deferred``, they are read at its end.

    A forward that its ``range`` found spoiled has nothing to be compared with: its gradients are NaN.
    """

    def __init__(self, chain: Chain, streams: Streams, *, deferred: bool, range: RangeCheck | None = None) -> None:
        self.chain, self.streams, self.deferred, self.range = chain, streams, deferred, range
        self.pending: list[_Pending | _Stopped] = []

    def compare(self, record: UnitRecord, previous: Tensor, again: Again, summary: Tensor | None = None) -> None:
        """Compare the rebuilt state x_{k-1} (with its summary, if known), and a recompute, with the forward.

        Raises:
            ReconstructionError: they differ.
        """
        before = record.fingerprint
        assert before is not None
        if self.range is not None and self.range.spoiled:
            return
        if again.f is None and self.deferred and record.stop:
            self.pending.append(_Stopped(record.unit, record.stop.looks, again.looks))
        if again.f is None and not record.by_result:
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

    def numbers(self) -> Tensor | None:
        """Whether any of the deferred comparisons is not equal to the bit; in float streams, whose states come back
        with other bits, all that `Streams.difference` tells.
        """
        if not self.pending:
            return None
        if self.streams.witnesses:
            pairs = [pair for one in self.pending for pair in _pairs(one)]
            same = same_bits_of([a for a, _ in pairs], [b for _, b in pairs])
            return (~same).view(1).to(torch.float32)
        return torch.cat(self.differences())

    def judge(self, values: list[float] | None) -> None:
        """Hear what `numbers` were.

        Raises:
            ReconstructionError: a comparison failed.
        """
        pending = self.pending
        spoiled = self.range is not None and self.range.spoiled
        if values is None or spoiled or (self.streams.witnesses and not values[0]):
            self.pending = []
            return
        if self.streams.witnesses:
            values = torch.cat(self.differences()).tolist()
        self.pending = []
        for one in pending:
            if isinstance(one, _Stopped):
                self._judge_glances(one)
            else:
                self._judge(one, values[:2])
                values = values[2:]

    def differences(self) -> list[Tensor]:
        found = [self.streams.difference(p.before, p.after) for p in self.pending if isinstance(p, _Pending)]
        return found or [torch.zeros(0)]

    def _judge_glances(self, stopped: _Stopped) -> None:
        if not same_glances(stopped.before, stopped.after):
            self.chain.run_whole.add(stopped.unit.path)
            got = "its branch computed other values (in a recompute that stopped early; the next one does not)"
            raise fault(stopped.unit, self.chain, got, "the same as in the forward pass")

    def _judge(self, pending: _Pending, values: list[float]) -> None:
        unit, before, after = pending
        self.chain.drifted(values[0])
        whats = ("its rebuilt input differs", "its branch computed other values")
        for what, value, allowed in zip(whats, values, self.streams.allowed(before), strict=True):
            if not value <= allowed and not self.streams.hopeless(before, after):
                got = f"{what} (by {value:.3g}; {allowed:.3g} is allowed)"
                raise fault(unit, self.chain, got, "the same as in the forward pass")


def _pairs(one: _Pending | _Stopped) -> Iterable[tuple[Tensor, Tensor]]:
    """The tensors of both evaluations."""
    if isinstance(one, _Stopped):
        return zip(one.before, one.after, strict=True)
    return (one.before.state, one.after.state), (one.before.branch, one.after.branch)
