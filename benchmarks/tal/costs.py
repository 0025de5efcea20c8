"""Peak bytes and seconds of a training step, variants of one configuration taking turns, on clips of noise: no data is
needed.

The bytes are those of forward and backward above rest, ``.grad`` allocated (`revwire.measure`); weights, gradients and
optimizer are the same in all variants. What does not fit is recorded as null, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from benchmarks.harness.record import Row
from benchmarks.tal import networks
from benchmarks.tal.clips import Batch
from benchmarks.tal.sampling import Timing
from benchmarks.tal.schema import Config
from revwire.measure import paired_seconds, peak_bytes

STORED = "stored"
_MOST = 2**16


def device(config: Config) -> torch.device:
    """Where a run of the configuration computes."""
    return torch.device("cuda" if torch.cuda.is_available() and config.training.accelerator != "cpu" else "cpu")


def noise(config: Config, batch: int, device: torch.device) -> Batch:
    """A batch of clips as the configuration cuts them: noise, each with two actions."""
    s, generator = config.sampling, torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (batch, 3, s.frames, s.crop, s.crop), dtype=torch.uint8, generator=generator)
    spans = torch.tensor([[0.1, 0.3], [0.5, 0.9]]) * s.steps
    timing = Timing(25.0, 1.0, 0.0, s.steps / 25.0)
    labels = torch.zeros(2, dtype=torch.long)
    mask = torch.ones(batch, s.steps, dtype=torch.bool)
    found = Batch(("noise",) * batch, frames, mask, (spans,) * batch, (labels,) * batch, (timing,) * batch)
    return found.to(device)


def network(config: Config, classes: int, device: torch.device) -> nn.Module:
    """The network of a variant, with random weights, in training mode."""
    torch.manual_seed(0)
    plain = replace(config, backbone=replace(config.backbone, weights=None))
    made = networks.build(plain, classes, networks.NOWHERE).to(device)
    networks.observe(made, config)
    return made.train()


def step(model: nn.Module, batch: Batch, precision: str) -> Callable[[], None]:
    """Forward and backward; gradients accumulate, so that ``.grad`` stays allocated."""
    low = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    device = batch.mask.device.type

    def run() -> None:
        with torch.autocast(device, dtype=low, enabled=low is not None):
            losses = model(batch)
        torch.stack(list(losses.values())).sum().backward()

    return run


def measured(variants: dict[str, Config], *, classes: int, batch: int, rounds: int, device: torch.device) -> list[Row]:
    """One row per variant: ``peak_bytes``, ``seconds`` (quartiles) and ``to_stored`` (quartiles of ratios within a
    round, or null).
    """
    steps: dict[str, Callable[[], None]] = {}
    rows: dict[str, Row] = {}
    for name, config in variants.items():
        rows[name] = {"memory": name, "frames": config.sampling.frames, "batch": batch}
        rows[name] |= {"peak_bytes": None, "seconds": None, "to_stored": None}
        try:
            steps[name] = step(
                network(config, classes, device), noise(config, batch, device), config.training.precision
            )
            rows[name]["peak_bytes"] = peak_bytes(steps[name], device)
        except (torch.OutOfMemoryError, MemoryError) as error:
            steps.pop(name, None)
            rows[name]["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if rounds and steps:
        timings = paired_seconds(steps, rounds, device)
        for name in steps:
            rows[name]["seconds"] = asdict(timings.seconds(name))
            rows[name]["to_stored"] = asdict(timings.ratio(name, STORED)) if STORED in steps else None
    return list(rows.values())


def by_frames(
    config: Config, memories: Sequence[str], frames: Iterable[int], batches: Iterable[int], *, classes: int, rounds: int
) -> list[Row]:
    """`measured` for each number of frames and each batch; steps and the localizer's length grow with the frames."""
    rows: list[Row] = []
    for batch in batches:
        for count in frames:
            variants = {memory: replace(longer(config, count), memory=memory) for memory in memories}
            rows += measured(variants, classes=classes, batch=batch, rounds=rounds, device=device(config))
    return rows


def largest(config: Config, memory: str, batch: int, start: int, *, classes: int) -> Row:
    """The most frames of which a training step fits, to within ``start``: doubled until one does not, then halved in
    between.

    Where every number fits (on a CPU, say), it ends at 2^16 frames, and the reason says so.
    """

    def fits(frames: int) -> bool:
        variant = {memory: replace(longer(config, frames), memory=memory)}
        return (
            measured(variant, classes=classes, batch=batch, rounds=0, device=device(config))[0]["peak_bytes"]
            is not None
        )

    low, high = 0, start
    while high <= _MOST and fits(high):
        low, high = high, 2 * high
    reason = f"no limit was met up to {low} frames" if high > _MOST else None
    while high <= _MOST and high - low > start:
        middle = (low + high) // (2 * start) * start
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"memory": memory, "batch": batch, "largest_frames": low, "within": start, "reason": reason}


def longer(config: Config, frames: int) -> Config:
    """The configuration for clips of so many frames."""
    steps = max(1, frames * config.sampling.steps // config.sampling.frames)
    head: dict[str, Any] = {config.localizer: {**getattr(config, config.localizer), "max_steps": steps}}
    return replace(config, sampling=replace(config.sampling, frames=frames, steps=steps), **head)
