"""The forms in which a unit can run, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from revwire._runtime.unit import Mode

Form = Literal["r", "c", "p", "s", "z", "y", "x", "a"]


MODES: dict[Form, Mode] = {"r": "reversible", "c": "checkpointed", "p": "selective"}


MODES |= dict.fromkeys(("s", "z", "y", "x", "a"), "stored")


_GOES_ON: dict[Form | None, Form] = {"z": "y", "y": "x", "x": "x", "a": "a"}
"""The form of the next unit, where a run is stored to the end of its chain."""


_STORED_IS_FASTER = 0.99
"""The most of what storing a unit gains that a selective one can gain: clocks are noisy, and this is certain."""


@dataclass(frozen=True)
class Selective:
    """What a unit costs when it is selective.

    Attributes:
        extra: bytes kept beyond those of its reversible form, from its forward to its backward.
        own: by how many bytes the peak of its own stretches is higher.
        seconds: by which a step is shorter.
    """

    extra: int
    own: int
    seconds: float


@dataclass(frozen=True)
class UnitCost:
    """One run of a unit.

    Attributes:
        chain, unit: which one.
        saved: bytes that autograd keeps for it.
        rebuilt: bytes that its recomputes save.
        held: those of them that it holds at once: of one of its chunks, or all.
        kept: bytes that are kept for it when it is reversible.
        state: bytes of one of its chain's states.
        exact: whether those are rebuilt to the bit, so that a checkpointed unit keeps no more than one.
        looks: bytes of samples that are kept of what a checkpointed unit saved, where its recompute stops.
        early, lasting: bytes, of those saved, that something else holds until the forward pass ends, or until the
            unit's backward begins (the former include the latter).
        saves_state: whether it saves its input itself, as the float value of a state, which also carries a gradient to
            the next unit.
        result: bytes of what its branch gives, where a checkpointed unit keeps that instead of a state; else 0.
        gain: seconds by which a step is shorter when it is stored.
        relief: seconds by which a step is shorter when it is checkpointed: its recompute stops when its gradient has
            all that it needs.
        arithmetic: those of them that its kept bits and the way back take.
        ends: whether it is the last of its chain.
        fixed: it stays reversible: nothing is rebuilt for it, or it runs several times.
        selective: what it costs in that form, where that was measured.
    """

    chain: int
    unit: int
    saved: int
    rebuilt: int
    held: int
    kept: int
    state: int
    exact: bool
    looks: int
    early: int
    lasting: int
    saves_state: bool
    result: int
    gain: float
    relief: float
    arithmetic: float
    ends: bool
    fixed: bool
    selective: Selective | None = None

    def forms(self, before: Form | None) -> tuple[Form, ...]:
        """The forms that it may have after a unit of form ``before`` (None: it is the first of its chain)."""
        if before in _GOES_ON:
            return () if self.fixed else (_GOES_ON[before],)
        if self.fixed:
            return ("r",)
        if before is None:
            return ("r", "a") if self.ends else ("r", "s", "a")
        recomputed: tuple[Form, ...] = ("r", "c", "p") if self.selective else ("r", "c")
        if before == "s":
            return recomputed if self.ends else (*recomputed, "s")
        return (*recomputed, "z") if self.ends else (*recomputed, "s", "z")

    def extra(self, form: Form, before: Form | None) -> int:
        """Bytes kept beyond those of its reversible form, from its forward to its backward."""
        if form == "r":
            return 0
        if form == "p":
            return self.selective.extra if self.selective else 0
        if form == "c" and self.result:
            return self.result + self.looks
        if form == "c":
            return (1 if self.exact or before == "c" else 2) * self.state + self.looks - self.kept
        states = 0
        if form == "s" and before in ("r", "c", "p"):
            states = 2 if self.exact or before == "r" else 1
        if form == "a" and self.ends:
            states = -2
        return self.saved - self.lasting - self.kept + states * self.state

    def before_turn(self, form: Form) -> int:
        """How many of them are there in its reversible form, too, until the forward pass ends."""
        return self.early - self.lasting if MODES[form] == "stored" else 0

    def seconds(self, form: Form) -> float:
        """Seconds by which a step is shorter than with the reversible form."""
        if form == "p":
            return self.selective.seconds if self.selective else 0.0
        return {"r": 0.0, "c": self.relief}.get(form, self.gain)


def _kind(unit: UnitCost) -> tuple[int, ...]:
    """What units have in common that are of one kind."""
    return unit.saved, unit.held, unit.kept, unit.state, unit.looks, unit.result, int(unit.ends)
