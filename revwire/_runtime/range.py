"""Whether the values of a forward stay in the range of its streams.

Note [Synchronisation]
    Reading one number from an accelerator stalls it. There, range checks and comparisons stay on the device, and are
    read once per chain and pass: at the end of the chain, and at the end of the backward pass, which is before an
    optimizer can use a gradient. (The magnitude of a chain's input is read once more, where it begins: it may ask for a
    wider range than the example at conversion.) A value out of range becomes NaN meanwhile, so that it never passes for
    a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from revwire._errors import RangeError
from revwire._runtime.unit import Unit


class RangeCheck:
    """The range checks of one forward.

    Args:
        chain: its name, for the error.
        bound: the magnitude below which every value must stay; None: there is nothing to check.
        deferred: whether they are read at the end; see Note [Synchronisation].
    """

    __slots__ = ("bound", "chain", "deferred", "norms")

    def __init__(self, chain: str, bound: float | None, *, deferred: bool) -> None:
        self.chain, self.bound, self.deferred = chain, bound, deferred
        self.norms: list[tuple[Unit, Tensor]] = []

    def holds(self, out: Tensor) -> bool:
        """Whether all values are in range, as far as that can be told without waiting for a device."""
        if self.bound is None or self.deferred or not out.numel():
            return True
        low, high = torch.aminmax(out)  # a NaN anywhere makes both NaN; many times faster than a vector norm
        return -self.bound < float(low) and float(high) < self.bound

    def note(self, unit: Unit, out: Tensor) -> None:
        """Where reading a number stalls, a value out of range becomes NaN, and the magnitude is read later."""
        if self.bound is None or not self.deferred or not out.numel():
            return
        low, high = torch.aminmax(out)
        norm = torch.maximum(-low, high)
        self.norms.append((unit, norm))
        out.mul_(torch.where(norm < self.bound, 1.0, float("nan")))

    def settle(self) -> None:
        """Read the deferred checks: one synchronisation.

        Raises:
            RangeError: a value left the range of the streams; names the first unit at which one did.
        """
        norms, self.norms = self.norms, []
        if not norms or self.bound is None:
            return
        for (unit, _), norm in zip(norms, torch.stack([n for _, n in norms]).tolist(), strict=True):
            if not norm < self.bound:
                raise self.left(unit)

    def left(self, unit: Unit) -> RangeError:
        """The error that says that a value has left the range at this unit."""
        return RangeError(
            f"{unit.path} ({self.chain}): got a value that is not finite, or of magnitude {self.bound:.4g} or more; "
            "expected the streams to stay within 2^5 times the range they were scaled for; convert with an example "
            "whose values are of the magnitude you train on, lower the learning rate, or pass exact=False"
        )
