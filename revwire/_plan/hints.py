"""What the example tells of chunks, and of a budget, before any step is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import nn

from revwire._capture.recording import Recording
from revwire._plan.leanest import Chosen, OnPaper
from revwire._programs.calls import Slot
from revwire._runtime.chain import Chain
from revwire._search.residuals import Candidate
from revwire._splitting.kinds import Kinds, kinds_of_units
from revwire._structures import refs

Places = Sequence[tuple[int, tuple[int, ...]]]
"""A chain, and places in it."""


class Hints(NamedTuple):
    """What the example tells.

    Attributes:
        kinds: of units, by chain and place.
        weights: bytes of the largest weight of each unit that is trained, by chain and place: its gradient is there
            for a moment, however the unit is cut.
        lowest: bytes of a step on paper below which nothing goes; see `OnPaper.lowest`.
        reversible: those of a step with all chains reversible, and their units whole.
        quiet: in train mode the example draws no random numbers, and writes to nothing that the model holds.
    """

    kinds: Kinds = ()
    weights: Sequence[Sequence[int]] = ()
    lowest: int = 0
    reversible: int = 0
    quiet: bool = False


def hints_of(
    recording: Recording, units: Sequence[Sequence[Candidate]], several: Places, paper: OnPaper, chosen: Chosen
) -> Hints:
    """What the example tells of these chains.

    Args:
        recording: of the example.
        units: of each chain.
        several: the places of each unit through which its chain runs more than once: it is of a kind of its own.
        paper: the step, with all that can be rewired.
        chosen: of that, what is.
    """
    kinds = kinds_of_units(recording, units)
    for number, (chain, places) in enumerate(several):
        for place in places:
            kinds[chain][place] = -1 - number
    weights = [[max(_trained(recording, c), default=0) for c in chain] for chain in units]
    on_paper = (paper.lowest(), paper.peaks(chosen).planned) if paper.saves else (0, 0)
    return Hints(kinds, weights, *on_paper, quiet=_is_quiet(recording))


def _is_quiet(recording: Recording) -> bool:
    """Whether a step in train mode leaves nothing to be seen that evaluation does not show."""
    kinds = {read.kind for read in recording.reads if read.parent >= 0}  # by the model's code, not by the recorder
    if recording.drew or not recording.training or kinds & {"random", "state", "data"}:
        return False
    written = (recording.values[before] for e in recording.events for before, _ in e.writes)
    return not any(e.opaque or e.changes for e in recording.events) and all(v.event >= 0 for v in written)


def repeated(chains: Sequence[Chain], slots: Mapping[str, Sequence[Slot]]) -> Places:
    """The units through which their chains run more than once: of each, the number of the chain, and the places."""
    return [(chains.index(s.chain), (s.index, *s.later)) for held in slots.values() for s in held if s.later]


def _trained(recording: Recording, c: Candidate) -> list[int]:
    found = (recording.values[r.value] for e in c.region for r in refs((recording.events[e].args,)))
    return [prod(v.shape) * v.dtype.itemsize for v in found if v.wants and isinstance(v.existing, nn.Parameter)]
