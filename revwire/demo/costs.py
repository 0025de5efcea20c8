"""What training steps cost that do the same in different ways: peak bytes, and seconds in turns."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

import revwire
from revwire.measure import Quartiles, paired_seconds, peak_bytes

STORED, REVWIRE = "stored activations", "revwire"

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cost:
    """One way to run a training step.

    Attributes:
        name: of the way.
        peak: bytes at the peak of a step, above weights, ``.grad`` and inputs.
        seconds: of a step.
        ratio: seconds over those of checkpointing, round by round.
    """

    name: str
    peak: int
    seconds: Quartiles
    ratio: Quartiles


def without_revwire(model: nn.Module, inputs: Inputs) -> dict[str, nn.Module]:
    """The two ways to train ``model`` without revwire: as it is, and under the checkpointing that one would pick."""
    rival = revwire.rival(model, inputs)
    return {STORED: copy.deepcopy(model), rival.name: rival.model}


def training_step(model: nn.Module, inputs: Inputs) -> None:
    """Forward and backward, with the mean square of what the model gives as its loss."""
    model(*inputs).square().mean().backward()


def costs(ways: Mapping[str, nn.Module], inputs: Inputs, rounds: int) -> list[Cost]:
    """Measure one step of each of these networks; the second of them is the one under checkpointing.

    Args:
        ways: networks with tensors as results, by name.
        inputs: what each of them is called with.
        rounds: rounds in which the steps take turns, and are timed.
    """
    steps = {name: partial(training_step, model.train(), inputs) for name, model in ways.items()}
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    timings = paired_seconds(steps, rounds)
    rival = list(ways)[1]
    return [Cost(name, peaks[name], timings.seconds(name), timings.ratio(name, rival)) for name in ways]


def verdict(table: list[Cost]) -> list[str]:
    """What each way with revwire gains over checkpointing, in words, from what was measured."""
    rival = table[1]
    return [_verdict(cost, cost.peak / rival.peak) for cost in table[2:]]


def _verdict(cost: Cost, share: float) -> str:
    seconds = f"{cost.ratio.median:.2f} of its seconds"
    if share < 0.97 or (share > 1.03 and cost.ratio.median < 1):  # less memory, or more of it for less time
        return f"{cost.name}: {share:.2f} of checkpointing's peak, in {seconds}"
    return f"{cost.name} gains nothing here, use checkpointing ({share:.2f} of its peak, in {seconds})"
