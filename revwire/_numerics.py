"""How the two streams of a chain are held: as floats, or as fixed-point integers with kept bits. Arithmetic only.

Fixed point, for a unit with coefficients (a, b, c), |b| = 2^-m, and streams X = round(x·2^K):

    R       = round(2^K·(a·x_k + c·f)),   x_k = X_k·2^-K
    Y       = X_{k-1} + h,  h = 2^(m-1)   (0 for m = 0), so that the shift below rounds to the nearest
    X_{k+1} = R ± (Y >> m),               the m low bits of Y are kept, packed
    X_{k-1} = ((±(X_{k+1} − R) << m) | bits) − h

Both directions compute R from the same X_k and the same f, so the inverse is exact to the bit.
Source: the fixed-point form of BDIA (arXiv 2407.09093), written for any |b| = 2^-m.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor, isfinite, log2
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from revwire import _kernels
from revwire._bits import pack_bits, unpack_bits
from revwire._couplings import Rule
from revwire._couplings.base import Factor
from revwire._errors import RangeError

HEADROOM_BITS = 5
"""The streams may grow to 2^5 times the range they were scaled for before `RangeError`."""

_FOLD = 64
"""A state is folded into this many sums, and a branch's result sampled at this many elements."""

_FEWER = 16
"""A tensor that a branch saved is sampled at this many."""

_SATURATES = platform.machine().lower() not in ("x86_64", "amd64", "i686")
"""Whether float-to-integer conversion on this CPU turns NaN into 0 instead of an integer out of range."""


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The float dtype in which streams of this dtype are held: never narrower than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def canonical(x: Tensor) -> Tensor:
    """``x`` in a layout that `torch.empty_like` reproduces: itself if dense, else a contiguous copy.

    A branch may compute other bits on another memory layout, so a rebuilt state must lie as the first one did.
    """
    return x if torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()


def _folds(x: Tensor) -> Tensor:
    """A dense tensor as `_FOLD` rows that together cover every element; neighbours overlap where it does not divide."""
    step = x.numel() // _FOLD
    return x.as_strided((_FOLD, x.numel() - (_FOLD - 1) * step), (step, 1))


def _spread(x: Tensor, count: int) -> Tensor:
    """``count`` elements of the storage behind ``x``, at equal distances (fewer if it has fewer)."""
    extent = x.numel() if x.is_contiguous() else 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    count = min(count, extent, x.numel())
    return x.as_strided((count,), (max(extent // max(count, 1), 1),))


def can_be_sampled(x: Tensor) -> bool:
    """Whether a saved tensor has elements, with the same values whenever it is computed again (scratch space has not)."""
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point() and x.layout == torch.strided


_COMPARED = frozenset(
    (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64)
)


def glance(t: Tensor) -> Tensor | None:
    """At most `_FOLD` of its own elements of a tensor that a branch saves; None where it cannot be compared.

    Bytes may be scratch space of a kernel, and so may one or two integers (an offset of a generator that was not used).
    """
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.dtype not in _COMPARED:
        return None
    if not t.is_floating_point() and t.dtype != torch.bool and t.numel() < 3:
        return None
    with torch._C._DisableTorchDispatch():  # no mode needs to see it, and the call of one takes longer
        return torch.take(t.detach(), _places(t.numel(), t.device)) if t.numel() else t.detach().new_empty(0)


def size_of_glance(numel: int, dtype: torch.dtype) -> int:
    """Bytes of a `glance` at a tensor of so many elements."""
    return min(numel, _FOLD) * dtype.itemsize


@lru_cache(maxsize=256)
def _places(numel: int, device: torch.device) -> Tensor:
    """Numbers of elements at equal distances."""
    count = min(numel, _FOLD)
    with torch.inference_mode(False):
        return torch.arange(count, device=device) * (numel // count)


def same_glances(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether two runs of a branch saved the same, as far as was looked; this waits for the device."""
    return len(before) == len(after) and all(_same(a, b) for a, b in zip(before, after, strict=True))


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


class Stepped(NamedTuple):
    """The state of x_{k+1}, its float value, the bits that are kept to come back.

    Besides, where they are known: the `Streams.summary` of the state of x_{k-1}, and that all values are in range.
    """

    state: Tensor
    value: Tensor
    bits: Tensor | None
    summary: Tensor | None = None
    in_range: bool = False


class Undone(NamedTuple):
    """The state of x_{k-1}, and its `Streams.summary` where that is known."""

    state: Tensor
    summary: Tensor | None = None


class Streams(ABC):
    """Arithmetic of one chain's two streams during one forward pass; states are detached tensors."""

    witnesses: ClassVar[int] = 0
    """How many of the tensors that a branch saved last `sample` wants to see."""

    @property
    def bound(self) -> float | None:
        """The magnitude below which every value must stay, if there is one."""
        return None

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """The state of a float tensor ``x`` (dense, in the stream dtype)."""

    @abstractmethod
    def read(self, state: Tensor) -> Tensor:
        """The float value of a state, in the stream dtype and the layout of the state."""

    @abstractmethod
    def step(self, previous: Tensor, x: Tensor, f: Tensor, rule: Rule, *, undone: bool = True) -> Stepped:
        """x_{k+1} from the state of x_{k-1}; ``x`` is the float value of x_k. A step that is never ``undone`` keeps no bits."""

    @abstractmethod
    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Rule, bits: Tensor | None) -> Undone:
        """The state of x_{k-1} from that of x_{k+1}; ``x`` is the float value of x_k."""

    @abstractmethod
    def summary(self, state: Tensor) -> Tensor:
        """A few numbers, on its device, that tell a state from another."""

    @abstractmethod
    def sample(self, f: Tensor, saved: Sequence[Tensor]) -> Sample:
        """Elements of a branch's result, and of `witnesses` of the tensors it saved for its gradient."""

    def fingerprint(self, state: Tensor, f: Tensor, saved: Sequence[Tensor]) -> Fingerprint:
        """The fingerprint of a state, a branch's result, and `witnesses` of the tensors it saved for its gradient."""
        return Fingerprint(self.summary(state), *self.sample(f, saved))

    @abstractmethod
    def difference(self, before: Fingerprint, after: Fingerprint) -> Tensor:
        """Two numbers, on their device: how far the states, and the branches, differ."""

    @abstractmethod
    def allowed(self, before: Fingerprint) -> tuple[float, float]:
        """The largest `difference` (of the state, of the branch) that is no fault."""

    def hopeless(self, before: Fingerprint, after: Fingerprint) -> bool:
        """Whether both hold values that are not finite, so that they cannot be compared (and no gradient is right)."""
        return False


@dataclass(frozen=True)
class FloatStreams(Streams):
    """Streams in floating point: inverted up to rounding, and checked.

    Args:
        tolerance: of a rebuilt state, relative to its size. Where branches compute in 16 bits, a hundred times that: an
            error in the last bit of their input makes them round the other way.
        branch_tolerance: of what a branch computes from it, relative to its size (the mean over a sample); in 16 bits,
            five times that.
    """

    tolerance: float = 1e-4
    branch_tolerance: float = 1e-2

    def enter(self, x: Tensor) -> Tensor:
        return x.detach()

    def read(self, state: Tensor) -> Tensor:
        return state.detach()

    def step(self, previous: Tensor, x: Tensor, f: Tensor, rule: Rule, *, undone: bool = True) -> Stepped:
        c = rule.c
        if isinstance(c, float) and rule.a == 0 and rule.b == 1 and f.dtype == previous.dtype:
            out = torch.add(previous, f, alpha=c, out=torch.empty_like(previous))
        else:
            out = _scaled(f, c, previous)
            _add_scaled(out, x, rule.a)
            _add_scaled(out, previous, rule.back)
        return Stepped(out, out.detach(), None)

    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Rule, bits: Tensor | None) -> Undone:
        out = torch.sub(following, _scaled(f, rule.c, following), out=torch.empty_like(following))
        _add_scaled(out, x, -rule.a)
        return Undone(out if rule.signs is None and rule.b == 1 else out.div_(rule.back))

    def summary(self, state: Tensor) -> Tensor:
        """Means of its parts, and samples, which show a small error everywhere."""
        means = _folds(state).mean(1) if state.numel() else state.view(-1)
        return torch.cat([means, _spread(state, _FOLD)])

    def sample(self, f: Tensor, saved: Sequence[Tensor]) -> Sample:
        with torch.no_grad():
            return Sample(_spread(f, _FOLD).to(stream_dtype(f.dtype), copy=True), f.dtype)

    def difference(self, before: Fingerprint, after: Fingerprint) -> Tensor:
        if not before.branch.numel():
            return before.state.new_zeros(2)
        deltas = torch.stack([torch.dist(before.state, after.state, float("inf")), torch.dist(before.branch, after.branch, 1)])
        sizes = torch.stack([torch.linalg.vector_norm(before.state, float("inf")), torch.linalg.vector_norm(before.branch, 1)])
        return deltas.div_(sizes.add_(torch.finfo(sizes.dtype).tiny))

    def allowed(self, before: Fingerprint) -> tuple[float, float]:
        narrow = before.dtype in (torch.bfloat16, torch.float16)
        return (100 * self.tolerance, 5 * self.branch_tolerance) if narrow else (self.tolerance, self.branch_tolerance)

    def hopeless(self, before: Fingerprint, after: Fingerprint) -> bool:
        return not any(bool(part.isfinite().all()) for part in (before.state, after.state)) or not any(
            bool(part.isfinite().all()) for part in (before.branch, after.branch)
        )


@dataclass(frozen=True)
class FixedStreams(Streams):
    """Streams as integers round(x·2^scale): int32 for float32 streams, int64 for float64.

    Args:
        scale: K, the number of fractional bits.
        integer: ``torch.int32`` or ``torch.int64``.
        compiled: in one pass over memory where that is possible (`_kernels`); the same for step and unstep.
    """

    scale: int
    integer: torch.dtype
    compiled: bool = False
    witnesses: ClassVar[int] = 2

    @classmethod
    def for_range(cls, largest: float, dtype: torch.dtype) -> FixedStreams:
        """Streams scaled so that values up to ``largest``·2^`HEADROOM_BITS` fit.

        Raises:
            RangeError: ``largest`` is not finite.
        """
        if not isfinite(largest):
            raise RangeError(f"got a largest magnitude of {largest}; expected finite values at the start of the chain")
        integer = torch.int64 if dtype == torch.float64 else torch.int32
        top = 57 if integer == torch.int64 else 30
        exponent = floor(log2(largest)) + 1 if largest > 0 else 0
        scale = max(-100, min(100, top - HEADROOM_BITS - exponent))
        return cls(scale, integer, compiled=integer == torch.int32 and _kernels.available())

    @property
    def bound(self) -> float:
        """Two such values can be added without leaving the integers, and so is what `_rounded` makes of NaN."""
        return float(2.0 ** ((62 if self.integer == torch.int64 else 30) - self.scale))

    def enter(self, x: Tensor) -> Tensor:
        return _rounded(torch.mul(x.detach(), 2.0**self.scale)).to(self.integer)

    def read(self, state: Tensor) -> Tensor:
        if self.compiled and _kernels.suits(state):
            return _kernels.read(state, self.scale)
        wide = torch.float64 if self.integer == torch.int64 else torch.float32
        return state.to(wide).mul_(2.0**-self.scale)

    def step(self, previous: Tensor, x: Tensor, f: Tensor, rule: Rule, *, undone: bool = True) -> Stepped:
        numbers = self._numbers(previous, x, rule)
        if numbers is not None:
            done = _kernels.advance(previous, x, f, *numbers, negative=rule.b < 0, scale=self.scale, keep=undone)
            if done.in_range:
                return Stepped(*done)
        wide = self._increment(x, f, rule)
        m, bits = _bits(rule), None
        out = wide.to(self.integer)
        if m:
            shifted = previous + _half(m)
            bits = pack_bits(shifted, m) if undone else None
            previous = shifted.bitwise_right_shift_(m)
        if rule.signs is None:
            out.add_(previous, alpha=1 if rule.b > 0 else -1)
        else:
            out.addcmul_(previous, rule.signs.to(self.integer))
        return Stepped(out, wide.copy_(out).mul_(2.0**-self.scale), bits)

    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Rule, bits: Tensor | None) -> Undone:
        numbers = self._numbers(following, x, rule)
        if numbers is not None:
            return Undone(*_kernels.retreat(following, x, f, *numbers, bits, negative=rule.b < 0, scale=self.scale))
        increment = self._increment(x, f, rule).to(self.integer)
        out = torch.sub(following, increment, out=increment) if rule.b > 0 else increment.sub_(following)
        if rule.signs is not None:
            out.mul_(rule.signs.to(self.integer))
        if bits is None:
            return Undone(out)
        m = _bits(rule)
        return Undone(out.bitwise_left_shift_(m).bitwise_or_(unpack_bits(bits, m, out)).sub_(_half(m)))

    def _numbers(self, state: Tensor, x: Tensor, rule: Rule) -> tuple[float, float, int] | None:
        """(a, c, m) where the compiled form serves: for numbers, not for one number per sample."""
        if self.compiled and rule.bits is not None and isinstance(rule.a, float) and isinstance(rule.c, float) and rule.signs is None:
            return (rule.a, rule.c, rule.bits) if _kernels.suits(state, x) else None
        return None

    def _increment(self, x: Tensor, f: Tensor, rule: Rule) -> Tensor:
        """R = round(2^K·(a·x + c·f)), a float tensor in the layout of ``x``."""
        wide = _scaled(f, rule.c * 2.0**self.scale, x)
        _add_scaled(wide, x, rule.a * 2.0**self.scale)
        return _rounded(wide)

    def summary(self, state: Tensor) -> Tensor:
        """Sums of integers: their order does not matter."""
        if self.compiled and _kernels.suits(state):
            return _kernels.summed(state)
        return _folds(state).sum(1, dtype=self.integer)

    def sample(self, f: Tensor, saved: Sequence[Tensor]) -> Sample:
        """They show a fault that the sums of states cannot.

        Where the last layer of a branch is zero, its result is zero whatever its other layers do, but the gradient of that layer is not.
        """
        values = _kernels.sampled(f, saved, _FOLD, _FEWER) if self.compiled else None
        if values is None:
            with torch.no_grad():
                wide = torch.float64 if any(t.dtype == torch.float64 for t in (f, *saved)) else torch.float32  # autocast mixes no others
                values = torch.cat([_spread(f, _FOLD).to(wide), *(_spread(t, _FEWER).to(wide) for t in saved)])
        return Sample(values, f.dtype)

    def difference(self, before: Fingerprint, after: Fingerprint) -> Tensor:
        a, b = before.branch, after.branch
        other = (a != b) & ~(a.isnan() & b.isnan())
        return torch.stack([(before.state != after.state).sum(), other.sum()])

    def allowed(self, before: Fingerprint) -> tuple[float, float]:
        return 0, 0


def _bits(rule: Rule) -> int:
    """m; the caller has seen to it that there is one (`Coupling.kept_bits`)."""
    assert rule.bits is not None
    return rule.bits


def _half(m: int) -> int:
    """Added before a shift to the right by m, so that it rounds to the nearest: rounding down would add up over the units."""
    return 1 << m - 1


def _scaled(f: Tensor, factor: Factor, like: Tensor) -> Tensor:
    """``factor``·f in the dtype and layout of ``like`` (a float tensor)."""
    out = torch.empty_like(like)
    return torch.mul(f, factor, out=out) if f.dtype == out.dtype else out.copy_(f).mul_(factor)


def _add_scaled(out: Tensor, x: Tensor, factor: Factor) -> None:
    """out += factor·x, in place."""
    if isinstance(factor, Tensor):
        out.addcmul_(x, factor)
    elif factor:
        out.add_(x, alpha=factor)


def _rounded(wide: Tensor) -> Tensor:
    """Round a float tensor, in place, so that what is not finite becomes an integer out of range when it is converted."""
    wide.round_()
    if _SATURATES or wide.device.type != "cpu":
        wide.nan_to_num_(nan=float("inf"))
    return wide
