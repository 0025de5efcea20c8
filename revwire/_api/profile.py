"""`profile`: what a training step of a converted model costs, beside the same step with stored activations and with
checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revwire._api.report import report
from revwire._api.stored_activations import stored_activations
from revwire._capture.arguments import as_call
from revwire._errors import ConversionError
from revwire._forwards.install import take_all_off
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

REVWIRE, STORED, CHECKPOINT = "revwire", "stored activations", "checkpoint per block"


@dataclass(frozen=True)
class Cost:
    """What one variant of a training step costs.

    Attributes:
        saved_bytes: alive between forward and backward because of the forward pass, above the level at rest.
        peak_bytes: the most at any time of the step, above the level at rest, with ``.grad`` already allocated.
        seconds: wall clock of a whole step.
        time_ratio: seconds over those of stored activations, round by round.
    """

    saved_bytes: int
    peak_bytes: int
    seconds: Quartiles
    time_ratio: Quartiles


@dataclass(frozen=True)
class Profile:
    """Costs of one training step, by variant; ``str()`` is a table."""

    costs: dict[str, Cost]
    device: str
    repeats: int

    @property
    def revwire(self) -> Cost:
        """The converted model as it is."""
        return self.costs[REVWIRE]

    @property
    def stored(self) -> Cost:
        """The same function by ordinary autograd."""
        return self.costs[STORED]

    @property
    def checkpoint(self) -> Cost:
        """The original wiring, with `torch.utils.checkpoint` around each block that revwire rewired."""
        return self.costs[CHECKPOINT]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        head = ("training step", "saved MiB", "peak MiB", "seconds (quartiles)", "time ratio")
        rows = [head, *(_row(name, cost) for name, cost in self.costs.items())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"bytes above rest, .grad allocated; {self.repeats} paired rounds on {self.device}"])


def _row(name: str, cost: Cost) -> tuple[str, ...]:
    s = cost.seconds
    return (
        name,
        f"{cost.saved_bytes / MIB:.1f}",
        f"{cost.peak_bytes / MIB:.1f}",
        f"{s.median:.3f} ({s.low:.3f}-{s.high:.3f})",
        f"{cost.time_ratio.median:.2f}",
    )


def profile(model: nn.Module, example_inputs: Any, *, repeats: int = 3, loss: Loss | None = None) -> Profile:
    """Measure a training step of a converted model: revwire, stored activations, and checkpointing per block.

    The model is measured in the mode it is in (``train()`` or ``eval()``), on the device it is on, and is left as it
    was: weights, buffers, ``.grad`` and random state.

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
    criterion = loss or mean_square
    original = _checkpointed_twin(model)
    call = as_call(example_inputs)
    leaves = own_leaves((call.args, call.kwargs))

    def forward(net: nn.Module) -> Tensor:
        with entered():
            return criterion(run_model(net, leaves))

    forwards: dict[str, Callable[[], Tensor]] = {
        REVWIRE: lambda: forward(model),
        STORED: lambda: _stored(model, lambda: forward(model)),
        CHECKPOINT: lambda: forward(original),
    }
    steps = {name: partial(_step, run) for name, run in forwards.items()}
    device = device_of(model, leaves)
    with ExitStack() as stack:
        for net in (model, original):  # they share weights and buffers, each in tables of its own
            stack.enter_context(left_as_found(net, leaves, backward=True))
        allocate_gradients(model)
        entered = stack.enter_context(autocast_left(device))
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
        saved = {name: saved_bytes(run, device) for name, run in forwards.items()}
        timings = paired_seconds(steps, repeats, device)
    costs = {n: Cost(saved[n], peaks[n], timings.seconds(n), timings.ratio(n, STORED)) for n in steps}
    return Profile(costs, str(device), repeats)


def _step(forward: Callable[[], Tensor]) -> None:
    forward().backward()  # type: ignore[no-untyped-call]


def _stored(model: nn.Module, forward: Callable[[], Tensor]) -> Tensor:
    with stored_activations(model):
        return forward()


def _checkpointed_twin(model: nn.Module) -> nn.Module:
    """The original wiring on the very same weights and buffers, each rewired host checkpointed.

    Where a host holds other hosts, the inner ones are the blocks.
    """
    hosts = report(model).hosts
    tensors: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, tensors)
    take_all_off(twin)
    for path in hosts:
        if not any(other != path and other.startswith(f"{path}." if path else "") for other in hosts):
            host = twin.get_submodule(path)
            host.forward = partial(checkpoint, host.forward, use_reentrant=False)
    for path in report(model).checkpointed:
        module = twin.get_submodule(path)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return twin
