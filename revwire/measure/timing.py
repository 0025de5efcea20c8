"""Seconds of variants of a step that take turns, and their quartiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter

import torch

from revwire.measure._trace import synchronize


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile of a sample."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, sample: list[float]) -> Quartiles:
        """The quartiles of a sample of one or more numbers (inclusive method)."""
        return cls(*quantiles(sample, n=4, method="inclusive")) if len(sample) > 1 else cls(*sample * 3)


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds per round of variants that took turns; ``samples[name][i]`` belongs to round i."""

    samples: Mapping[str, tuple[float, ...]]

    def seconds(self, name: str) -> Quartiles:
        """Quartiles of one variant's seconds."""
        return Quartiles.of(list(self.samples[name]))

    def ratio(self, name: str, over: str) -> Quartiles:
        """Quartiles of the ratios within each round: what the machine does to a round, it does to both."""
        return Quartiles.of([a / b for a, b in zip(self.samples[name], self.samples[over], strict=True)])


def paired_seconds(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device | str = "cpu"
) -> Timings:
    """Time the variants turn by turn, ``repeats`` rounds after one that is not counted.

    Each round starts with another variant, so that none always runs first.
    """
    names, device = list(variants), torch.device(device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = seconds_of(variants[name], device)
            if turn >= 0:
                samples[name].append(seconds)
    return Timings({name: tuple(sample) for name, sample in samples.items()})


def seconds_of(step: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one run, until the device has done all of it."""
    synchronize(device)
    start = perf_counter()
    step()
    synchronize(device)
    return perf_counter() - start
