"""What a converted model remembers of its conversion: the plan, its chains, and what else stands on its modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from revwire._errors import ConversionError
from revwire._forwards.checkpointed import CheckpointedForward
from revwire._forwards.first_call import FirstCall
from revwire._forwards.in_parts import PartedForward
from revwire._plan.costed import with_costs
from revwire._plan.plan import Plan
from revwire._runtime.chain import Chain
from revwire._surroundings.inventory import version_of

_STATE = "_revwire"


@dataclass
class Converted:
    """What a converted model remembers.

    Attributes:
        written: how often each of its parameters had been written to, by name, when it was converted; not known of a
            copy.
    """

    plan: Plan
    chains: list[Chain]
    checkpointed: list[CheckpointedForward] = field(default_factory=list)
    parted: list[Parted] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Copies have other tensors, of which nobody knows how often they were written to."""
        return {**vars(self), "written": {}}

    def present_plan(self) -> Plan:
        """The plan with the couplings and anchors that its chains have now."""
        return replace(self.plan, chains=tuple(map(with_costs, self.plan.chains, self.chains)))


@dataclass
class Parted:
    """A module whose core may run in parts, and the unit in whose branch it is: its chain, and its place in it."""

    forward: PartedForward
    chain: int
    place: int


def switch(checkpointed: Iterable[CheckpointedForward], *, on: bool) -> None:
    """Let modules outside of chains run under activation checkpointing, or as they were."""
    for forward in checkpointed:
        forward.on = on


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` is converted; not so while it waits for its first call."""
    return _STATE in vars(model)


def remember(model: nn.Module, state: Converted) -> None:
    """Let ``model`` know that it is converted."""
    state.written = _written(model)
    vars(model)[_STATE] = state


def was_trained(model: nn.Module) -> bool:
    """Whether the weights of a converted model were, as far as is known, trained as it runs now: its plan says so, or
    they have changed since.
    """
    state = converted(model)
    return state.plan.trained or state.written != _written(model)


def _written(model: nn.Module) -> dict[str, int]:
    return {name: version_of(p) for name, p in model.named_parameters()}


def forget(model: nn.Module) -> None:
    """Let ``model`` know that it is not converted any more."""
    del vars(model)[_STATE]


def converted(model: nn.Module) -> Converted:
    """What ``model`` remembers.

    Raises:
        ConversionError: it is not converted.
    """
    state = vars(model).get(_STATE)
    if state is None:
        waiting = isinstance(vars(model).get("forward"), FirstCall)
        got = "a model that waits for its first call to be converted" if waiting else "a model that is not converted"
        raise ConversionError(
            f"{type(model).__name__}: got {got}; expected one that convert() has rewired; "
            + ("call it once" if waiting else "call revwire.convert(model, example_inputs)")
        )
    return state  # type: ignore[no-any-return]


def chains_of(model: nn.Module) -> list[Chain]:
    """Its chains, in the order of the plan."""
    return converted(model).chains
