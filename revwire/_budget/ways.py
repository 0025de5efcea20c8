"""The ways to run that a budget may choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from torch import nn

from revwire._budget.mixes import Picks
from revwire._budget.progress import Progress
from revwire._capture.arguments import Call, fresh_arguments
from revwire._errors import ConversionError
from revwire._forwards.converted import Converted, Parted, switch
from revwire._plan.costed import pieces_of
from revwire._plan.globs import refuse_idle_globs
from revwire._plan.hints import Hints
from revwire._plan.options import Chunks, wanted
from revwire._runtime.chunks import Cut
from revwire._splitting.kinds import Kinds
from revwire._splitting.probe import Prober, probed
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.modes import nothing_compiled
from revwire.measure._training_step import run_model

COUNTS = (2, 4, 16)
"""The numbers of chunks among which a budget chooses."""


class Way(NamedTuple):
    """One of several ways to run a model.

    Attributes:
        apply: lets the model run so, on top of the ways that were kept before.
        undo: lets it run as before; None: it is the first.
    """

    apply: Callable[[], None]
    undo: Callable[[], None] | None = None


class _Tried(NamedTuple):
    """A way to cut units.

    Attributes:
        prober: knows how they may be cut.
        chunks: into how many.
        kinds: of units that are cut; None: all.
    """

    prober: Prober
    chunks: Chunks
    kinds: frozenset[int] | None = None


class Ways:
    """Ways to run a model: with its units whole, or as the caller wants them cut, and then with what lies outside of
    chains checkpointed, where there is something to ``choose``. And the `finer` ways to cut units among which a budget
    may choose.

    How units may be cut is looked at when a way is asked for that cuts some: that takes several runs of each kind.

    Attributes:
        tried: the ways to cut units, the coarsest first.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Converted,
        call: Call,
        chunks: Chunks | None,
        hints: Hints,
        *,
        choose: bool = False,
    ) -> None:
        self.model, self.state, self.call, self.chunks, self.choose = model, state, call, chunks, choose
        self.kinds, self.quiet = hints.kinds, hints.quiet
        self.names = [[(u.path, u.host) for u in planned.units] for planned in state.plan.chains]
        self.tried: list[_Tried] = []
        self.looks: Progress | None = None  # counts the runs in which cuts are looked for; not under a budget
        self.around: Callable[[], AbstractContextManager[None]] = nullcontext  # a forward
        refuse_idle_globs(
            "chunks",
            chunks if isinstance(chunks, Mapping) else (),
            [name for several in self.names for names in several for name in names],
        )

    def __iter__(self) -> Iterator[Way]:
        yield Way(self._as_wished)
        if self.choose:
            yield Way(
                partial(switch, self.state.checkpointed, on=True), partial(switch, self.state.checkpointed, on=False)
            )

    def finer(self, may_help: Callable[[int], bool], wanted: Callable[[Kinds], frozenset[int]]) -> list[int]:
        """The places, among those that are tried, of finer ways to cut units, where that may help: units of the kinds
        that are wanted.
        """
        counts = [count for count in COUNTS if may_help(count)] if self.chunks is None else []
        cut = wanted(self.kinds) if counts else frozenset[int]()
        if not cut:
            return []
        try:
            prober = self._probed(counts, cut)
        except ConversionError:
            return []  # it does not run in eval mode: whole units are what there is
        if not (prober.cuts_something or self.state.parted):
            return []
        self.tried += [_Tried(prober, count, cut) for count in counts]
        return list(range(len(self.tried) - len(counts), len(self.tried)))

    def keep(self, ways: Iterable[int]) -> None:
        """Forget all other ways to cut units."""
        self.tried = [self.tried[way] for way in ways]

    def cut_of(self, way: int, place: tuple[int, int]) -> tuple[int, ...]:
        """What a way makes of the unit at a place of a chain: how many chunks, and how many parts of each core."""
        count, _, chunks = self._cut(way, place)
        return (chunks, *(p.forward.parts_in(-(-count // chunks)) for p in self._parted(place)))

    def _as_wished(self) -> None:
        chunks = 1 if self.chunks is None else self.chunks
        self.tried = [_Tried(Prober([1], {}) if chunks == 1 else self._probed([chunks]), chunks)]
        self.pick({})

    def _probed(self, wishes: Iterable[Chunks], kinds: frozenset[int] | None = None) -> Prober:
        counts = {wanted(wish, n) for wish in wishes for several in self.names for n in several}
        return probed(self.model, self.state.chains, self._run, counts, self.kinds, kinds, quiet=self.quiet)

    def _cut(self, way: int, place: tuple[int, int]) -> tuple[int, Cut | None, int]:
        """(how many chunks a way wants of the unit at a place, how it may be cut, how many chunks there are then)."""
        (prober, wish, kinds), (number, at) = self.tried[way], place
        count = wanted(wish, self.names[number][at]) if kinds is None or self.kinds[number][at] in kinds else 1
        cut = prober.cut(self.state.chains[number], at, count)
        return count, cut, pieces_of(cut, self.state.plan.chains[number].units[at])

    def _parted(self, place: tuple[int, int]) -> list[Parted]:
        return [p for p in self.state.parted if (p.chain, p.place) == place]

    def _run(self) -> None:
        if self.looks is not None:
            self.looks.advance()
        given = fresh_arguments((self.call.args, self.call.kwargs))
        with self.around(), left_as_found(self.model, given), nothing_compiled():
            run_model(self.model, given)

    def pick(self, picks: Picks) -> None:
        """Cut each unit in one of the ways that are tried (the first, where nothing is said); where it is not cut into
        as many chunks, the rest is left to its cores.
        """
        for number, (chain, names) in enumerate(zip(self.state.chains, self.names, strict=True)):
            cuts = []
            for place in ((number, at) for at in range(len(names))):
                count, cut, chunks = self._cut(picks.get(place, 0), place)
                cuts.append(cut)
                for parted in self._parted(place):
                    parted.forward.cut(-(-count // chunks))
            chain.cuts = tuple(cuts)
