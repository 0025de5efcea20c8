"""What a step holds on a device, and what a row says of an error."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from benchmarks.harness.record import Row
from revwire.measure import peak_bytes


def first_line(error: BaseException) -> str:
    """What a row says of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:240]


def peaks(run: Callable[[], object], device: torch.device, *, warm: bool = False) -> Row:
    """The most bytes of a step above rest: those allocated, and those that the allocator had to reserve for them (null
    on a CPU, whose allocator has no pool). What stays (gradients) is allocated by a step before, or there if ``warm``.
    """
    if device.type != "cuda":
        return {"peak_bytes": peak_bytes(run, device), "reserved_bytes": None}
    if not warm:
        run()
    settled(device)
    torch.cuda.reset_peak_memory_stats(device)
    rest = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - rest,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) - rest,
    }


def settled(device: torch.device) -> None:
    """Garbage is collected, and the allocator's pool given back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
