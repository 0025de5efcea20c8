"""What one measured step is written down as: its runs of units, and its stretches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from revwire._budget.marker import Mark, Place


class Stretch(NamedTuple):
    """A piece of a step.

    Attributes:
        mark: what began it.
        level: bytes alive at its beginning, above rest.
        peak: the most bytes alive during it, above rest.
        seconds: its wall-clock time.
    """

    mark: Mark
    level: int
    peak: int
    seconds: float


@dataclass(frozen=True)
class Arithmetic:
    """Seconds of what a chain does to its streams for one unit: keeping the bits, and going back."""

    keep: float
    undo: float

    @property
    def both(self) -> float:
        """Seconds of the two together."""
        return self.keep + self.undo


@dataclass(frozen=True)
class Run:
    """One run of a unit; sizes in bytes.

    Attributes:
        place: which unit.
        arithmetic: of its chain, for this unit.
        saved: what autograd keeps for it when it is stored; 0 where nothing was rebuilt.
        rebuilt: what its recomputes save, all together: less, where autocast keeps one cast of x_k, which is a leaf
            there.
        held: of that, what it holds at once: of its largest chunk, or all.
        glances: samples that are kept of what it saved, where its recompute may stop.
        result: what its branch gave, where that is narrower than a state; else 0.
        early, lasting: among what it saved, what something else holds until the forward pass ends, or until it is
            rebuilt (the former includes the latter).
        saves_state: whether it saves its input itself, as the float value of a state, which nothing else holds.
    """

    place: Place
    arithmetic: Arithmetic
    saved: int
    rebuilt: int
    held: int
    glances: int = 0
    result: int = 0
    early: int = 0
    lasting: int = 0
    saves_state: bool = False

    def changed(self, before: Run, after: Run) -> Run:
        """That of a unit that changes as another of its kind has changed."""
        names = ("saved", "rebuilt", "held", "glances", "result", "early", "lasting")
        by = {name: getattr(after, name) - getattr(before, name) for name in names}
        return replace(self, **{name: max(0, getattr(self, name) + more) for name, more in by.items()})


@dataclass(frozen=True)
class Measured:
    """One step with every unit reversible: its runs, in the order of the forward pass, and its stretches, in order."""

    runs: tuple[Run, ...]
    stretches: tuple[Stretch, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The unit of each run."""
        return tuple(run.place for run in self.runs)
