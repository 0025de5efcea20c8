"""How the two streams of a chain are held: as floats, or as fixed-point integers with kept bits. Arithmetic only.

Fixed point, for a unit with coefficients (a, b, c), |b| = 2^-m, and streams X = round(x·2^K):

    R       = round(2^K·(a·x_k + c·f)),   x_k = X_k·2^-K
    X_{k+1} = R ± (X_{k-1} >> m),         the m low bits of X_{k-1} are kept, packed
    X_{k-1} = (±(X_{k+1} − R) << m) | bits

Both directions compute R from the same X_k and the same f, so the inverse is exact to the bit.
Source: the fixed-point form of BDIA (arXiv 2407.09093), written for any |b| = 2^-m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import floor, isfinite, log2

import torch
from torch import Tensor

from revwire._couplings import Coefficients, Coupling
from revwire._errors import RangeError

HEADROOM_BITS = 5
"""The streams may grow to 2^5 times the range they were scaled for before `RangeError`."""

_FOLD = 64
"""A state is folded into this many sums before they are combined into one checksum."""


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The float dtype in which streams of this dtype are held: never narrower than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def canonical(x: Tensor) -> Tensor:
    """``x`` in a layout that `torch.empty_like` reproduces: itself if dense, else a contiguous copy.

    A branch may compute other bits on another memory layout, so a rebuilt state must lie as the first one did.
    """
    return x if torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()


def pack_bits(low: Tensor, bits: int) -> Tensor:
    """The ``bits`` low bits of every element of an integer tensor, packed: uint8, ``bits`` bytes per 8 elements.

    Eight elements lie in one 64-bit word, a byte each; three merges (pairs, quads, all) squeeze the gaps out.
    """
    lanes = _flat(low).to(torch.uint8).bitwise_and_((1 << bits) - 1)
    lanes = torch.nn.functional.pad(lanes, (0, -lanes.numel() % 8)).view(torch.int64)
    for width, gap in ((16, 8 - bits), (32, 16 - 2 * bits), (64, 32 - 4 * bits)):
        low = _lane_mask(width, bits * width // 16)
        lanes = (lanes & low) | ((lanes & (low << width // 2)) >> gap)
    return lanes.view(torch.uint8).view(-1, 8)[:, :bits].contiguous()


def unpack_bits(packed: Tensor, bits: int, like: Tensor) -> Tensor:
    """The inverse of `pack_bits`: an integer tensor of the shape, layout and dtype of ``like``."""
    lanes = torch.nn.functional.pad(packed, (0, 8 - bits)).view(torch.int64).view(-1)
    for width, gap in ((64, 32 - 4 * bits), (32, 16 - 2 * bits), (16, 8 - bits)):
        low = _lane_mask(width, bits * width // 16)
        lanes = (lanes & low) | ((lanes & ~low) << gap)
    out = torch.empty_like(like)
    _flat(out).copy_(lanes.view(torch.uint8)[: like.numel()])
    return out


def _lane_mask(width: int, keep: int) -> int:
    """A 64-bit mask that keeps the ``keep`` low bits of each ``width``-bit lane (as a signed integer)."""
    mask = sum(((1 << keep) - 1) << at for at in range(0, 64, width))
    return mask - (1 << 64) if mask >> 63 else mask


def _flat(x: Tensor) -> Tensor:
    """A dense tensor as one dimension, in storage order, without a copy."""
    return x.as_strided((x.numel(),), (1,))


class Streams(ABC):
    """Arithmetic of one chain's two streams during one forward pass; states are detached tensors."""

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """The state of a float tensor ``x`` (dense, in the stream dtype)."""

    @abstractmethod
    def read(self, state: Tensor) -> Tensor:
        """The float value of a state, in the stream dtype and the layout of the state."""

    @abstractmethod
    def step(self, previous: Tensor, current: Tensor, x: Tensor, f: Tensor, rule: Coefficients) -> tuple[Tensor, Tensor | None]:
        """(state of x_{k+1}, kept bits or None); ``x`` is ``read(current)``."""

    @abstractmethod
    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Coefficients, bits: Tensor | None) -> Tensor:
        """The state of x_{k-1}; ``x`` is the float value of x_k."""

    @abstractmethod
    def fingerprint(self, state: Tensor) -> Tensor:
        """A few numbers that tell this state from another."""

    @abstractmethod
    def differ(self, before: Tensor, after: Tensor) -> float | None:
        """None if two fingerprints agree, else the measured difference."""

    def check_range(self, state: Tensor) -> str | None:
        """None, or why this state cannot be trusted."""
        return None


@dataclass(frozen=True)
class FloatStreams(Streams):
    """Streams in floating point: inverted up to rounding, and checked against ``tolerance`` (relative)."""

    tolerance: float = 1e-4
    exact: bool = False

    def enter(self, x: Tensor) -> Tensor:
        return x.detach()

    def read(self, state: Tensor) -> Tensor:
        return state.detach()

    def step(self, previous: Tensor, current: Tensor, x: Tensor, f: Tensor, rule: Coefficients) -> tuple[Tensor, Tensor | None]:
        out = torch.mul(f, rule.c, out=torch.empty_like(previous)) if f.dtype == previous.dtype else _scaled(f, rule.c, previous)
        if rule.a:
            out.add_(x, alpha=rule.a)
        return out.add_(previous, alpha=rule.b), None

    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Coefficients, bits: Tensor | None) -> Tensor:
        out = torch.sub(following, f, alpha=rule.c, out=torch.empty_like(following))
        if rule.a:
            out.sub_(x, alpha=rule.a)
        return out if rule.b == 1 else out.div_(rule.b)

    def fingerprint(self, state: Tensor) -> Tensor:
        """Rows: a sample of the elements (they show a small error everywhere), sums, sums of magnitudes."""
        flat = _flat(state)
        sample = flat[:: -(-flat.numel() // _FOLD)]
        sample = torch.nn.functional.pad(sample, (0, _FOLD - sample.numel()))
        return torch.stack([sample, _fold(flat, flat.dtype), _fold(flat.abs(), flat.dtype)])

    def differ(self, before: Tensor, after: Tensor) -> float | None:
        if not before.isfinite().all() and not after.isfinite().all():
            return None  # NaN in, NaN out, as without revwire
        delta, size = (after - before).abs().amax(1), before.abs().amax(1)
        floor = torch.finfo(before.dtype).tiny
        error = max(float(delta[0] / (size[0] + floor)), float(delta[1] / (size[2] + floor)))
        return None if error <= self.tolerance else error


@dataclass(frozen=True)
class FixedStreams(Streams):
    """Streams as integers round(x·2^scale): int32 for float32 streams, int64 for float64.

    Args:
        scale: K, the number of fractional bits.
        integer: ``torch.int32`` or ``torch.int64``.
        bits: m, the bits kept per element and unit.
    """

    scale: int
    integer: torch.dtype
    bits: int
    exact: bool = True

    @classmethod
    def for_range(cls, largest: float, dtype: torch.dtype, coupling: Coupling) -> FixedStreams:
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
        return cls(scale, integer, coupling.kept_bits)

    @property
    def limit(self) -> int:
        """The largest magnitude a state may have: a sum of two such values still fits the integer."""
        return (1 << 62 if self.integer == torch.int64 else 1 << 30) - 1

    def enter(self, x: Tensor) -> Tensor:
        return _rounded(torch.mul(x.detach(), 2.0**self.scale), self.integer)

    def read(self, state: Tensor) -> Tensor:
        wide = torch.float64 if self.integer == torch.int64 else torch.float32
        return state.to(wide).mul_(2.0**-self.scale)

    def step(self, previous: Tensor, current: Tensor, x: Tensor, f: Tensor, rule: Coefficients) -> tuple[Tensor, Tensor | None]:
        out = self._increment(previous, x, f, rule)
        carried = previous >> self.bits if self.bits else previous
        out.add_(carried, alpha=1 if rule.b > 0 else -1)
        return out, pack_bits(previous, self.bits) if self.bits else None

    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Coefficients, bits: Tensor | None) -> Tensor:
        increment = self._increment(following, x, f, rule)
        out = torch.sub(following, increment, out=increment) if rule.b > 0 else increment.sub_(following)
        if bits is None:
            return out
        return out.bitwise_left_shift_(self.bits).bitwise_or_(unpack_bits(bits, self.bits, out))

    def _increment(self, like: Tensor, x: Tensor, f: Tensor, rule: Coefficients) -> Tensor:
        """R = round(2^K·(a·x + c·f)), an integer tensor in the layout of ``like``."""
        wide = _scaled(f, rule.c * 2.0**self.scale, x)
        if rule.a:
            wide.add_(x, alpha=rule.a * 2.0**self.scale)
        return _rounded(wide, self.integer)

    def fingerprint(self, state: Tensor) -> Tensor:
        sums = _fold(_flat(state), self.integer).to(torch.int64)
        return (sums * _weights(sums)).sum()

    def differ(self, before: Tensor, after: Tensor) -> float | None:
        return None if torch.equal(before, after) else float((after - before).abs())

    def check_range(self, state: Tensor) -> str | None:
        low, high = (int(v) for v in torch.aminmax(state))
        if -self.limit <= low and high <= self.limit:
            return None
        return f"magnitude beyond {self.limit * 2.0**-self.scale:.4g}"


def _scaled(f: Tensor, factor: float, like: Tensor) -> Tensor:
    """``factor``·f in the dtype and layout of ``like`` (a float tensor)."""
    out = torch.empty_like(like)
    return torch.mul(f, factor, out=out) if f.dtype == out.dtype else out.copy_(f).mul_(factor)


def _rounded(wide: Tensor, integer: torch.dtype) -> Tensor:
    """Round a float tensor (which is overwritten) to integers; what is not finite becomes out of range."""
    wide.round_()
    if wide.device.type != "cpu":  # where a conversion saturates, NaN would become 0
        wide.nan_to_num_(nan=float("inf"))
    return wide.to(integer)


def _fold(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """`_FOLD` partial sums of a one-dimensional tensor; integers wrap, so their order does not matter."""
    whole = flat.numel() // _FOLD * _FOLD
    sums = flat[:whole].view(_FOLD, -1).sum(1, dtype=dtype)
    if whole < flat.numel():
        sums[0] += flat[whole:].sum(dtype=dtype)
    return sums


def _weights(sums: Tensor) -> Tensor:
    """Odd multipliers that tell the positions of partial sums apart."""
    return torch.arange(1, 2 * sums.numel(), 2, device=sums.device) * 0x9E3779B1
