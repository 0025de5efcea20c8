"""Measure a training step piece by piece: what is alive, and how long it takes, from one mark in the chains to the
next.

Note [Marks]
    A chain tells its observer where each unit begins and ends in the forward pass, and when a state has been rebuilt; a
    hook on each unit's output tells when its gradient arrives. Between two marks lies a *stretch*. On the
    CPU the marks stand among the allocator's own reports in one trace (see `revwire.measure`); on CUDA the caching
    allocator is asked at each mark. Seconds are measured in steps of their own, as a trace slows them down.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch.autograd import profiler

from revwire._budget.marker import Mark, Place, _Marker, _Sample
from revwire._runtime.chain import Chain, observed
from revwire._runtime.unit import Mode
from revwire.measure._memory_trace import _NAME, _standard_error_closed


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
        rebuilt: bytes that its recomputes save, all together: fewer, where autocast keeps one cast of x_k, which is a
            leaf there.
        held: those of its largest chunk, as a reversible unit holds them at once; all, where it runs whole.
        arithmetic: of each run.
        looks: bytes of the samples that are kept of what a run saved, where its recompute may stop.
        results: bytes of what the branch of a run gave, where that is narrower than a state.
        saves_state: whether a run saves its input itself, as the float value of a state, which nothing else holds.
        early, lasting: bytes, among those saved, that something else holds until the forward pass ends, or until the
            run is rebuilt.
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


_TRIES = 3


class Unsteady(Exception):  # noqa: N818 (no fault of the caller)
    """Steps are not alike: recomputes that stop early in one go on to their end in the next (what they saved
    differed).
    """


Modes = tuple[Mode, ...]
"""Of the units of one chain."""


def measured(
    chains: Sequence[Chain],
    step: Callable[[], None],
    device: torch.device,
    rounds: int = 2,
    modes: Sequence[Modes | None] | None = None,
) -> Measured:
    """Run ``step`` (forward and backward) a few times with every unit reversible, or in these modes, and measure its
    stretches.

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
    by_run = (
        sizes,
        marker.rebuilt,
        marker.held,
        marker.looks,
        marker.results,
        marker.saves_state,
        marker.early,
        marker.lasting,
    )
    saved, rebuilt, held, looks, results, saves_state, early, lasting = (
        tuple(found.get(run, 0) for run in runs) for found in by_run
    )
    arithmetic = tuple(timed[marker.samples[p]] for p in marker.places)
    return Measured(
        tuple(marker.places), stretches, saved, arithmetic, rebuilt, held, looks, results, saves_state, early, lasting
    )


@contextmanager
def _marked(chains: Sequence[Chain], marker: _Marker) -> Iterator[None]:
    with observed(chains, marker):
        marker.mark("begin")
        yield


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
    return Arithmetic(
        max(0.0, kept - dropped), _best(lambda: streams.unstep(stepped.state, x, x, rule, stepped.bits), device)
    )


def _best(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(3):
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, perf_counter() - start)
    return best
