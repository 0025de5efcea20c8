"""The ways to run that a budget may choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import nn

from revwire._budget.mixes import Picks
from revwire._capture.arguments import Call, fresh_arguments
from revwire._errors import ConversionError
from revwire._forwards.converted import Converted, switch
from revwire._plan.costed import chunks_of
from revwire._plan.globs import refuse_idle_globs
from revwire._plan.options import Chunks, wanted
from revwire._splitting.kinds import Kinds
from revwire._splitting.probe import Prober, probed
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.modes import nothing_compiled
from revwire.measure._training_step import run_model

COUNTS = (2, 4, 16)
"""The numbers of chunks among which a budget chooses."""


class Way(NamedTuple):
    """One of several ways to run a model, such as its units in so many chunks.

    Attributes:
        apply: lets the model run so, on top of the ways that were kept before.
        undo: lets it run as before. Where there is none, it is a way to cut units; the next such is a finer one, and
            replaces it.
        fresh: whether a first step is slower in the midst of units, in which something is made once.
    """

    apply: Callable[[], None]
    undo: Callable[[], None] | None = None
    fresh: bool = True


class Ways:
    """Ways to cut the units, the coarsest first: the one that the caller wants, or those among which a budget may
    choose.

    Whether what lies outside of chains is checkpointed is another choice, where there is one to ``choose``.
    How units may be cut is looked at when a way is asked for that cuts some: that takes several runs of each.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Converted,
        call: Call,
        chunks: Chunks | None,
        kinds: Kinds,
        *,
        choose: bool = False,
    ) -> None:
        self.model, self.state, self.call, self.chunks, self.choose = model, state, call, chunks, choose
        self.kinds = kinds
        self.names = [[(u.path, u.host) for u in planned.units] for planned in state.plan.chains]
        self.tried: list[tuple[Prober, Chunks]] = []
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext  # a forward
        self.may_help: Callable[[Any], bool] = lambda count: True  # whether so many chunks are worth a try
        refuse_idle_globs(
            "chunks",
            chunks if isinstance(chunks, Mapping) else (),
            [name for several in self.names for names in several for name in names],
        )

    def __iter__(self) -> Iterator[Way]:
        chunks = self.chunks
        others = [Way(self._switched(True), self._switched(False))] if self.choose else []
        if chunks in (None, 1):
            yield self._cutting(Prober([1], {}), 1)
            yield from others
        wishes = self._wishes()
        counts = {wanted(wish, n) for wish in wishes for several in self.names for n in several}
        if not counts:
            return
        try:
            prober = probed(self.model, self.state.chains, self._run, counts, self.kinds)
        except ConversionError:
            if chunks is not None:
                raise
            return  # it does not run in eval mode: whole units are what there is
        if prober.cuts_something or self.state.parted or chunks is not None:
            yield from (self._cutting(prober, w, fresh=bool(self.state.parted) and w == wishes[0]) for w in wishes)
            yield from others if chunks not in (None, 1) else ()

    def _wishes(self) -> list[Chunks]:
        """The numbers of chunks that are worth a try."""
        if self.chunks is None:
            return [count for count in COUNTS if self.may_help(count)]
        return [] if self.chunks == 1 else [self.chunks]

    def _run(self) -> None:
        given = fresh_arguments((self.call.args, self.call.kwargs))
        with self.around(), left_as_found(self.model, given), nothing_compiled():
            run_model(self.model, given)

    def _switched(self, on: bool) -> Callable[[], None]:
        return lambda: switch(self.state.checkpointed, on=on)

    def _cutting(self, prober: Prober, wish: Chunks, *, fresh: bool = True) -> Way:
        def apply() -> None:
            self.tried.append((prober, wish))
            last = len(self.tried) - 1
            self.pick({(c, place): last for c, several in enumerate(self.names) for place in range(len(several))})

        return Way(apply, fresh=fresh)

    def pick(self, picks: Picks) -> None:
        """Cut each unit in one of the ways that were tried; where it is not cut into as many chunks, the rest is left
        to its cores.
        """
        for number, (chain, names) in enumerate(zip(self.state.chains, self.names, strict=True)):
            ways = [self.tried[picks.get((number, place), 0)] for place in range(len(names))]
            chain.cuts = tuple(
                prober.cut(chain, place, wanted(wish, names[place])) for place, (prober, wish) in enumerate(ways)
            )
        for parted in self.state.parted:
            place, chain = (parted.chain, parted.place), self.state.chains[parted.chain]
            count = wanted(self.tried[picks.get(place, 0)][1], self.names[parted.chain][parted.place])
            unit = self.state.plan.chains[parted.chain].units[parted.place]
            parted.forward.cut(-(-count // chunks_of(unit, chain, parted.place)))
