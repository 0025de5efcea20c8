"""Streams in floating point: no bits are kept, and the inverse is right within a tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from revwire._streams.base import Stepped, Streams, Undone, add_scaled, scaled, stream_dtype
from revwire._streams.samples import FOLD, Fingerprint, Sample, folds, spread
from revwire.couplings.base import Rule


@dataclass(frozen=True)
class FloatStreams(Streams):
    """Streams in floating point: inverted up to rounding, and checked.

    Args:
        tolerance: of a rebuilt state, relative to its size. Where branches compute in 16 bits, a hundred times that: an
            error in the last bit of their input makes them round the other way.
        branch_tolerance: of what a branch computes from it, relative to its size (the mean over a sample); in 16 bits,
            five times that.
        rebuilds: whether steps are undone; not so where values are not finite, which have no inverse.
    """

    tolerance: float = 1e-4
    branch_tolerance: float = 1e-2
    rebuilds: bool = True

    def enter(self, x: Tensor) -> Tensor:
        return x.detach()

    def read(self, state: Tensor) -> Tensor:
        return state.detach()

    def step(
        self,
        previous: Tensor,
        x: Tensor,
        f: Tensor,
        rule: Rule,
        *,
        undone: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Stepped:
        c = rule.c
        if isinstance(c, float) and rule.a == 0 and rule.b == 1 and f.dtype == previous.dtype:
            out = torch.add(previous, f, alpha=c, out=torch.empty_like(previous))
        else:
            out = scaled(f, c, previous)
            add_scaled(out, x, rule.a)
            add_scaled(out, previous, rule.back)
        return Stepped(out, out.detach(), None)

    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Rule, bits: Tensor | None) -> Undone:
        out = torch.sub(following, scaled(f, rule.c, following), out=torch.empty_like(following))
        add_scaled(out, x, -rule.a)
        return Undone(out if rule.signs is None and rule.b == 1 else out.div_(rule.back))

    def summary(self, state: Tensor) -> Tensor:
        """Means of its parts, and samples, which show a small error everywhere."""
        means = folds(state).mean(1) if state.numel() else state.view(-1)
        return torch.cat([means, spread(state, FOLD)])

    def sample(self, f: Tensor, saved: Sequence[Tensor]) -> Sample:
        with torch.no_grad():
            return Sample(spread(f, FOLD).to(stream_dtype(f.dtype), copy=True), f.dtype)

    def difference(self, before: Fingerprint, after: Fingerprint) -> Tensor:
        if not before.branch.numel():
            return before.state.new_zeros(2)
        deltas = torch.stack(
            [torch.dist(before.state, after.state, float("inf")), torch.dist(before.branch, after.branch, 1)]
        )
        sizes = torch.stack(
            [torch.linalg.vector_norm(before.state, float("inf")), torch.linalg.vector_norm(before.branch, 1)]
        )
        return deltas.div_(sizes.add_(torch.finfo(sizes.dtype).tiny))

    def allowed(self, before: Fingerprint) -> tuple[float, float]:
        narrow = before.dtype in (torch.bfloat16, torch.float16)
        return (100 * self.tolerance, 5 * self.branch_tolerance) if narrow else (self.tolerance, self.branch_tolerance)

    def hopeless(self, before: Fingerprint, after: Fingerprint) -> bool:
        return not any(bool(part.isfinite().all()) for part in (before.state, after.state)) or not any(
            bool(part.isfinite().all()) for part in (before.branch, after.branch)
        )
