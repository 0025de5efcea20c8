"""The one trace of memory: what is alive during a step, from one mark in it to the next.

Note [Bytes on the CPU]
    The CPU allocator keeps no statistics, but it reports each allocation and each release to PyTorch's profiler. Their
    running sum is exact and repeatable to the byte, for what goes through PyTorch's allocator (scratch memory inside a
    maths library does not). Blocks that were allocated before the trace began are released in it without a report, so
    all figures count from the level at rest. On accelerators the caching allocator's own statistics give the same, of
    the device that is named: bytes that are allocated. It reserves more, as freed blocks do not fit what comes next.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch.autograd import profiler

from revwire._errors import RevwireError
from revwire._torch import begin_memory_trace, end_of_memory_trace

_MARK = "revwire mark"


class Bytes(NamedTuple):
    """Bytes alive above rest between two marks: at the first, at most, and at the second."""

    begin: int
    peak: int
    end: int


Mark = Callable[[], None]
"""Begins another stretch of the trace."""


def traced(step: Callable[[Mark], object], device: torch.device, *, thorough: bool = True) -> list[Bytes]:
    """Those before the first mark that ``step`` makes, and after each; at the end its result is still alive.

    Garbage is collected before, and not during the step: when the collector runs is chance, and what it finds may be of
    an earlier step. On the CPU what is old may be passed over (unless ``thorough``), which in a large process takes as
    long as some steps do.
    """
    gc.collect(2 if thorough or device.type != "cpu" else 1)
    with _no_collector():
        return _on_cpu(step) if device.type == "cpu" else _on_accelerator(step, device)


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def keeps_peak(device: torch.device) -> bool:
    """Whether the most bytes alive during a stretch can be told there: not on MPS, whose allocator keeps no such
    statistic.
    """
    return device.type == "cpu" or hasattr(torch.get_device_module(device), "reset_peak_memory_stats")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _on_accelerator(step: Callable[[Mark], object], device: torch.device) -> list[Bytes]:
    if not keeps_peak(device):
        raise RevwireError(
            f"peak of a step: got a model on {device}, whose allocator tells no peak; expected a CPU, CUDA or XPU; "
            "measure and plan on the CPU (plan.save, Plan.load), or convert without memory_budget"
        )
    statistics = torch.get_device_module(device)
    synchronize(device)
    statistics.reset_peak_memory_stats(device)
    rest = begin = statistics.memory_allocated(device)
    found: list[Bytes] = []

    def mark() -> None:
        nonlocal begin
        now = statistics.memory_allocated(device)
        found.append(Bytes(begin - rest, statistics.max_memory_allocated(device) - rest, now - rest))
        statistics.reset_peak_memory_stats(device)
        begin = now

    result = step(mark)
    synchronize(device)
    mark()
    del result
    return found


def _on_cpu(step: Callable[[Mark], object]) -> list[Bytes]:
    """See Note [Bytes on the CPU]."""

    def mark() -> None:
        with profiler.record_function(_MARK):
            pass

    with _standard_error_closed():
        begin_memory_trace()
    try:
        result = step(mark)
    finally:
        with _standard_error_closed():
            seen = end_of_memory_trace()
    found = [Bytes(0, 0, 0)]
    for event in seen.events():
        name = event.name()
        begin, peak, alive = found[-1]
        if name == "[memory]":
            alive += event.nbytes()
            found[-1] = Bytes(begin, max(peak, alive), alive)
        elif name == _MARK:
            found.append(Bytes(alive, alive, alive))
    del result
    return found


@contextmanager
def _standard_error_closed() -> Iterator[None]:
    """The profiler's C++ side writes log lines to file descriptor 2 when it starts and stops, at any log level."""
    try:
        kept = os.dup(2)
    except OSError:  # a process without standard error has nothing to close
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        with suppress(OSError):
            os.close(kept)
            os.close(sink)
