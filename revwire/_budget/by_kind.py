"""What units cost when they are cut, measured on one of each kind.

Note [One of each kind]
    Units of one kind compute the same (see Note [Kinds of units] in `_splitting.kinds`), so what a cut changes in one
    of them it changes in all. In one step, some units of a kind run in 2 chunks, others in 4 or 16, and the rest whole;
    what that changes, beside the step in which all ran whole, is then taken for every unit of the kind. Only kinds with
    fewer units than there are cuts take more steps, in which the finest cuts come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from revwire._budget.costs import Costs
from revwire._budget.mixes import Picks
from revwire._splitting.kinds import Kinds

Place = tuple[int, int]
"""The number of a chain, and a place in it."""

CutOf = Callable[[int, Place], tuple[int, ...]]
"""What a way makes of a unit: into how many chunks, and its cores into how many parts."""

_Cut = tuple[int, tuple[int, ...]]
"""A kind of units, and what is made of one of them."""


class Survey(NamedTuple):
    """Which unit goes which way in which step, so that each kind is seen in each of its cuts.

    Attributes:
        steps: for each step, the units that are cut, and the ways that they go.
        seen: for each kind and cut, the step and the unit in which it is measured.
        ways: of which all cuts are seen in these steps.
    """

    steps: list[Picks]
    seen: Mapping[_Cut, tuple[int, Place]]
    ways: list[int]


def survey(places: Sequence[Place], kinds: Kinds, ways: Sequence[int], cut_of: CutOf, most: int) -> Survey:
    """The steps that show what these ways cost, the coarsest first: at most so many, in which the finest come first."""
    alike: dict[int, list[Place]] = {}
    for place in dict.fromkeys(places):
        alike.setdefault(kinds[place[0]][place[1]], []).append(place)
    waiting: dict[_Cut, int] = {}
    for way in reversed(ways):
        for kind, several in alike.items():
            cut = cut_of(way, several[0])
            if cut != cut_of(0, several[0]):
                waiting.setdefault((kind, cut), way)
    steps: list[Picks] = []
    seen: dict[_Cut, tuple[int, Place]] = {}
    while waiting and len(steps) < most:
        picks: Picks = {}
        for key, way in list(waiting.items()):
            free = [place for place in alike[key[0]] if place not in picks]
            if free:
                picks[free[0]], seen[key] = way, (len(steps), free[0])
                del waiting[key]
        steps.append(picks)
    unseen = {(kind, cut) for kind, cut in waiting}
    good = [w for w in ways if unseen.isdisjoint((kind, cut_of(w, several[0])) for kind, several in alike.items())]
    return Survey(steps, seen, good)


def costs_of(base: Costs, steps: Sequence[Costs], found: Survey, kinds: Kinds, way: int, cut_of: CutOf) -> Costs:
    """What a step costs in which all units go a way, by the step in which they ran whole, and those of a survey."""
    runs: dict[Place, list[int]] = {}
    for run, unit in enumerate(base.units):
        runs.setdefault((unit.chain, unit.unit), []).append(run)
    like: list[tuple[Costs, int]] = []
    for run, unit in enumerate(base.units):
        place = unit.chain, unit.unit
        seen = found.seen.get((kinds[place[0]][place[1]], cut_of(way, place)))
        if seen is None:
            like.append((base, run))
            continue
        number, other = seen
        like.append((steps[number], runs[other][min(runs[place].index(run), len(runs[other]) - 1)]))
    return base.changed(like)
