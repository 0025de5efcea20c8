"""Which chains are rewired and what is checkpointed so that a step needs least, and the peaks that a plan tells of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import NamedTuple

from revwire._capture.recording import Recording
from revwire._paper.chain import ChainOnPaper, chain_on_paper
from revwire._paper.cuts import Cut, cut_of, peak
from revwire._paper.leanest import cuts_of, leanest, lowest
from revwire._paper.step import NONE, Bytes, Step
from revwire._plan.blocks import every_block
from revwire._plan.outside import can_be_checkpointed, name_of
from revwire._plan.plan import Peaks, PlannedChain
from revwire._search.dataflow import flow_of
from revwire._search.residuals import Candidate

_TELLING = 1 << 20
"""Bytes that a step on the example must take at least to tell which layout is the leanest."""


class Chosen(NamedTuple):
    """What is rewired, by the places of chains, and the names of the modules that are checkpointed."""

    chains: tuple[int, ...]
    checkpointed: tuple[str, ...]


class OnPaper:
    """A step of the model in a recording, laid out on paper.

    Args:
        recording: of the example.
        units: those of each chain that can be rewired.
        planned: the same chains, with what each unit keeps.
    """

    def __init__(
        self, recording: Recording, units: Sequence[Sequence[Candidate]], planned: Sequence[PlannedChain]
    ) -> None:
        self.recording, self.units, self.step = recording, units, Step(recording)
        self.chains: list[ChainOnPaper] = [
            chain_on_paper(self.step, several, chain.stream_bytes, [u.kept_bytes for u in chain.units])
            for several, chain in zip(units, planned, strict=True)
        ]

    @property
    def tells(self) -> bool:
        """Whether the example shows what a step keeps: not where it is tiny, all is frozen, or the model checkpoints
        itself already.
        """
        return self.saves and self.stored.growing >= _TELLING

    @property
    def saves(self) -> bool:
        """Whether the example shows what a step keeps, be it little."""
        return not self.units or any(self.recording.events[e].saved for c in self.chains for e in c.own)

    @cached_property
    def stored(self) -> Bytes:
        """The peak of a step as it was."""
        return peak(self.step, ())

    def choose(self, may_be_rewired: Sequence[bool], *, checkpoints: bool) -> Chosen:
        """The leanest layout, in which modules may be checkpointed or not. See Note [The leanest layout] in
        `_paper.leanest`.
        """
        free = [number for number, may in enumerate(may_be_rewired) if may]
        cuts = self._cuts() if checkpoints else []
        while True:
            found = leanest(self.step, cuts, [self.chains[c] for c in free], lambda c, cut: self._bars(free[c], cut))
            chosen = {cut.begin for cut in found.cuts}
            modules = {id(self.recording.events[call].target) for call in chosen}
            others = self._calls_of(modules) - chosen
            if not others:  # else a module is checkpointed in all of its calls, or in none
                names = [name_of(self.recording, c) for c in sorted(chosen)]
                return Chosen(tuple(free[c] for c in found.chains), tuple(dict.fromkeys(names)))
            half = {id(self.recording.events[call].target) for call in others}
            cuts = [cut for cut in cuts if id(self.recording.events[cut.begin].target) not in half]

    def peaks(self, chosen: Chosen) -> Peaks:
        """Those of a step as it was, with each block checkpointed, and as it is chosen."""
        blocks = self._named(every_block(self.recording))
        planned = self._named(chosen.checkpointed), [self.chains[c] for c in chosen.chains]
        return Peaks(self.stored.all, peak(self.step, blocks).all, peak(self.step, *planned).all)

    def lowest(self) -> int:
        """Bytes at the peak of a step in which units hold nothing but their chain's states, and any module may be
        checkpointed: what chunks cannot beat.
        """
        bare = [c._replace(units=tuple(u._replace(kept=0, inner=NONE) for u in c.units)) for c in self.chains]
        return lowest(self.step, self._cuts(), bare)

    def _cuts(self) -> list[Cut]:
        flow = flow_of(self.recording)
        calls = [e.number for e in self.recording.events[1:] if e.is_module]
        return [c for c in cuts_of(self.step, calls) if can_be_checkpointed(flow, c.begin)]

    def _named(self, names: Collection[str]) -> list[Cut]:
        found = [e.number for e in self.recording.events[1:] if e.is_module]
        return [cut_of(self.step, call) for call in found if name_of(self.recording, call) in names]

    def _calls_of(self, modules: set[int]) -> set[int]:
        return {e.number for e in self.recording.events if e.is_module and id(e.target) in modules}

    def _bars(self, chain: int, cut: Cut) -> bool:
        """Whether what is to be checkpointed runs in the code that holds a chain, before it or behind it."""
        if cut.end > self.chains[chain].begin and cut.begin < self.chains[chain].end:
            return False  # one takes the place of the other
        return not {c.host for c in self.units[chain]}.isdisjoint(self.recording.calls_around(cut.begin))
