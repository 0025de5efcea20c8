"""Modes around a call: autocast, deterministic kernels, early stop, saved-tensor hooks, exporters, transforms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from revwire._streams.fused import INTERPRETED
from revwire._torch import (
    dynamo_is_imported,
    full_backward_hook_tables,
    functorch_interpreter,
    top_saved_tensors_hooks,
    tracing_state,
)


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Let code that is compiled by `torch.compile` run as it was written: compilers refuse to trace what is being
    observed.
    """
    if not dynamo_is_imported():  # then nothing is
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def backward_hooks_left_out(module: nn.Module) -> Iterator[None]:
    """Let a module (not those below it) forget its full backward hooks."""
    kept = {name: vars(module)[name] for name in full_backward_hook_tables(module)}
    vars(module).update({name: OrderedDict() for name in kept})
    try:
        yield
    finally:
        vars(module).update(kept)


class _Nothing(AbstractContextManager[None]):
    """Does nothing, without a call of a Python function: a formatted empty string takes any arguments, and is false."""

    __slots__ = ()
    __enter__: Any = "".format
    __exit__: Any = "".format


NOTHING = _Nothing()
"""A context that does nothing; one serves all."""


AutocastState = tuple[bool, torch.dtype]


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Use deterministic kernels where PyTorch has them; where it has none, a warning says so."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def autocast_state(device_type: str) -> AutocastState:
    """(enabled, dtype) of autocast on a device type."""
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def exporting() -> bool:
    """Whether an exporter writes this call down: it may have no values, and nothing will be rebuilt."""
    return torch.compiler.is_exporting() or tracing_state() is not None


def transformed() -> bool:
    """Whether a `torch.func` transform is in force: tensors are not what they seem, and saved-tensor hooks do not work
    there.
    """
    return functorch_interpreter() is not None


def saved_tensors_hooked() -> bool:
    """Whether saved-tensor hooks are in force around this call."""
    return top_saved_tensors_hooks(False) is not None


def stalls(device: torch.device) -> bool:
    """Whether reading one number from a device waits for all that it has been given to do; where kernels are
    interpreted, the CPU stands in for such a device.
    """
    return device.type != "cpu" or INTERPRETED
