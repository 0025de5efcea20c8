"""Whether the values of a forward stay in the range of its streams, and for which range the next one is scaled.

Note [Out of range]
    Where the value of x_{k+1} would leave the integers, the tape ends with unit k. Its record keeps x_{k-1}, as that of
    a checkpointed unit does, so that nothing has to come back from x_{k+1}; x_{k+1} itself is computed in floating
    point by the same node, whose gradient is what it always is; and the chain goes on in a new tape that x_k and
    x_{k+1} enter as the input of a chain does, in streams scaled for what they are. It costs two more states, which
    wait for their backward, and may happen any number of times. What is not finite fits no integers: from there on
    streams are floats, each unit keeps its states, and gradients are the plain network's, NaN and all.

Note [Following the range]
    Once a forward has left the range, those after it are scaled for what it met (`Reach`); one that stays in it is
    scaled for nothing but its input and the example, so what it computes does not depend on those before it. Scales are
    local: a tape keeps its own, and ranks need not agree. A forward inside of a backward pass (activation checkpointing
    runs one again) takes the scale of the one before.

Note [Synchronisation]
    Reading one number from an accelerator stalls it. There, range checks and comparisons stay on the device, and all of
    a backward pass are read at its end by one transfer (`endings`), which is before an optimizer can use a gradient. A
    value out of range becomes NaN meanwhile, so that it never passes for a number, and ends in an error: nothing can be
    scaled anew when it is too late. (In the plain form all values of its state do; see Note [Out of range on a GPU] in
    `fused`.) Therefore, after a forward that came near the end of the range, each unit is read for a while. Where the
    first value that does not fit is not finite (`FixedStreams` leaves it so), the plain network has none either: there
    is no error, and all gradients are NaN, as the gradient that enters the chain is multiplied by NaN on the device.
    A forward is read so late only where its backward is expected to come: as many forwards may wait for theirs as were
    seen to wait together, in the mode (train or eval) in which they did. Any other (the first one, an evaluation, one
    without gradients) is read at the end of its chain, together with those that still wait. Nor is the input of a
    forward that is read late looked at where it begins: it is scaled for the widest input before it, and its own must
    fit like any other value. One that was wider has the next forward look again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from revwire._errors import RangeError
from revwire._runtime.autograd_graph import NO_PASS, running_pass
from revwire._runtime.unit import Unit
from revwire._streams.base import Stepped
from revwire._streams.samples import usual_magnitude

_NEAR = 4
"""A forward that came nearer than this factor to the end of the range may be followed by one that leaves it."""


_UNUSED = 2.0**9
"""A range is wider than needed where it ends at more than this many times what was met."""


_NARROWER = 2.0**3
"""By how much it narrows then."""


_IDLE = 64
"""Forwards in a row that must leave a range unused before it narrows."""


_CAREFUL = 64
"""Forwards in which each unit is read, also where that stalls."""


@dataclass
class Reach:
    """The largest magnitude for which a chain scales its streams; see Note [Following the range].

    Attributes:
        calibrated: that of the example, below which it does not fall; None where it is not known.
        usual: the magnitude of most values beside that; 0 where it is not known.
        largest, beside: that of the present forward, and the magnitude of most values beside it.
        following, following_beside: those of the next one.
        held: nothing that forwards meet changes it.
        careful: forwards that are still to be read unit by unit.
        idle: forwards in a row that left the range unused.
        warned: of which kinds of things a warning was given.
        begun: forwards since the latest backward pass; see Note [Synchronisation].
        together: how many were seen to wait for their backward together.
        training: the mode in which they did.
        unread: the checks of those that still wait.
    """

    calibrated: float | None
    usual: float = 0.0
    largest: float = field(init=False)
    beside: float = field(init=False)
    following: float = field(init=False)
    following_beside: float = field(init=False)
    held: bool = False
    careful: int = 0
    idle: int = 0
    warned: set[str] = field(default_factory=set)
    begun: int = 0
    together: int = 0
    training: bool = True
    unread: list[RangeCheck] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.largest = self.following = self.calibrated or 0.0
        self.beside = self.following_beside = self.usual

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "unread": []}

    def awaits_backward(self, training: bool) -> bool:
        """Whether the forward that begins may be read in its backward pass; see Note [Synchronisation]."""
        self.begun += 1
        return self.begun <= self.together and training == self.training and not (self.careful or self.held)

    def came_back(self, training: bool) -> None:
        """A backward pass has come through the chain."""
        self.together, self.begun, self.training = max(self.together, self.begun), 0, training

    def widen(self, met: float, usual: float) -> None:
        """An input of magnitude ``met`` asks for a wider range, now and later; ``usual`` is that of most of it."""
        if not self.held and met > self.largest:
            self.largest = self.following = met
            self.beside = self.following_beside = usual

    def begin(self) -> float:
        """A forward begins: for which magnitude its streams are scaled at least."""
        if running_pass() == NO_PASS:
            self.largest, self.beside = self.following, self.following_beside
        return self.largest

    def stay(self, met: float, bound: float) -> None:
        """A forward has met magnitudes up to ``met`` in streams that end at ``bound``."""
        if self.held:
            return
        self.careful = _CAREFUL if met * _NEAR > bound else max(self.careful - 1, 0)
        floor = self.calibrated or 0.0
        self.idle = self.idle + 1 if self.largest > floor and met * _UNUSED < bound else 0
        if self.idle == _IDLE:
            self.following, self.idle = max(floor, self.largest / _NARROWER), 0
            self.following_beside = max(self.usual, self.beside / _NARROWER)

    def leave(self, met: float, usual: float = 0.0) -> None:
        """A forward has left its range, by a value of magnitude ``met``, in a state where ``usual`` is that of most."""
        if not self.held and isfinite(met):
            if met > self.following:
                self.following, self.following_beside = met, max(self.usual, usual)
            self.careful, self.idle = _CAREFUL, 0

    def warn(self, kind: str, message: str) -> None:
        """Warn, once of each kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, stacklevel=3)


@contextmanager
def ranges_held(reaches: Iterable[Reach]) -> Iterator[None]:
    """Let all forwards inside of this be scaled alike, so that they can be compared to the bit."""
    before = [(reach, reach.held) for reach in reaches]
    try:
        for reach, _ in before:
            reach.held = True
        yield
    finally:
        for reach, held in before:
            reach.held = held


def _reached(x: Tensor) -> Tensor:
    """The largest magnitude, one number on its device; NaN where any is."""
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).view(1)


def magnitude(*tensors: Tensor) -> float:
    """The largest magnitude in these tensors; not finite where one of them is not. It waits for the device."""
    found = [torch.stack(torch.aminmax(t.detach())).abs().amax() for t in tensors if t.numel()]
    return float(torch.stack(found).amax()) if found else 0.0


class RangeCheck:
    """The range checks of one forward.

    Args:
        chain: its name, for what is said.
        reach: that of the chain, which hears of it.
        bound: the magnitude below which every value must stay; None: there is nothing to check.
        keep: whether gradients are recorded; else nobody is warned, and no forward is scaled for this one.
        deferred: whether they are read at the end; see Note [Synchronisation].
        late: whether that is the end of the backward pass.
        training: the mode in which the forward runs.

    Attributes:
        largest: the largest magnitude so far, as far as it was read (to a factor of 2).
        spoiled: a deferred check found what is not finite: there are no gradients but NaN.
        gated: the backward pass whose gradients are NaN already where this forward is spoiled.
    """

    __slots__ = (
        *("bound", "chain", "deferred", "error", "gated", "keep", "largest", "late", "norms", "reach", "spoiled"),
        *("entered", "training", "_poison"),
    )

    def __init__(
        self,
        chain: str,
        reach: Reach,
        bound: float | None,
        *,
        keep: bool,
        deferred: bool,
        late: bool = False,
        training: bool = True,
    ) -> None:
        self.chain, self.reach, self.bound, self.keep = chain, reach, bound, keep
        self.deferred = deferred and not reach.careful
        self.late, self.training, self.gated = late, training, NO_PASS
        self.largest, self.spoiled = 0.0, False
        self.error: RangeError | None = None
        self.entered = 0  # how many of the norms are of what entered
        self.norms: list[tuple[Unit, Tensor]] = []
        self._poison: Tensor | None = None

    def holds(self, unit: Unit, stepped: Stepped) -> bool:
        """Whether all values of a unit are in range, as far as that can be told without waiting for a device."""
        if self.bound is None:
            return True
        if self.deferred:
            self._read_later(unit, stepped, self.bound)
            return True
        if stepped.in_range:
            largest = stepped.largest
        elif stepped.reached is not None:
            largest = float(stepped.reached.amax())
        elif not stepped.value.numel():
            return True
        else:
            low, high = torch.aminmax(stepped.value)  # a NaN anywhere makes both NaN; many times faster than a norm
            largest = max(-float(low), float(high))
        if not largest < self.bound:
            return False
        if largest > self.largest:
            self.largest = largest
        return True

    def admit(self, unit: Unit, x: Tensor, value: Tensor) -> None:
        """``x`` has entered the streams before this unit, as ``value``, and was not looked at."""
        assert self.bound is not None
        if x.numel():
            self._read_later(unit, Stepped(x, value, None, reached=_reached(x)), self.bound, everywhere=True)
            self.entered = len(self.norms)

    def _read_later(self, unit: Unit, stepped: Stepped, bound: float, *, everywhere: bool = False) -> None:
        """A value out of range becomes NaN meanwhile."""
        out, reached = stepped.value, stepped.reached
        if reached is None and out.numel():
            reached, everywhere = _reached(out), True
        if reached is not None:
            if everywhere:
                out.mul_(torch.where(reached < bound, 1.0, float("nan")))
            self.norms.append((unit, reached))

    def numbers(self) -> Tensor | None:
        """What is to be read: the largest magnitude of what entered, and of all; None where nothing is."""
        found = [reached for _, reached in self.norms]
        if not found or self.bound is None:
            return None
        entered = torch.cat(found[: self.entered]).amax() if self.entered else found[0].new_zeros(())
        return torch.stack([entered, torch.cat(found).amax()])

    def judge(self, values: list[float] | None) -> None:
        """Hear what `numbers` were; None where there were none.

        Raises:
            RangeError: a value left the range of the streams; names the first unit at which one did.
        """
        norms, self.norms = self.norms, []
        if self in self.reach.unread:
            self.reach.unread.remove(self)
        if values is not None and self.bound is not None:
            if values[1] < self.bound:
                self.largest = max(self.largest, values[1])
            else:
                self._look_for_the_first(norms, self.bound)
        if self.error is not None:
            raise self.error
        if values is not None and self.late and not self.spoiled:
            self._stay()
            if values[0] > self.reach.largest:
                self.reach.together = 0

    def settle(self) -> bool:
        """Read the deferred checks, by one synchronisation: whether they tell that this forward is spoiled.

        Raises:
            RangeError: see `judge`.
        """
        found = self.numbers()
        self.judge(None if found is None else found.tolist())
        return self.spoiled

    def poisoned(self, g: Tensor) -> Tensor:
        """A gradient that enters the chain: NaN where this forward is spoiled, or left its range."""
        if self.norms and self._poison is None and self.bound is not None:
            reached = torch.cat([reached for _, reached in self.norms]).amax()
            self._poison = torch.where(reached < self.bound, 1.0, float("nan")).to(g.dtype)
        if self.spoiled:
            return g * float("nan")
        return g if self._poison is None else g * self._poison

    def _look_for_the_first(self, norms: list[tuple[Unit, Tensor]], bound: float) -> None:
        for unit, reached in norms:
            norm = float(reached.amax())
            if not norm < bound:
                self._found_late(unit, norm, bound)
                return
            self.largest = max(self.largest, norm)

    def _found_late(self, unit: Unit, norm: float, bound: float) -> None:
        if not isfinite(norm):
            self.spoiled = True
            self._warn_of_what_is_not_finite(unit)
            return
        self.reach.leave(norm)
        self.error = RangeError(f"{self._left(unit, bound, ' or more')}; {_TOO_LATE}")

    def close(self) -> None:
        """The forward is over.

        Raises:
            RangeError: see `judge`; of this forward, or of one before it that still waits for its backward.
        """
        if self.late:
            self.reach.unread.append(self)
            return
        for check in [*self.reach.unread]:
            check.settle()
        if not self.settle():
            self._stay()

    def _stay(self) -> None:
        if self.keep and self.bound is not None:
            self.reach.stay(self.largest, self.bound)

    def leave(self, unit: Unit, out: Tensor) -> None:
        """The float value ``out`` of this unit has left the range, and the chain goes on; see Note [Out of range]."""
        met = magnitude(out)
        if not isfinite(met):
            self._warn_of_what_is_not_finite(unit)
        elif self.keep:
            self.reach.leave(met, usual_magnitude(out))
            self.reach.warn("range", f"{self._left(unit, met)}; {_GOES_ON}")

    def _warn_of_what_is_not_finite(self, unit: Unit) -> None:
        if self.keep:
            warn_of_what_is_not_finite(self.reach, self.chain, unit)

    def _left(self, unit: Unit, met: float, more: str = "") -> str:
        return (
            f"{unit.path} ({self.chain}): got a value of magnitude {met:.4g}{more}; expected the streams to stay below "
            f"{self.bound:.4g}, which leaves them 2^5 times the range they were scaled for"
        )


_GOES_ON = (
    "they are scaled anew from here on, and in the next forward. Outputs and gradients are right; two more states are "
    "kept. Convert with an example whose values are of the magnitude you train on, or lower the learning rate, if that "
    "is not meant"
)


_TOO_LATE = (
    "here that is read when the chain is over, or its backward pass is, too late to scale them anew; the next forward "
    "is scaled for it. Convert with an example whose values are of the magnitude you train on, lower the learning "
    "rate, or pass exact=False"
)


def warn_of_what_is_not_finite(reach: Reach, chain: str, unit: Unit) -> None:
    """Say, once, that a NaN or an infinity has come into a chain."""
    reach.warn(
        "finite",
        f"{unit.path} ({chain}): got a value that is not finite; expected numbers. Outputs and gradients are those "
        "of the original network: skip the step, as torch.amp.GradScaler does. Lower the learning rate, or "
        "look for the NaN in inputs and weights",
    )
