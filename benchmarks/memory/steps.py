"""A training step, and the steps of several models that take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from rich.progress import Progress
from torch import Tensor, nn

from revwire.measure import Timings, paired_seconds

Around = Callable[[], AbstractContextManager[Any]]


def step(model: nn.Module, example: Tensor, around: Around = nullcontext) -> None:
    """Forward (in the context ``around``) and backward of a mean-square loss; gradients accumulate, so ``.grad`` stays
    allocated.
    """
    with around():
        loss = model(example).float().square().mean()
    loss.backward()


def in_turn(models: Mapping[str, nn.Module], example: Tensor, rounds: int, around: Around = nullcontext) -> Timings:
    """Seconds of a `step` of each model, under a progress bar."""
    with Progress() as progress:
        bar = progress.add_task("steps", total=(rounds + 1) * len(models))

        def counted(name: str) -> None:
            step(models[name], example, around)
            progress.advance(bar)

        return paired_seconds({name: partial(counted, name) for name in models}, rounds)
