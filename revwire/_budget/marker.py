"""Marks of a forward: what it saves, and what something else holds meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from revwire._runtime.chain import Chain
from revwire._runtime.observer import Key, Observer, Outcome, Rebuilt
from revwire._runtime.unit import Unit
from revwire._streams.base import Streams, stream_dtype
from revwire._streams.samples import size_of_glance
from revwire.couplings.base import Coupling

Kind = Literal["begin", "enter", "step", "leave", "turn", "grad", "complete", "rebuilt", "undone"]


class Mark(NamedTuple):
    """A moment of a step: a unit begins, has ended, the backward pass is about to begin, a unit gets its gradient, has
    all that this needs, has its input rebuilt, or only what its gradient needs is left of that.

    ``run`` counts runs of units.
    """

    kind: Kind
    run: int


class Place(NamedTuple):
    """Which unit ran: the number of its chain, and its place in it."""

    chain: int
    unit: int


def ended(chains: Sequence[Chain]) -> None:
    """To be called by a step that is measured, when the model has given its output: what is held until then is."""
    for marker in _markers(chains):
        marker.ended()


def turn(chains: Sequence[Chain]) -> None:
    """To be called by a step that is measured, between its forward and its backward pass: when it has left autocast."""
    for marker in _markers(chains):
        marker.turn()


def _markers(chains: Sequence[Chain]) -> list[Marker]:
    return [*{id(c.observer): c.observer for c in chains if isinstance(c.observer, Marker)}.values()]


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {address for t in tensors if (address := _address(t)) is not None}


def _address(t: Tensor) -> int | None:
    """Where the memory of a tensor begins; None where it has none of its own: sparse tensors, wrappers."""
    if t.layout is not torch.strided:
        return None
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


class _Seen:
    """Memory of which a run has saved something: how large it is, and whether it is still there."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.size = storage.nbytes()
        self.reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    @property
    def alive(self) -> bool:
        return not self.reference.expired()  # type: ignore[no-untyped-call]


def _bytes_saved(rebuilt: Rebuilt) -> int:
    """Bytes that a recompute has just saved, but for what was there anyway."""
    there = _addresses(rebuilt.standing)
    found = {address: t.untyped_storage().nbytes() for t in rebuilt.saved if (address := _address(t)) is not None}
    return sum(size for address, size in found.items() if address not in there)


class Operands(NamedTuple):
    """What the arithmetic of a unit works on."""

    streams: Streams
    shape: torch.Size
    dtype: torch.dtype
    coupling: Coupling


class Marker(Observer):
    """Looks on, calls ``note`` at each mark, and sees what is saved."""

    def __init__(self, chains: Sequence[Chain], note: Callable[[], None]) -> None:
        self.numbers: dict[object, int] = {chain: i for i, chain in enumerate(chains)}
        self.note = note
        self.marks: list[Mark] = []
        self.places: list[Place] = []
        self.samples: dict[Place, Operands] = {}
        self.rebuilt: dict[int, int] = {}
        self.held: dict[int, int] = {}  # of the largest of its chunks
        self.looks: dict[int, int] = {}
        self.results: dict[int, int] = {}
        self.seen: dict[int, list[_Seen]] = {}  # what each run saved in forward
        self.newest: dict[int, _Seen] = {}  # of what the present run has saved, by address
        self.states: dict[int, _Seen] = {}  # the inputs that runs have saved themselves, as float values of states
        self.saves_state: dict[int, int] = {}
        self.early: dict[int, int] = {}
        self.lasting: dict[int, int] = {}
        self.runs: dict[Key, int] = {}

    def mark(self, kind: Kind, run: int = -1) -> None:
        self.marks.append(Mark(kind, run))
        self.note()

    def on_enter(self, chain: object, unit: Unit) -> None:
        self.places.append(Place(self.numbers[chain], unit.index))
        self.newest.clear()
        self.mark("enter", len(self.places) - 1)

    def ended(self) -> None:
        self.early = {run: self._held(run) for run in self.seen}
        self.saves_state = {run: not seen.alive for run, seen in self.states.items()}

    def turn(self) -> None:
        self.mark("turn")

    def grad(self, run: int) -> None:
        self.lasting[run] = self._held(run)
        self.mark("grad", run)

    def _held(self, run: int) -> int:
        """Bytes of what a run has saved in forward that are still there."""
        return sum(seen.size for seen in self.seen.get(run, ()) if seen.alive)

    def on_branch(self, x: Tensor, standing: Sequence[Tensor]) -> Callable[[Tensor], None] | None:
        run, there = len(self.places) - 1, _addresses(standing)
        seen, state = self.seen.setdefault(run, []), _address(x) if x.dtype == stream_dtype(x.dtype) else None

        def see(t: Tensor) -> None:
            address = _address(t)
            if address:  # not so where nothing was allocated
                known = self.newest.get(address)
                if address == state:
                    self.states[run] = _Seen(t.untyped_storage())
                if address not in there and (
                    known is None or not known.alive
                ):  # what was there is gone, and its memory used again
                    self.newest[address] = _Seen(t.untyped_storage())
                    seen.append(self.newest[address])

        return see

    def on_leave(self, outcome: Outcome) -> None:
        run, out = len(self.places) - 1, outcome.out
        place = self.places[run] = Place(self.numbers[outcome.chain], outcome.place)
        self.samples[place] = Operands(outcome.streams, out.shape, stream_dtype(out.dtype), outcome.coupling)
        if out.requires_grad:
            out.register_hook(lambda _: self.grad(run))  # type: ignore[no-untyped-call]
        self.mark("leave", run)

    def on_step(self) -> None:
        self.mark("step", len(self.places) - 1)

    def on_drop(self, key: Key, state: Tensor) -> None:
        self.runs[key] = len(self.places) - 1

    def on_complete(self, key: Key) -> None:
        self.mark("complete", self.runs[key])

    def on_undo(self, key: Key) -> None:
        self.mark("undone", self.runs[key])

    def on_rebuild(self, rebuilt: Rebuilt) -> None:
        run, found = self.runs[rebuilt.key], _bytes_saved(rebuilt)
        looks = sum(size_of_glance(t.numel(), t.dtype) for t in rebuilt.saved)
        self.rebuilt[run] = self.rebuilt.get(run, 0) + found
        self.held[run] = max(self.held.get(run, 0), found)
        self.looks[run] = self.looks.get(run, 0) + looks
        self.results[run] = self.results.get(run, 0) + rebuilt.result_bytes
        self.mark("rebuilt", run)
