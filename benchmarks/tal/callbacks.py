"""What is kept beside the weights while a run goes on: their average, and what a step costs."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

_MIB = 2**20


class Average(Callback):
    """Exponential moving average of the weights, which stands in for them while testing.

    The decay grows from 0 as (1 + t) / (10 + t), so that the first weights are forgotten.

    Args:
        decay: the largest.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Once per optimizer step."""
        if trainer.global_step <= self.updates:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates = trainer.global_step
        with torch.no_grad():
            for name, value in _averaged(pl_module):
                mean = self.average.get(name)
                self.average[name] = (
                    value.detach().clone() if mean is None else mean.to(value.device).lerp_(value, 1 - decay)
                )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average in."""
        self.kept = {name: value.detach().clone() for name, value in _averaged(pl_module) if name in self.average}
        _write(pl_module, self.average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        _write(pl_module, self.kept)
        self.kept = {}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates, self.average = state_dict["updates"], dict(state_dict["average"])


def _averaged(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


@torch.no_grad()
def _write(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])


class Cost(Callback):
    """Seconds and peak memory of each step: on CUDA the most that was allocated, on the CPU the most that the process
    was resident.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read it."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds, peak = time.perf_counter() - self._start, memory(pl_module.device)
        self.seconds.append(seconds)
        self.peak = max(self.peak, peak)
        pl_module.log_dict({"cost/seconds": seconds, "cost/memory_mib": peak / _MIB}, batch_size=1)

    def median(self) -> float | None:
        """Seconds of a step, without the first, which also sets things up."""
        return statistics.median(self.seconds[1:] or self.seconds) if self.seconds else None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.peak = list(state_dict["seconds"]), state_dict["peak"]


def memory(device: torch.device) -> int:
    """Bytes: the peak since it was last reset on CUDA, the process's largest resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
