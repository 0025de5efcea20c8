"""Measuring a training step: peak bytes, saved bytes, seconds.

Note [Bytes on the CPU]
    The CPU allocator keeps no statistics, but it reports each allocation and each release to PyTorch's profiler. Their
    running sum is exact and repeatable to the byte, for what goes through PyTorch's allocator (scratch memory inside a
    maths library does not). Blocks that were allocated before the trace began are released in it without a report, so
    all figures count from the level at rest. On CUDA the caching allocator's own statistics give the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter

import torch
from torch import Tensor

from revwire._streams.base import stream_dtype
from revwire._streams.fixed import FixedStreams
from revwire.couplings.base import Coupling
from revwire.measure._memory_trace import Step, _synchronize, _Trace


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


def peak_bytes(step: Step, device: torch.device | str = "cpu") -> int:
    """The most memory that ``step`` holds at once, in bytes above the level at which it starts.

    ``step`` runs twice. The first run allocates what stays (gradients, caches), and is not measured.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000).exp())
        8000
    """
    step()
    return _Trace.of(step, torch.device(device)).peak


def saved_bytes(forward: Step, device: torch.device | str = "cpu") -> int:
    """What a forward pass leaves alive for as long as its result is: the result, and all that its graph saves, in
    bytes.

    ``forward`` runs twice, as in `peak_bytes`. Tensors that were there before (weights, inputs) cost nothing.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> saved_bytes(lambda: x.exp())
        4000
    """
    forward()
    return _Trace.of(forward, torch.device(device)).held


def paired_seconds(variants: Mapping[str, Step], repeats: int, device: torch.device | str = "cpu") -> Timings:
    """Time the variants turn by turn, ``repeats`` rounds after one that is not counted.

    Each round starts with another variant, so that none always runs first.
    """
    names, device = list(variants), torch.device(device)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds = _seconds(variants[name], device)
            if turn >= 0:
                samples[name].append(seconds)
    return Timings({name: tuple(sample) for name, sample in samples.items()})


def arithmetic_seconds(coupling: Coupling, x: Tensor, calls: int = 2000) -> tuple[float, float]:
    """Seconds that a coupling's fixed-point arithmetic takes for one unit on states of the shape of ``x``: (forward,
    backward).

    Forward is one step of the streams, backward the value of a state and one step back. The fastest of five runs of
    ``calls`` calls.

    Args:
        coupling: one that has an exact form.
        x: a float tensor, of any shape and device.

    Example:
        >>> from revwire import Re2TAL
        >>> forward, backward = arithmetic_seconds(Re2TAL(), torch.randn(8, 8), calls=10)
        >>> forward > 0 and backward > 0
        True
    """
    x = x.detach()
    streams = FixedStreams.for_range(8.0, stream_dtype(x.dtype))
    state, f = streams.enter(x.to(stream_dtype(x.dtype))), torch.zeros_like(x)
    value = streams.read(state)
    rule = coupling.rule("residual", state)
    done = streams.step(state, value, f, rule)

    def back() -> None:
        streams.unstep(done.state, streams.read(state), f, rule, done.bits)

    return _fastest(lambda: streams.step(state, value, f, rule), calls, x.device), _fastest(back, calls, x.device)


def _fastest(call: Step, calls: int, device: torch.device) -> float:
    def run() -> None:
        for _ in range(calls):
            call()

    return min(_seconds(run, device) for _ in range(5)) / calls


def _seconds(step: Step, device: torch.device) -> float:
    _synchronize(device)
    start = perf_counter()
    step()
    _synchronize(device)
    return perf_counter() - start
