"""`profile`: what a training step of a converted model costs, beside the original network: with stored activations, and
under the checkpointing that a user would pick.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from revwire._api.rival import EVERY_BLOCK, Rival, original, rival
from revwire._api.stored_activations import stored_activations
from revwire._budget.progress import Progress
from revwire._capture.arguments import as_call
from revwire._errors import ConversionError
from revwire._forwards.converted import converted
from revwire._surroundings.as_found import left_as_found
from revwire.measure import Quartiles, paired_seconds, peak_bytes, saved_bytes
from revwire.measure._training_step import (
    Loss,
    allocate_gradients,
    autocast_left,
    device_of,
    mean_square,
    own_leaves,
    run_model,
)
from revwire.measure.sizes import MIB

ORIGINAL, REVWIRE, STORED = "original", "revwire", "revwire, stored"


@dataclass(frozen=True)
class Cost:
    """What one variant of a training step costs.

    Attributes:
        saved_bytes: alive between forward and backward because of the forward pass, above the level at rest.
        peak_bytes: the most at any time of the step, above the level at rest, with ``.grad`` already allocated.
        seconds: wall clock of a whole step.
        time_ratio: seconds over those of the original network, round by round.
    """

    saved_bytes: int
    peak_bytes: int
    seconds: Quartiles
    time_ratio: Quartiles


@dataclass(frozen=True)
class Profile:
    """Costs of one training step, by variant; ``str()`` is a table.

    Attributes:
        costs: by the name of the variant; None where it failed.
        device: where the step ran.
        repeats: how many rounds were timed.
        rival: the name of the variant under checkpointing, which says how: ``"checkpoint (own switch)"`` or
            ``"checkpoint every block"``.
        reasons: why variants of the original network failed, by name.
    """

    costs: dict[str, Cost | None]
    device: str
    repeats: int
    rival: str = EVERY_BLOCK
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def revwire(self) -> Cost:
        """The converted model as it is."""
        return self._sure(REVWIRE)

    @property
    def stored(self) -> Cost:
        """The same function by ordinary autograd."""
        return self._sure(STORED)

    @property
    def original(self) -> Cost | None:
        """The original network, with stored activations."""
        return self.costs[ORIGINAL]

    @property
    def checkpoint(self) -> Cost | None:
        """The original network under checkpointing: by its own switch, or else of every block. See `rival`."""
        return self.costs[self.rival]

    def _sure(self, name: str) -> Cost:
        cost = self.costs[name]
        assert cost is not None
        return cost

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("training step", "saved MiB", "peak MiB", "seconds (quartiles)", "time ratio")
        rows = [head, *(_row(name, cost) for name, cost in self.costs.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"{name} failed: {reason}" for name, reason in self.reasons.items()]
        return "\n".join([*lines, f"bytes above rest, .grad allocated; {self.repeats} paired rounds on {self.device}"])


def _row(name: str, cost: Cost | None) -> tuple[str, ...]:
    if cost is None:
        return (name, *["–"] * 4)
    s = cost.seconds
    return (
        name,
        f"{cost.saved_bytes / MIB:.1f}",
        f"{cost.peak_bytes / MIB:.1f}",
        f"{s.median:.3f} ({s.low:.3f}-{s.high:.3f})",
        f"{cost.time_ratio.median:.2f}",
    )


def profile(model: nn.Module, example_inputs: Any, *, repeats: int = 3, loss: Loss | None = None) -> Profile:
    """Measure a training step of a converted model, as it is and with stored activations; and of the original network,
    with stored activations and under the checkpointing that a user would pick (see `rival`).

    The model is measured in the mode it is in (``train()`` or ``eval()``), on the device it is on, and is left as it
    was: weights, buffers, ``.grad`` and random state. The original network is measured on a copy that shares its
    weights; where that cannot be made, or fails, its costs are None, and the profile says why.

    Args:
        model: a converted model.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
        repeats: rounds that are timed. Bytes do not vary, and are measured once.
        loss: output of the model → scalar; by default the mean square over all floating-point tensors in the output.

    Raises:
        ConversionError: the model is not converted, or ``repeats`` is no number of rounds.

    Example:
        >>> model = revwire.convert(network, images)     # doctest: +SKIP
        >>> print(revwire.profile(model, images))        # doctest: +SKIP
    """
    if type(repeats) is not int or repeats < 1:
        raise ConversionError(f"profile: got repeats={repeats!r}; expected a number of rounds from 1")
    converted(model)
    criterion = loss or mean_square
    call = as_call(example_inputs)
    leaves = own_leaves((call.args, call.kwargs))
    reasons: dict[str, str] = {}
    plain = _tried(ORIGINAL, reasons, lambda: original(model))
    other = _tried(EVERY_BLOCK, reasons, lambda: rival(model, example_inputs)) or Rival(model, EVERY_BLOCK)

    def forward(net: nn.Module) -> Tensor:
        with entered():
            return criterion(run_model(net, leaves))

    forwards: dict[str, Callable[[], Tensor]] = {
        ORIGINAL: lambda: forward(plain or model),
        other.name: lambda: forward(other.model),
        REVWIRE: lambda: forward(model),
        STORED: lambda: _stored(model, lambda: forward(model)),
    }
    device = device_of(model, leaves)
    found: dict[str, tuple[int, int] | None] = dict.fromkeys(forwards)
    with ExitStack() as stack, Progress(len(forwards) * (repeats + 2), "measuring run") as progress:
        for net in (plain, other.model, model):  # they share weights and buffers, each in tables of its own
            stack.enter_context(left_as_found(net or model, leaves, backward=True))
        allocate_gradients(model)
        entered = stack.enter_context(autocast_left(device))
        for name in (n for n in forwards if n not in reasons):
            progress.advance()
            measure = partial(_bytes, forwards[name], device)
            found[name] = measure() if name in (REVWIRE, STORED) else _tried(name, reasons, measure)
        steps = {name: progress.counting(partial(_step, forwards[name])) for name, sizes in found.items() if sizes}
        timings = paired_seconds(steps, repeats, device)
    over = ORIGINAL if found[ORIGINAL] else STORED
    costs = {
        name: sizes and Cost(*sizes, timings.seconds(name), timings.ratio(name, over)) for name, sizes in found.items()
    }
    return Profile(costs, str(device), repeats, other.name, reasons)


T = TypeVar("T")


def _tried(name: str, reasons: dict[str, str], make: Callable[[], T]) -> T | None:
    """What is made; where that fails, None, and the reason is noted."""
    try:
        return make()
    except Exception as error:  # noqa: BLE001 - whatever it is: a profile says what the rewired model costs
        reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return None


def _bytes(forward: Callable[[], Tensor], device: torch.device) -> tuple[int, int]:
    """Saved and peak bytes."""
    peak = peak_bytes(partial(_step, forward), device)
    return saved_bytes(forward, device), peak


def _step(forward: Callable[[], Tensor]) -> None:
    forward().backward()  # type: ignore[no-untyped-call]


def _stored(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    with stored_activations(model):
        return forward()
