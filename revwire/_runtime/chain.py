"""A chain: what is wanted of a run of units. Data, and questions about it; `run` runs it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ReferenceType

from torch import Tensor

from revwire._runtime.chunks import Chunk, Cut
from revwire._runtime.observer import Observer
from revwire._runtime.range import Reach
from revwire._runtime.unit import Mode
from revwire._surroundings.weights import Homes
from revwire.couplings.base import FLOAT_TOLERANCE, Coupling


class Kept:
    """Lives as long as the last unit's activations wait for their backward."""


class Chain:
    """A run of units, as all the hosts of one converted model share it.

    Args:
        name: as reports and errors name it.
        coupling: the scheme, one for all units or one for each.
        exact: fixed-point streams (True) or float streams.
        length: number of units; after the last, the streams are merged.
        largest: the largest magnitude met in the streams at conversion, or None if not known; from then on `reach`
            follows what forwards meet.
        usual: the magnitude of most values beside it; 0 if not known.
        keeps_last: autograd may keep what the last unit saves (see Note [The last unit] in `unit_run`).

    Attributes:
        modes: how each unit comes by its activations in backward, where a memory budget has chosen.
        cuts: how each unit is cut into chunks, where that was asked for.
        observer: looks on, while there is one; see `observed`. Then every state is rebuilt that can be.
    """

    def __init__(
        self,
        name: str,
        coupling: Coupling | Sequence[Coupling],
        *,
        exact: bool,
        length: int,
        largest: float | None = None,
        usual: float = 0.0,
        keeps_last: bool = False,
    ) -> None:
        self.name = name
        self.couplings = (coupling,) * length if isinstance(coupling, Coupling) else tuple(coupling)
        self.exact = exact
        self.length = length
        self.reach = Reach(largest, usual)
        self.keeps_last = keeps_last
        self.set_anchors(None)
        self.run_whole: set[str] = set()  # units whose recompute was seen not to be comparable when it stops early
        self.comparable: set[Hashable] = set()  # units, with what they save, that were seen to be
        self.waiting: ReferenceType[Kept] | None = None  # of the forward that keeps its last unit's activations
        self.modes: tuple[Mode, ...] | None = None
        self.homes = Homes()
        self.cuts: tuple[Cut | None, ...] | None = None
        self.stored = False
        self.original = False  # run as the original network, with ordinary autograd
        self.warned = False  # that something came between two units
        self.quiet: set[tuple[int, str, bool]] = set()  # (place, unit, in training) that drew no random number
        self.told: set[str] = set()  # units of which it was said that their activations are kept
        self.observer: Observer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "waiting": None}

    def set_anchors(self, spacing: int | None, *, adapts: bool = False, tolerance: float = FLOAT_TOLERANCE) -> None:
        """Keep the true state every ``spacing`` units (None: never); where it ``adapts``, more often if rebuilt states
        drift.
        """
        self.spacing, self.adapts, self.tolerance = spacing, adapts, tolerance

    def anchored(self, place: int) -> bool:
        """Whether the true state before the unit at this place is kept. (Before the first it need not be.)"""
        if self.checkpoints(place):
            return True
        return self.spacing is not None and place > 0 and place % self.spacing == 0

    def checkpoints(self, place: int) -> bool:
        """Whether a memory budget lets the unit at this place be recomputed from a kept state."""
        return self.modes is not None and self.modes[place] in ("checkpointed", "selective") and place > 0

    def selects(self, place: int) -> bool:
        """Whether its recompute finds what products gave in its forward; see Note [Selective units] in `selective`."""
        return self.modes is not None and self.modes[place] == "selective" and place > 0

    def stores(self, place: int) -> bool:
        """Whether the unit at this place always keeps its activations; see Note [Stored units] in `tape`."""
        return self.modes is not None and self.modes[place] == "stored"

    def chunks(self, place: int | None, plain: bool, x: Tensor, extras: tuple[Any, ...]) -> tuple[Chunk, ...]:
        """The chunks in which the unit that a tape has come to runs on ``x`` and extra inputs; none where it runs
        whole.
        """
        cut = None if self.cuts is None or place is None or plain else self.cuts[place]
        return () if cut is None else cut.chunks(x, extras)

    def drifted(self, error: float) -> None:
        """Hear of the relative error of a rebuilt state."""
        if self.adapts and self.spacing is not None and error > self.tolerance / 4:
            self.spacing = max(1, self.spacing // 2)

    @property
    def largest(self) -> float | None:
        """The largest magnitude met in the streams at conversion, or None if not known."""
        return self.reach.calibrated

    @property
    def coupling_name(self) -> str:
        """The spelling of its coupling, or of its couplings."""
        return " + ".join(dict.fromkeys(c.name for c in self.couplings))


@contextmanager
def observed(chains: Iterable[Chain], observer: Observer) -> Iterator[None]:
    """Let ``observer`` look on while these chains run, in place of whoever does."""
    before = [(chain, chain.observer) for chain in chains]
    try:
        for chain, _ in before:
            chain.observer = observer
        yield
    finally:
        for chain, found in before:
            chain.observer = found
