"""Calls in a host's own code that no function mode sees: custom autograd functions, and TorchScript functions.

Where the example made such calls in a host's own code, they are told to its follower, from then on. A host's own
reentrant checkpointing is a custom function, too, which hides from autograd what it runs: its unit is rebuilt anyway,
so what it would run is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from revwire._runtime.follower import NOW
from revwire._runtime.regions import as_region

_OURS = "_revwire_known"


def look_through_checkpoints() -> None:
    """Let reentrant checkpointing in the own code of a host that is followed run its function, and nothing else.
    Elsewhere, chains begin and end within what it runs.
    """
    if "apply" not in vars(CheckpointFunction):
        CheckpointFunction.apply = classmethod(_apply)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    function, preserve, *inputs = args
    if NOW.follower is None:
        return super(CheckpointFunction, cls).apply(as_region(function), preserve, *inputs, **kwargs)
    return function(*inputs)


def make_known() -> None:
    """From now on such calls are told to the follower of the host that makes them. (They run as ever elsewhere.)"""
    function: Any = torch.autograd.Function
    scripted: Any = torch.jit.ScriptFunction
    if not isinstance(vars(function).get("apply"), _Known):
        function.apply = _Known(function, vars(function).get("apply"))
    if not hasattr(scripted.__call__, _OURS):
        scripted.__call__ = _known(scripted.__call__)


class _Known:
    """Stands for ``apply`` of all custom functions; ``before``: what stood there, in the class or above it."""

    def __init__(self, function: Any, before: Any) -> None:
        self.function, self.before = function, before

    def __get__(self, _: Any, cls: Any) -> Callable[..., Any]:
        above: Any = super(self.function, cls)
        apply: Callable[..., Any] = above.apply if self.before is None else self.before.__get__(None, cls)
        follower = NOW.follower
        if follower is None or cls.__module__.startswith("revwire."):
            return apply
        return lambda *args, **kwargs: follower.opaque_call(apply, args, kwargs)


def _known(call: Callable[..., Any]) -> Callable[..., Any]:
    def scripted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if NOW.follower is None:
            return call(self, *args, **kwargs)
        return NOW.follower.opaque_call(MethodType(call, self), args, kwargs)

    setattr(scripted, _OURS, True)
    return scripted
