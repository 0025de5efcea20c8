"""The one trace of bytes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.autograd import profiler

_NAME = "revwire mark "


Step = Callable[[], object]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Trace:
    """Bytes above rest: the most at any time, and those still held at the end, while the step's result lives."""

    peak: int
    held: int

    @classmethod
    def of(cls, step: Step, device: torch.device) -> _Trace:
        gc.collect()
        return cls._cuda(step, device) if device.type == "cuda" else cls._cpu(step)

    @classmethod
    def _cuda(cls, step: Step, device: torch.device) -> _Trace:
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device)
        result = step()
        _synchronize(device)
        held = torch.cuda.memory_allocated(device) - rest
        del result
        return cls(torch.cuda.max_memory_allocated(device) - rest, held)

    @classmethod
    def _cpu(cls, step: Step) -> _Trace:
        """See Note [Bytes on the CPU] in `revwire.measure`."""
        trace: Any = profiler.profile(profile_memory=True)
        with _standard_error_closed():
            trace.__enter__()
        try:
            result = step()
        finally:
            with _standard_error_closed():
                trace.__exit__(None, None, None)
        events = trace.kineto_results.events()
        levels = list(accumulate((e.nbytes() for e in events if e.name() == "[memory]"), initial=0))
        del result
        return cls(max(levels), levels[-1])


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
