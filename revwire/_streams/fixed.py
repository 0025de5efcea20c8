"""Streams in fixed point: integers, whose inverse is exact to the bit.

Note [Wide streams]
    All of a state lies on one grid, so what is small beside the largest value has fewer bits. Streams of float32 are
    therefore integers of 64 bits where 32 would leave most values (`samples.usual_magnitude`) too few: where a few
    channels are much larger than the others. Values, branches and gradients stay as they are; the two states take twice
    the bytes. In 16-bit branches the rounding of a state disappears behind theirs when it is eight times finer. In
    float32, where the largest value is 3 to 7 times the usual one, as mostly, that has 21 or 22 bits of 24 in 32-bit
    integers; these serve down to 19.
    A scale for each channel would cost no bytes, but it would have to follow each reshape, permutation and chunk, and
    be known to all kernels; and a value that is large for a few tokens would still round that channel for all.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, ldexp, log2
from typing import ClassVar

import torch
from torch import Tensor

from revwire._errors import RangeError
from revwire._streams import fused, kernels
from revwire._streams.base import VALUE_BYTES, Form, Scaled, Stepped, Streams, Undone, add_scaled, scaled
from revwire._streams.bits import pack_bits, unpack_bits
from revwire._streams.samples import FOLD, Fingerprint, Sample, folds, spread
from revwire.couplings.base import Rule

HEADROOM_BITS = 5
"""The streams may grow to 2^5 times the range they were scaled for before they are scaled anew."""


_LARGEST_BITS = 24
"""Bits that the largest value in 32-bit integers has, beside the headroom; one more where it is just above a power of
two.
"""


_USUAL_BITS = {torch.float32: 19, torch.float16: 14, torch.bfloat16: 11}
"""Bits that most values must have, by the dtype in which branches compute; see Note [Wide streams]."""


_FEWER = 16
"""A tensor that a branch saved is sampled at this many."""


_SATURATES = platform.machine().lower() not in ("x86_64", "amd64", "i686")
"""Whether float-to-integer conversion on this CPU turns NaN into 0 instead of an integer out of range."""


_INF = float("inf")


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FixedStreams(Streams):
    """Streams as integers round(x·2^scale): int64 for float64 streams, int32 or int64 for float32.

    Args:
        scale: K, the number of fractional bits.
        integer: ``torch.int32`` or ``torch.int64``.
        form: does the arithmetic in one pass over memory where it can (`kernels`, `fused`), the same for step and
            unstep; None: the plain form does.
        dtype: of the values: ``torch.float32`` or ``torch.float64``.
    """

    scale: int
    integer: torch.dtype
    form: Form | None = None
    dtype: torch.dtype = torch.float32
    witnesses: ClassVar[int] = 2

    @classmethod
    def for_range(
        cls,
        largest: float,
        dtype: torch.dtype,
        usual: float = 0.0,
        branch: torch.dtype = torch.float32,
        device: torch.device = _CPU,
    ) -> FixedStreams:
        """Streams scaled so that values up to ``largest``·2^`HEADROOM_BITS` fit.

        Args:
            largest: of the magnitudes.
            dtype: of the streams.
            usual: the magnitude of most values; 0 where it is not known.
            branch: the dtype in which branches compute.
            device: where the states will be.

        Raises:
            RangeError: ``largest`` is not finite.
        """
        if not isfinite(largest):
            raise RangeError(f"got a largest magnitude of {largest}; expected finite values at the start of the chain")
        integer = torch.int64 if dtype == torch.float64 or asks_for_wide(largest, usual, branch) else torch.int32
        top = 57 if integer == torch.int64 else 30
        exponent = floor(log2(largest)) + 1 if largest > 0 else 0
        scale = max(-100, min(100, top - HEADROOM_BITS - exponent))
        return cls(scale, integer, _form_on(device) if dtype == torch.float32 else None, dtype)

    @property
    def bound(self) -> float:
        """Two such values can be added without leaving the integers, and so is what `_rounded` makes of NaN."""
        return float(2.0 ** ((62 if self.integer == torch.int64 else 30) - self.scale))

    def enter(self, x: Tensor) -> Tensor:
        return _rounded(torch.mul(x.detach(), 2.0**self.scale)).to(self.integer)

    def read(self, state: Tensor) -> Tensor:
        if self.form and self.form.suits(state):
            return self.form.read(state, self.scale)
        return state.to(self.dtype).mul_(2.0**-self.scale)

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
        scaled_rule = self._scaled(previous, x, rule)
        if self.form and scaled_rule:
            wanted = dtype if dtype and dtype.itemsize < VALUE_BYTES else self.dtype
            done = self.form.advance(previous, x, f, scaled_rule, keep=undone, dtype=wanted)
            if done.in_range or done.reached is not None:
                return done
        if not x.is_floating_point():
            x = self.read(x)
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
        return Stepped(out, self._value(wide, out), bits)

    def _value(self, wide: Tensor, out: Tensor) -> Tensor:
        """The float value of ``out``, in the place of the increment; where a number is read late, NaN stays visible."""
        if _is_read_late(wide.device):
            return wide.mul_(0.0).add_(out, alpha=2.0**-self.scale)
        return wide.copy_(out).mul_(2.0**-self.scale)

    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Rule, bits: Tensor | None) -> Undone:
        scaled_rule = self._scaled(following, x, rule)
        if self.form and scaled_rule:
            return self.form.retreat(following, x, f, scaled_rule, bits)
        if not x.is_floating_point():
            x = self.read(x)
        increment = self._increment(x, f, rule).to(self.integer)
        out = torch.sub(following, increment, out=increment) if rule.b > 0 else increment.sub_(following)
        if rule.signs is not None:
            out.mul_(rule.signs.to(self.integer))
        if bits is None:
            return Undone(out)
        m = _bits(rule)
        return Undone(out.bitwise_left_shift_(m).bitwise_or_(unpack_bits(bits, m, out)).sub_(_half(m)))

    def _scaled(self, state: Tensor, x: Tensor, rule: Rule) -> Scaled | None:
        """The rule where the form serves: for numbers, not for one number per sample."""
        a, c, m, scale = rule.a, rule.c, rule.bits, self.scale
        if m is None or rule.signs is not None or not isinstance(a, float) or not isinstance(c, float):
            return None
        if not (self.form and self.form.suits(state, x)):
            return None
        return ldexp(a, scale), ldexp(c, scale), ldexp(1.0, -scale), m, rule.b < 0

    def _increment(self, x: Tensor, f: Tensor, rule: Rule) -> Tensor:
        """R = round(2^K·(a·x + c·f)), a float tensor in the layout of ``x``."""
        wide = scaled(f, rule.c * 2.0**self.scale, x)
        add_scaled(wide, x, rule.a * 2.0**self.scale)
        return _rounded(wide)

    def summary(self, state: Tensor) -> Tensor:
        """Sums of integers: their order does not matter."""
        if self.form and self.form.suits(state):
            return self.form.summed(state)
        return folds(state).sum(1, dtype=self.integer)

    def sample(self, f: Tensor, saved: Sequence[Tensor]) -> Sample:
        """They show a fault that the sums of states cannot.

        Where the last layer of a branch is zero, its result is zero whatever its other layers do, but the gradient of
        that layer is not.
        """
        values = self.form.sampled(f, saved, FOLD, _FEWER) if self.form else None
        if values is None:
            with torch.no_grad():
                wide = (
                    torch.float64 if any(t.dtype == torch.float64 for t in (f, *saved)) else torch.float32
                )  # autocast mixes no others
                values = torch.cat([spread(f, FOLD).to(wide), *(spread(t, _FEWER).to(wide) for t in saved)])
        return Sample(values, f.dtype)

    def difference(self, before: Fingerprint, after: Fingerprint) -> Tensor:
        a, b = before.branch, after.branch
        other = (a != b) & ~(a.isnan() & b.isnan())
        return torch.stack([(before.state != after.state).sum(), other.sum()])

    def allowed(self, before: Fingerprint) -> tuple[float, float]:
        return 0, 0


def _form_on(device: torch.device) -> Form | None:
    """What does the arithmetic of states on this device in one pass."""
    if fused.serves(device):
        return fused
    return kernels if device.type == "cpu" and kernels.available() else None


def asks_for_wide(largest: float, usual: float, branch: torch.dtype) -> bool:
    """Whether streams of float32 need more than 32 bits; see Note [Wide streams].

    Args:
        largest: of the magnitudes.
        usual: the magnitude of most values; 0 where it is not known.
        branch: the dtype in which branches compute.
    """
    spare = _LARGEST_BITS - _USUAL_BITS.get(branch, _USUAL_BITS[torch.float32])
    return 0 < usual * 2.0**spare < largest


def _bits(rule: Rule) -> int:
    """m; the caller has seen to it that there is one (`Coupling.kept_bits`)."""
    assert rule.bits is not None
    return rule.bits


def _half(m: int) -> int:
    """Added before a shift to the right by m, so that it rounds to the nearest: rounding down would add up over the
    units.
    """
    return 1 << m - 1


def _rounded(wide: Tensor) -> Tensor:
    """Round a float tensor, in place, so that what is not finite becomes an integer out of range when it is
    converted.
    """
    wide.round_()
    if _SATURATES or wide.device.type != "cpu":
        wide.nan_to_num_(nan=_INF, posinf=_INF, neginf=-_INF)
    return wide


def _is_read_late(device: torch.device) -> bool:
    """Whether a range check is read when the increment is forgotten (see Note [Synchronisation] in `_runtime.range`).

    On the CPU it is read at once, and a sum of two dtypes would need memory.
    """
    return device.type != "cpu"
