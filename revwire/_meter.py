"""Measure a training step piece by piece: what is alive, and how long it takes, from one mark in the chains to the next.

Note [Marks]
    A chain tells its meter where each unit begins and ends in the forward pass, and its monitor when a state has been
    rebuilt; a hook on each unit's output tells when its gradient arrives. Between two marks lies a *stretch*. On the CPU
    the marks stand among the allocator's own reports in one trace (see `revwire.measure`); on CUDA the caching allocator
    is asked at each mark. Seconds are measured in steps of their own, as a trace slows them down.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.multiprocessing.reductions import StorageWeakRef

from revwire._couplings import Coupling
from revwire._module import Chain, Mode, Unit
from revwire._numerics import Streams, size_of_glance, stream_dtype
from revwire._records import UnitRecord
from revwire._rewind import running_pass
from revwire._tape import Tape
from revwire.measure import _standard_error_closed

_NAME = "revwire mark "


Kind = Literal["begin", "enter", "leave", "turn", "grad", "complete", "rebuilt", "undone"]


class Mark(NamedTuple):
    """A moment of a step: a unit begins, has ended, the backward pass is about to begin, a unit gets its gradient, has all that this
    needs, has its input rebuilt, or only what its gradient needs is left of that.

    ``run`` counts runs of units.
    """

    kind: Kind
    run: int


class Place(NamedTuple):
    """Which unit ran: the number of its chain, and its place in it."""

    chain: int
    unit: int


@dataclass(frozen=True)
class Stretch:
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


@dataclass(frozen=True)
class Measured:
    """One step with every unit reversible.

    Attributes:
        places: the unit of each run, in the order of the forward pass.
        stretches: the pieces of the step, in order.
        saved: bytes that autograd keeps for each run when it is stored; 0 where nothing was rebuilt.
        rebuilt: bytes that its recomputes save, all together: fewer, where autocast keeps one cast of x_k, which is a leaf there.
        held: those of its largest chunk, as a reversible unit holds them at once; all, where it runs whole.
        arithmetic: of each run.
        looks: bytes of the samples that are kept of what a run saved, where its recompute may stop.
        results: bytes of what the branch of a run gave, where that is narrower than a state.
        saves_state: whether a run saves its input itself, as the float value of a state, which nothing else holds.
        early, lasting: bytes, among those saved, that something else holds until the forward pass ends, or until the run is rebuilt.
    """

    places: tuple[Place, ...]
    stretches: tuple[Stretch, ...]
    saved: tuple[int, ...]
    arithmetic: tuple[Arithmetic, ...]
    rebuilt: tuple[int, ...] = ()
    held: tuple[int, ...] = ()
    looks: tuple[int, ...] = ()
    results: tuple[int, ...] = ()
    saves_state: tuple[int, ...] = ()
    early: tuple[int, ...] = ()
    lasting: tuple[int, ...] = ()


def ended(chains: Sequence[Chain]) -> None:
    """To be called by a step that is measured, when the model has given its output: what is held until then is."""
    for marker in _markers(chains):
        marker.ended()


def turn(chains: Sequence[Chain]) -> None:
    """To be called by a step that is measured, between its forward and its backward pass: when it has left autocast."""
    for marker in _markers(chains):
        marker.turn()


def _markers(chains: Sequence[Chain]) -> list[_Marker]:
    return [*{id(chain.meter): chain.meter for chain in chains if isinstance(chain.meter, _Marker)}.values()]


def _there_anyway(record: UnitRecord) -> set[int]:
    """Addresses of weights, buffers and extra inputs of a unit."""
    owned = (t for _, then, _ in record.owned.tables for t in then.values() if t is not None)
    found = (*owned, *record.owned.weights, *(t for t, _ in record.inputs))
    return {address for t in found if (address := _address(t)) is not None}


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


def _rebuilt(tape: Tape, position: int) -> int:
    """Bytes that a recompute has just saved, but for what was there anyway: weights, buffers and extra inputs."""
    record = tape.records[position]
    assert isinstance(record, UnitRecord)
    there = _there_anyway(record)
    cache = tape.passes[running_pass()].cache.values()
    found = {address: t.untyped_storage().nbytes() for t, _ in cache if (address := _address(t)) is not None}
    return sum(size for address, size in found.items() if address not in there)


def _looks(tape: Tape, position: int) -> int:
    """Bytes of samples of what a recompute has just saved."""
    record = tape.records[position]
    assert isinstance(record, UnitRecord)
    return sum(size_of_glance(shape.numel(), dtype) for shape, dtype, _ in record.saved)


def _result(tape: Tape, position: int, state: Tensor) -> int:
    """Bytes of what a branch gave, if a checkpointed unit keeps that instead of a state."""
    record = tape.records[position]
    assert isinstance(record, UnitRecord)
    assert record.fingerprint is not None
    return state.numel() * record.fingerprint.dtype.itemsize if record.narrow else 0


class _Sample(NamedTuple):
    """What the arithmetic of a unit works on."""

    streams: Streams
    shape: torch.Size
    dtype: torch.dtype
    coupling: Coupling


_TRIES = 3


class Unsteady(Exception):  # noqa: N818 (no fault of the caller)
    """Steps are not alike: recomputes that stop early in one go on to their end in the next (what they saved differed)."""


class _Marker:
    """Stands in a chain as its meter and as its monitor, and calls ``note`` at each mark; unless it only ``times``, sees what is saved."""

    def __init__(self, chains: Sequence[Chain], note: Callable[[], None], *, times: bool = False) -> None:
        self.numbers = {id(chain): i for i, chain in enumerate(chains)}
        self.note, self.times = note, times
        self.marks: list[Mark] = []
        self.places: list[Place] = []
        self.samples: dict[Place, _Sample] = {}
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
        self.runs: dict[tuple[int, int], int] = {}  # of the records of each tape

    def mark(self, kind: Kind, run: int = -1) -> None:
        self.marks.append(Mark(kind, run))
        self.note()

    def enter(self, chain: Chain, unit: Unit) -> None:
        self.places.append(Place(self.numbers[id(chain)], unit.index))
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

    def seeing(self, pack: Callable[[Tensor], int], record: UnitRecord, x: Tensor) -> Callable[[Tensor], int]:
        if self.times:
            return pack
        run, there = len(self.places) - 1, _there_anyway(record)
        seen, state = self.seen.setdefault(run, []), _address(x) if x.dtype == stream_dtype(x.dtype) else None

        def see(t: Tensor) -> int:
            address = _address(t)
            if address:  # not so where nothing was allocated
                known = self.newest.get(address)
                if address == state:
                    self.states[run] = _Seen(t.untyped_storage())
                if address not in there and (known is None or not known.alive):  # what was there is gone, and its memory used again
                    self.newest[address] = _Seen(t.untyped_storage())
                    seen.append(self.newest[address])
            return pack(t)

        return see

    def leave(self, chain: Chain, unit: Unit, tape: Tape, out: Tensor) -> None:
        run = len(self.places) - 1
        place = self.places[run] = Place(self.numbers[id(chain)], tape.position - 1)
        self.samples[place] = _Sample(tape.streams, out.shape, stream_dtype(out.dtype), tape.couplings[place.unit])
        if out.requires_grad:
            out.register_hook(lambda _: self.grad(run))  # type: ignore[no-untyped-call]
        self.mark("leave", run)

    def forward(self, tape: Tape, position: int, state: Tensor) -> None:
        self.runs[id(tape), position] = len(self.places) - 1

    def complete(self, tape: Tape, position: int) -> None:
        self.mark("complete", self.runs[id(tape), position])

    def undone(self, tape: Tape, position: int) -> None:
        self.mark("undone", self.runs[id(tape), position])

    def backward(self, tape: Tape, position: int, state: Tensor) -> None:
        run = self.runs[id(tape), position]
        found = _rebuilt(tape, position)
        self.rebuilt[run] = self.rebuilt.get(run, 0) + found
        self.held[run] = max(self.held.get(run, 0), found)
        self.looks[run] = self.looks.get(run, 0) + _looks(tape, position)
        self.results[run] = self.results.get(run, 0) + _result(tape, position, state)
        self.mark("rebuilt", run)


Modes = tuple[Mode, ...]
"""Of the units of one chain."""


def measured(
    chains: Sequence[Chain],
    step: Callable[[], None],
    device: torch.device,
    rounds: int = 2,
    modes: Sequence[Modes | None] | None = None,
) -> Measured:
    """Run ``step`` (forward and backward) a few times with every unit reversible, or in these modes, and measure its stretches.

    ``step`` leaves nothing behind that was not there after it had run once.
    """
    found = [chain.modes for chain in chains]
    try:
        for chain, mine in zip(chains, modes or [None] * len(chains), strict=True):
            chain.modes = mine
        step()
        for _ in range(_TRIES):
            levels, marker = (_cuda_levels if device.type == "cuda" else _cpu_levels)(chains, step)
            seconds = _seconds(chains, step, device, rounds)
            if len(seconds) == len(marker.marks):
                break
        else:
            raise Unsteady
        timed = _arithmetic(marker.samples.values(), device)
    finally:
        for chain, before in zip(chains, found, strict=True):
            chain.modes = before
    stretches = tuple(Stretch(mark, *pair, s) for mark, pair, s in zip(marker.marks, levels, seconds, strict=True))
    runs = range(len(marker.places))
    sizes = {run: sum(seen.size for seen in marker.seen.get(run, ())) for run in marker.rebuilt}
    by_run = (sizes, marker.rebuilt, marker.held, marker.looks, marker.results, marker.saves_state, marker.early, marker.lasting)
    saved, rebuilt, held, looks, results, saves_state, early, lasting = (tuple(found.get(run, 0) for run in runs) for found in by_run)
    arithmetic = tuple(timed[marker.samples[p]] for p in marker.places)
    return Measured(tuple(marker.places), stretches, saved, arithmetic, rebuilt, held, looks, results, saves_state, early, lasting)


@contextmanager
def _marked(chains: Sequence[Chain], marker: _Marker) -> Iterator[None]:
    try:
        for chain in chains:
            chain.meter = chain.monitor = marker
        marker.mark("begin")
        yield
    finally:
        for chain in chains:
            chain.meter = chain.monitor = None


def _cpu_levels(chains: Sequence[Chain], step: Callable[[], None]) -> tuple[list[tuple[int, int]], _Marker]:
    def note() -> None:
        with profiler.record_function(f"{_NAME}{len(marker.marks)}"):
            pass

    marker = _Marker(chains, note)
    gc.collect()
    trace: Any = profiler.profile(profile_memory=True)
    with _standard_error_closed():
        trace.__enter__()
    try:
        with _marked(chains, marker):
            step()
    finally:
        with _standard_error_closed():
            trace.__exit__(None, None, None)
    levels: list[tuple[int, int]] = []
    alive = 0
    for event in trace.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            if levels:
                levels[-1] = levels[-1][0], max(levels[-1][1], alive)
        elif event.name().startswith(_NAME):
            levels.append((alive, alive))
    return levels, marker


def _cuda_levels(chains: Sequence[Chain], step: Callable[[], None]) -> tuple[list[tuple[int, int]], _Marker]:
    levels: list[tuple[int, int]] = []

    def close() -> None:
        if levels:
            levels[-1] = levels[-1][0], torch.cuda.max_memory_allocated() - rest

    def note() -> None:
        close()
        levels.append((torch.cuda.memory_allocated() - rest, 0))
        torch.cuda.reset_peak_memory_stats()

    marker = _Marker(chains, note)
    gc.collect()
    torch.cuda.synchronize()
    rest = torch.cuda.memory_allocated()
    with _marked(chains, marker):
        step()
    close()
    return levels, marker


def _seconds(chains: Sequence[Chain], step: Callable[[], None], device: torch.device, rounds: int) -> list[float]:
    """Of each stretch, the least of a few rounds: what disturbs a machine only ever adds."""
    times: list[float] = []

    def note() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter())

    best: list[float] = []
    for _ in range(rounds):
        times = []
        with _marked(chains, _Marker(chains, note, times=True)):
            step()
        note()
        lasted = [b - a for a, b in pairwise(times)]
        if best and len(best) != len(lasted):
            return []
        best = lasted if not best else [min(a, b) for a, b in zip(best, lasted, strict=True)]
    return best


def _arithmetic(samples: Iterable[_Sample], device: torch.device) -> dict[_Sample, Arithmetic]:
    """Time the steps of units, forwards and backwards, on states of the same shape."""
    return {sample: _timed(sample, device) for sample in set(samples)}


def _timed(sample: _Sample, device: torch.device) -> Arithmetic:
    streams = sample.streams
    x = torch.zeros(sample.shape, dtype=sample.dtype, device=device)
    state, rule = streams.enter(x), sample.coupling.rule("residual", x)
    if rule.bits is None and streams.bound is not None:
        return Arithmetic(0.0, 0.0)  # a chain that runs as the original network
    kept = _best(lambda: streams.step(state, x, x, rule, undone=True), device)
    dropped = _best(lambda: streams.step(state, x, x, rule, undone=False), device)
    stepped = streams.step(state, x, x, rule, undone=True)
    return Arithmetic(max(0.0, kept - dropped), _best(lambda: streams.unstep(stepped.state, x, x, rule, stepped.bits), device))


def _best(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, perf_counter() - start)
    return best
