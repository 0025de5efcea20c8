"""What the commands do with a model: build it, try it on its inputs, convert it."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import nn

import revwire
from revwire import NothingToRewireWarning
from revwire.cli.models import load
from revwire.cli.output import working
from revwire.cli.usage import Shape, UsageError, first_line
from revwire.testing import holds

__all__ = ["conversion", "convert", "device_of", "given", "holds", "plan", "prepared"]


_REPORT_THEMSELVES = {"memory_budget", "chunks"}


def prepared(
    name: str, inputs: list[str] | None, as_list: bool, train: bool, pretrained: bool
) -> tuple[nn.Module, Any]:
    """The model and its example inputs, once it is known that the one takes the other."""
    shapes = tuple(map(_shape, inputs or ()))
    torch.manual_seed(0)
    with working(f"building {name}"):
        subject = load(name, pretrained=pretrained)
        examples = subject.example_inputs(shapes, as_list=as_list)
        _try(subject.model.eval(), examples)
    return subject.model.train(train), examples


def plan(network: nn.Module, inputs: Any, options: dict[str, Any]) -> revwire.Plan:
    """What would be done to the model; a budget reports its steps by itself."""
    with working("tracing", shown=not _REPORT_THEMSELVES & options.keys()):
        return revwire.plan(network, inputs, **options)


def convert(network: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
    """Convert the model, in which there must be something to rewire."""
    with working("converting", shown=not _REPORT_THEMSELVES & options.keys()), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToRewireWarning)  # it is an error here, which says more
        done = revwire.report(revwire.convert(network, inputs, **options))
    if not done.chains:
        raise UsageError(f"nothing was rewired, so there is nothing to check or to measure\n{done}")


def device_of(name: str | None) -> torch.device | None:
    """A device by its name."""
    try:
        return torch.device(name) if name else None
    except RuntimeError as error:
        raise UsageError(f"got the device {name!r}; expected one of PyTorch's ({first_line(error)})") from None


def _try(network: nn.Module, examples: Any) -> None:
    try:
        with torch.no_grad():
            fresh = deepcopy(examples)  # some models write to the list that they are given
            network(**fresh) if isinstance(fresh, dict) else network(*fresh)
    except Exception as error:  # whatever a model raises on an input that does not suit it
        raise UsageError(
            f"the model does not run on this input ({first_line(error)}); pass its shape with --input"
        ) from error


def _shape(text: str) -> Shape:
    try:
        shape = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"got the input shape {text!r}; expected positive whole numbers, such as 1,3,224,224")
    return shape


CONVERSION = ("coupling", "exact", "include", "exclude", "whole", "chunks", "checkpoint", "memory_budget", "rewire")


def conversion(*values: Any) -> dict[str, Any]:
    """The options of a conversion, in the order in which commands list them."""
    return given(**dict(zip(CONVERSION, values, strict=True)))


def given(**options: Any) -> dict[str, Any]:
    """Only what was said on the command line, so that defaults are stated once, in the library."""
    return {name: value for name, value in options.items() if value is not None}
