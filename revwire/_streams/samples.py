"""Few numbers that tell tensors apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revwire._torch import no_torch_dispatch

FOLD = 64
"""A state is folded into this many sums, and a branch's result sampled at this many elements."""


def folds(x: Tensor) -> Tensor:
    """A dense tensor as `FOLD` rows that together cover every element; neighbours overlap where it does not divide."""
    step = x.numel() // FOLD
    return x.as_strided((FOLD, x.numel() - (FOLD - 1) * step), (step, 1))


def spread(x: Tensor, count: int) -> Tensor:
    """``count`` elements of the storage behind ``x``, at equal distances (fewer if it has fewer)."""
    extent = x.numel() if x.is_contiguous() else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    count = min(count, extent, x.numel())
    return x.as_strided((count,), (max(extent // max(count, 1), 1),))


_LOOKED_AT = 4096
"""Elements of a state at which `usual_magnitude` looks."""


def usual_magnitude(x: Tensor) -> float:
    """The magnitude that three of four elements of a float tensor stay below, zeros left out; 0 where there are no
    others, and for tensors that may have no memory of their own. A few channels do not move it, however large they are.
    It waits for the device.

    A tensor of more than `_LOOKED_AT` elements is looked at in places a golden section apart, which fall into step with
    no dimension of it.
    """
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
        return 0.0
    found = x.detach().reshape(-1)
    if found.numel() > _LOOKED_AT:
        found = found[_places_apart(found.numel(), found.device)]
    found = found.abs().float()
    found = found[found > 0]
    return _quartile(found) if found.numel() else 0.0


@lru_cache(maxsize=64)
def _places_apart(numel: int, device: torch.device) -> Tensor:
    """Numbers of `_LOOKED_AT` elements, a golden section apart."""
    with torch.inference_mode(False):
        places = torch.arange(_LOOKED_AT, dtype=torch.float64).mul_((5**0.5 - 1) / 2).frac_().mul_(numel)
        return places.to(device, torch.int64)


def _quartile(x: Tensor) -> float:
    """The same as ``x.quantile(0.75)``, which sorts all there is."""
    rank = 0.75 * (x.numel() - 1)
    upper = x.topk(x.numel() - int(rank)).values
    return float(upper[-1].lerp(upper[-2 if rank % 1 else -1], rank % 1))


def can_be_sampled(x: Tensor) -> bool:
    """Whether a saved tensor has elements, with the same values whenever it is computed again (scratch space has
    not).
    """
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and x.layout == torch.strided


_COMPARED = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.bool,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
    )
)


def is_random_state(t: Tensor) -> bool:
    """Whether a saved tensor may be what flash attention keeps of its generator: no operator takes such an index."""
    return t.dtype is torch.uint64 and t.numel() < 3


def glance(t: Tensor) -> Tensor | None:
    """At most `FOLD` of its own elements of a tensor that a branch saves; None where it cannot be compared.

    Bytes may be scratch space of a kernel, and so may one or two integers (an offset of a generator that was not used).
    """
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.dtype not in _COMPARED:
        return None
    if not t.is_floating_point() and t.dtype != torch.bool and t.numel() < 3:
        return None
    with no_torch_dispatch():  # no mode needs to see it, and the call of one takes longer
        return torch.take(t.detach(), _places(t.numel(), t.device)) if t.numel() else t.detach().new_empty(0)


def size_of_glance(numel: int, dtype: torch.dtype) -> int:
    """Bytes of a `glance` at a tensor of so many elements."""
    return min(numel, FOLD) * dtype.itemsize


@lru_cache(maxsize=256)
def _places(numel: int, device: torch.device) -> Tensor:
    """Numbers of elements at equal distances."""
    count = min(numel, FOLD)
    with torch.inference_mode(False):
        return torch.arange(count, device=device) * (numel // count)


def same_glances(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether two runs of a branch saved the same, as far as was looked; this waits for the device."""
    if len(before) != len(after):
        return False
    return same_bits(before, after) or all(_same(a, b) for a, b in zip(before, after, strict=True))


def same_bits(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether rows of numbers are equal to the bit, all of them; this waits for the device, once."""
    return bool(same_bits_of(before, after)) if before else True


def same_bits_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor:
    """`same_bits` of at least one row, on its device: nothing waits."""
    if any(a.dtype != b.dtype or a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return torch.zeros((), dtype=torch.bool, device=before[0].device)
    one, other = (torch.cat([t.view(torch.uint8) for t in rows]) for rows in (before, after))
    return (one == other).all()


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are equal, and what is none is none in both."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    return alike and (torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


class Sample(NamedTuple):
    """A few numbers that tell one evaluation of a branch from another."""

    values: Tensor
    dtype: torch.dtype  # of the branch's result


class Fingerprint(NamedTuple):
    """A few numbers that tell the state x_{k-1}, and one evaluation of F_k, from another."""

    state: Tensor
    branch: Tensor
    dtype: torch.dtype  # of the branch's result

    def same_bits(self, other: Fingerprint) -> bool:
        """Whether both are equal to the bit; this waits for the device."""
        return torch.equal(self.state, other.state) and torch.equal(self.branch, other.branch)


def alike(part: Tensor, whole: Tensor) -> bool:
    """Whether they are equal, up to the rounding of matrix products of another size."""
    if part.shape != whole.shape or part.dtype != whole.dtype:
        return False
    if part.is_complex():
        part, whole = torch.view_as_real(part), torch.view_as_real(whole)
    if not part.is_floating_point():
        return torch.equal(part, whole)
    finite = whole[whole.isfinite()]
    size = float(finite.abs().amax()) if finite.numel() else 0.0
    allowed = size * {torch.float64: 1e-7, torch.float32: 1e-4}.get(part.dtype, 2e-2) + 1e-30
    return torch.allclose(part, whole, rtol=0, atol=allowed, equal_nan=True)
