"""The wirings that the retention benchmarks compare, under one name each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

import revwire
from benchmarks.harness.record import Row

COUPLINGS = (
    "re2tal",
    *("bdia", "bdia:1/2", "bdia:1/4", "bdia:1/8", "bdia:1/16", "bdia:1/32", "bdia:1/64", "bdia:1/128"),
    *("bdia-random:1/2", "bdia-random:1/4"),
    *("momentum:1/2", "momentum:1/4", "momentum:1/8", "momentum:1/16", "momentum:1/32", "momentum:1/64"),
    *("dr2net:1,1/8", "midpoint:1,2"),
)


def wirings(
    make: Callable[[], nn.Module], example: Any, couplings: Sequence[str] = COUPLINGS
) -> Iterator[tuple[str, nn.Module]]:
    """(name, model): the original, each coupling straight after conversion, and the original wiring again after
    `revert`.
    """
    yield "original", make()
    for coupling in couplings:
        yield coupling, revwire.convert(make(), example, coupling=coupling, rewire="everywhere")
    yield "reverted", revwire.revert(revwire.convert(make(), example, rewire="everywhere"))


def reverted(model: nn.Module) -> nn.Module:
    """A fine-tuned model in the original wiring. What is lost by that is what is measured, so no warning is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", revwire.FunctionLostWarning)
        return revwire.revert(model)


def or_reason(measure: Callable[[], Row]) -> Row:
    """What was measured, or, where the streams left their range (the network diverges under this coupling), the
    reason.
    """
    try:
        return {**measure(), "reason": None}
    except revwire.RangeError as error:
        return {"reason": str(error)}


def kept(model: nn.Module) -> tuple[int, int]:
    """(units, bytes that the coupling keeps for the example) of a converted model; zeros for another."""
    try:
        plan = revwire.report(model)
    except revwire.ConversionError:
        return 0, 0
    return len(plan.units), sum(unit.kept_bytes for unit in plan.units)
