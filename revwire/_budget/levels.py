"""The stretches of a measured step, sorted: those of each run's own, and those in which the first p runs wait.

Note [Bytes by prefix]
    Backward passes visit units in the reverse order of forward, so at any moment the units whose memory waits are the
    first p of them. A stretch of the step then holds what was measured, plus what those p units keep beyond their
    reversible form. In its own backward a unit has its activations in any mode: kept, or just recomputed.

    Something else may hold part of what a unit saves, whatever its form: autocast its casts of weights until the
    forward pass ends (the *turn*), the output of a model keys and values for a cache, or all hidden states. So much
    less is what a stored unit keeps beyond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from revwire._budget.measured import Measured, Stretch

_OWN = ("enter", "step", "grad", "complete", "rebuilt", "undone")
"""Marks after which a stretch is a unit's own."""


class Peaks(NamedTuple):
    """The most bytes at a time before, and after, the forward pass ended."""

    forward: int
    backward: int

    def over(self, kept: int, early: int) -> int:
        """The peak where so much more is kept, of which ``early`` is in both forms until the forward pass ends."""
        return max(self.forward + kept - early, self.backward + kept)

    def moved(self, by: int) -> Peaks:
        """Those where so many more bytes lie before."""
        return Peaks(self.forward + by, self.backward + by)

    def raised(self, peak: int, *, turned: bool) -> Peaks:
        """Those of a stretch more, after or before the forward pass ended."""
        if turned:
            return Peaks(self.forward, max(self.backward, peak))
        return Peaks(max(self.forward, peak), self.backward)


@dataclass
class Levels:
    """Bytes of the stretches around one run: the beginning and peak of its forward, its rebuilding, its backward.

    Attributes:
        stepped: the peak from the end of its branch on.
        grown: from the beginning of its forward to its end.
        again: by how much its rebuilding, or that of its last chunk, rose above what was there.
        complete: of its rebuilding until its gradient had all that it needed.
        undone: of its backward from when the branch's result has gone. A recompute that stops has nothing between
            these.
        asked: alive where the gradient came for which it is rebuilt; None before.
    """

    start: int = 0
    forward: int = 0
    stepped: int = 0
    grown: int = 0
    rebuild: int = 0
    backward: int = 0
    again: int = 0
    complete: int = 0
    undone: int = 0
    asked: int | None = None

    def note(self, stretch: Stretch) -> None:
        """Take in a stretch of the run's own."""
        kind, peak = stretch.mark.kind, stretch.peak
        if kind == "enter":
            self.start, self.forward = stretch.level, peak
        elif kind == "step":
            self.forward, self.stepped = max(self.forward, peak), max(self.stepped, peak)
        elif kind in ("grad", "complete"):
            self.asked = stretch.level if self.asked is None else self.asked
            self.rebuild, self.again = max(self.rebuild, peak), max(self.again, peak - self.asked)
            if kind == "grad":
                self.complete = max(self.complete, peak)
        else:
            self.backward = max(self.backward, peak)
            if kind == "undone":
                self.undone = max(self.undone, peak)

    def moved(self, by: int) -> Levels:
        """Those where so many more bytes lie before the run."""
        return replace(self, start=self.start + by, **{name: at + by for name, at in self._absolute()})

    def changed(self, before: Levels, after: Levels) -> Levels:
        """Those of a run that changes as another of its kind, which begins at the same level, has changed."""
        out = replace(
            self, grown=self.grown + after.grown - before.grown, again=max(0, self.again + after.again - before.again)
        )
        there = dict(before._absolute())
        for name, at in after._absolute():
            setattr(out, name, getattr(self, name) + at - there[name] if name in there and getattr(self, name) else at)
        return out

    def _absolute(self) -> Iterator[tuple[str, int]]:
        """The levels of those stretches that there were."""
        for name in ("forward", "stepped", "rebuild", "backward", "complete", "undone", "asked"):
            if at := getattr(self, name):
                yield name, at


@dataclass
class Rebuilding:
    """How long a run is rebuilt.

    Attributes:
        once: seconds for one of its chunks.
        rest_once: of those, the seconds when all is there that its gradient needs; None where that is not told.
        chunks: how many.
    """

    once: float = 0.0
    rest_once: float | None = None
    chunks: int = 0

    @property
    def seconds(self) -> float:
        """Of all of its chunks."""
        return self.once * self.chunks

    @property
    def rest(self) -> float:
        """Of those, the seconds that a recompute that stops does not take."""
        return (self.rest_once or 0.0) * self.chunks


@dataclass
class Reading:
    """The stretches of a step, sorted.

    Attributes:
        levels: of each run.
        spent: seconds of each run's own stretches.
        recomputing: those of them that depend on the form: of its forward, and of rebuilding it.
        rebuilding: of the runs that were rebuilt.
        waiting: of stretches in which the first p units wait, by p.
    """

    levels: list[Levels]
    spent: list[float]
    recomputing: list[float]
    rebuilding: dict[int, Rebuilding]
    waiting: list[Peaks]

    @classmethod
    def of(cls, measured: Measured) -> Reading:
        """Sort the stretches of a step; see Note [Bytes by prefix]."""
        runs = len(measured.runs)
        found = cls(
            [Levels() for _ in range(runs)],
            [0.0] * runs,
            [0.0] * runs,
            _rebuilding(measured.stretches),
            [Peaks(0, 0)] * (runs + 1),
        )
        alive: set[int] = set()
        turned = all(stretch.mark.kind != "turn" for stretch in measured.stretches)
        for stretch in measured.stretches:
            kind, run = stretch.mark
            if kind in _OWN:
                found._note_own(stretch)
                if kind in ("grad", "complete"):
                    alive.discard(run)
                continue
            if kind == "turn":
                turned = True
            elif kind == "leave":
                alive.add(run)
                found.levels[run].grown = stretch.level - found.levels[run].start
            waiting = max(alive, default=-1) + 1
            found.waiting[waiting] = found.waiting[waiting].raised(stretch.peak, turned=turned)
        for run, rebuilding in found.rebuilding.items():
            found.recomputing[run] += rebuilding.seconds
        return found

    def _note_own(self, stretch: Stretch) -> None:
        run = stretch.mark.run
        self.levels[run].note(stretch)
        self.spent[run] += stretch.seconds
        if stretch.mark.kind in ("enter", "step"):
            self.recomputing[run] += stretch.seconds


def _rebuilding(stretches: Sequence[Stretch]) -> dict[int, Rebuilding]:
    """Of each run. Only before the first of its chunks does nothing but rebuilding lie between two marks."""
    found: dict[int, Rebuilding] = {}
    for i, s in enumerate(stretches):
        if s.mark.kind == "rebuilt":
            before = stretches[i - 1]
            complete = before.mark.kind == "complete"
            seconds = before.seconds + (stretches[i - 2].seconds if complete else 0.0)
            found.setdefault(s.mark.run, Rebuilding(seconds, before.seconds if complete else None)).chunks += 1
    return found
