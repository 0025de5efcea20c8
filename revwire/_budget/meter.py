"""Measure a training step piece by piece: what is alive, and how long it takes, from one mark in the chains to the
next.

Note [Marks]
    A chain tells its observer where each unit begins and ends in the forward pass, and when a state has been rebuilt; a
    hook on each unit's output tells when its gradient arrives. Between two marks lies a *stretch*. On the
    CPU the marks stand among the allocator's own reports in one trace (see `revwire.measure`); on CUDA the caching
    allocator is asked at each mark. The clock is read in the same step: a trace of memory sees no operators, and slows
    all stretches down by little. A step in which something is made once (programs, caches) runs twice: bytes are those
    of the second, seconds the lesser of both, as what disturbs a machine only ever adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from time import perf_counter

import torch

from revwire._budget.marker import Marker, Operands
from revwire._budget.measured import Arithmetic, Measured, Run, Stretch
from revwire._runtime.chain import Chain, observed
from revwire._runtime.unit import Mode
from revwire.measure._trace import synchronize, traced

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
    modes: Sequence[Modes | None] | None = None,
    *,
    fresh: bool = True,
) -> Measured:
    """Run ``step`` (forward and backward) a few times with every unit reversible, or in these modes, and measure its
    stretches.

    ``step`` leaves nothing behind that was not there after it had run once, as it has unless it is ``fresh``.
    """
    found = [chain.modes for chain in chains]
    try:
        for chain, mine in zip(chains, modes or [None] * len(chains), strict=True):
            chain.modes = mine
        first = _stretches(chains, step, device)
        stretches, marker = _alike(chains, step, device, first[0]) if fresh else first
        timed = _arithmetic(marker.samples.values(), device)
    finally:
        for chain, modes_before in zip(chains, found, strict=True):
            chain.modes = modes_before
    runs = (_run(marker, i, timed[marker.samples[place]]) for i, place in enumerate(marker.places))
    return Measured(tuple(runs), tuple(stretches))


def _alike(
    chains: Sequence[Chain], step: Callable[[], None], device: torch.device, before: list[Stretch]
) -> tuple[list[Stretch], Marker]:
    """A step with the same marks as the one before it, tried a few times."""
    for _ in range(_TRIES):
        found, marker = _stretches(chains, step, device)
        if [s.mark for s in found] == [s.mark for s in before]:
            return [s._replace(seconds=min(s.seconds, b.seconds)) for s, b in zip(found, before, strict=True)], marker
        before = found
    raise Unsteady


def _run(marker: Marker, run: int, arithmetic: Arithmetic) -> Run:
    """What a marker has found out about a run. What was never rebuilt was stored already."""
    rebuilt = run in marker.rebuilt
    lasting = marker.lasting.get(run, 0)
    return Run(
        marker.places[run],
        arithmetic,
        saved=sum(seen.size for seen in marker.seen.get(run, ())) if rebuilt else 0,
        rebuilt=marker.rebuilt.get(run, 0),
        held=marker.held.get(run, 0),
        glances=marker.looks.get(run, 0),
        result=marker.results.get(run, 0),
        early=max(marker.early.get(run, 0), lasting),
        lasting=lasting,
        saves_state=bool(marker.saves_state.get(run)),
    )


@contextmanager
def _marked(chains: Sequence[Chain], marker: Marker) -> Iterator[None]:
    with observed(chains, marker):
        marker.mark("begin")
        yield


def _stretches(chains: Sequence[Chain], step: Callable[[], None], device: torch.device) -> tuple[list[Stretch], Marker]:
    """Those of a step; and the marker that told where they begin."""
    markers: list[Marker] = []
    times: list[float] = []

    def marked(mark: Callable[[], None]) -> None:
        def note() -> None:
            synchronize(device)
            times.append(perf_counter())
            mark()

        markers.append(Marker(chains, note))
        with _marked(chains, markers[0]):
            step()
        synchronize(device)
        times.append(perf_counter())

    _, *levels = traced(marked, device, thorough=False)  # before the first mark nothing happens
    stretches = zip(markers[0].marks, levels, pairwise(times), strict=True)
    return [Stretch(mark, at.begin, at.peak, b - a) for mark, at, (a, b) in stretches], markers[0]


def _arithmetic(samples: Iterable[Operands], device: torch.device) -> dict[Operands, Arithmetic]:
    """Time the steps of units, forwards and backwards, on states of the same shape."""
    return {sample: _timed(sample, device) for sample in set(samples)}


def _timed(sample: Operands, device: torch.device) -> Arithmetic:
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
        synchronize(device)
        best = min(best, perf_counter() - start)
    return best
