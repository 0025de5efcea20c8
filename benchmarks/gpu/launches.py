"""Launches and waits per unit: what PyTorch's profiler sees on the device, beside what is counted on a CPU.

python -m benchmarks.gpu.launches     # the counts alone, as JSON; on the CPU, in the environment of `counting`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import revwire
from benchmarks.gpu.counting import INTERPRETED, work_of
from benchmarks.gpu.subjects import LOW, Setting
from benchmarks.harness.record import Row

DEPTHS = 3, 5
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""What the profiler calls the host's waits. (It makes one of its own, for the whole device, at its end.)"""

BLOCKS = "stored activations"
METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    BLOCKS: lambda model, x: model,
    "checkpointing": lambda model, x: revwire.rival(model, x).model,
    **{
        f"revwire {coupling}": lambda model, x, coupling=coupling: revwire.convert(
            model, x, coupling=coupling, rewire="everywhere"
        )
        for coupling in ("re2tal", "bdia:1/16")
    },
}

Seen = tuple[int, int]
"""Launches and waits of a step."""


class Block(nn.Module):
    """x + mlp(norm(x)): one unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def steps(method: str, device: torch.device, width: int) -> Iterator[Callable[[], None]]:
    """A training step of each of the two depths, under bfloat16 autocast."""
    for depth in DEPTHS:
        torch.manual_seed(0)
        x = torch.randn(4, 8, width, device=device, requires_grad=True)
        blocks = nn.Sequential(*(Block(width) for _ in range(depth))).to(device)
        with torch.autocast(device.type, LOW):
            model = METHODS[method](blocks, x)

        def run(model: nn.Module = model, x: Tensor = x) -> None:
            with torch.autocast(x.device.type, LOW):
                loss = model(x).float().sum()
            loss.backward()

        yield run


def per_unit(few: Seen, many: Seen) -> Row:
    """What one unit more takes, and the waits of the larger step."""
    units = DEPTHS[1] - DEPTHS[0]
    launches, waits = ((b - a) / units for a, b in zip(few, many, strict=True))
    return {"launches_per_unit": launches, "waits_per_unit": waits, "waits_per_step": many[1]}


def counts(width: int = 16) -> dict[str, Row]:
    """By method, as counted on the CPU."""
    found = {}
    for method in METHODS:
        work = [work_of(run) for run in steps(method, torch.device("cpu"), width)]
        found[method] = per_unit(*((len(w), sum(one.waits for one in w)) for w in work))
    return found


def seen(run: Callable[[], None]) -> Seen:
    """Launches and waits of a step on a CUDA device, after two that are not looked at."""
    run()
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
    events = profiler.events()
    launches = sum(e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False) for e in events)
    return launches, sum(e.device_type == DeviceType.CPU and e.name in WAITS for e in events)


def rows(setting: Setting, done: set[str]) -> Iterator[Row]:
    """A row per method; what the profiler sees is null on a CPU, where nothing is launched."""
    counted = _counts_of_another_process()
    for method in METHODS:
        row: Row = {"case": method, "counted": counted[method], "profiled": None, "reason": None}
        if setting.device.type == "cuda":
            row["profiled"] = per_unit(*map(seen, steps(method, setting.device, 256)))
        else:
            for run in steps(method, setting.device, 16):
                run()
            row["reason"] = "nothing is launched on a CPU"
        yield row


def _counts_of_another_process() -> dict[str, Row]:
    """Triton must find its variable when it is imported.

    Raises:
        RuntimeError: the process failed; says what it printed last.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.launches"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **INTERPRETED, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"counting on the CPU failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(counts()))
