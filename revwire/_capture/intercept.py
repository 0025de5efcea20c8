"""Route the calls of modules, custom autograd functions and TorchScript functions of a thread through a recorder.

Note [Threads]
    The classes of PyTorch are patched while any thread records; the patches do nothing in the other threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from revwire._surroundings.modes import transformed


class Interceptor(Protocol):
    """What calls are routed through. ``quiet``: its own calls are not."""

    quiet: bool

    def module_call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Make a module call."""

    def opaque_call(self, original: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        """Make a call that shows nothing of what it does inside."""


class _State(threading.local):
    active: Interceptor | None = None


_STATE = _State()


def is_recording() -> bool:
    """Whether this thread is observing a module: converted hosts then run their original forward."""
    return _STATE.active is not None


def active() -> Interceptor | None:
    """What this thread records with."""
    return _STATE.active


_LOCK = threading.Lock()


_USERS = [0]


_ORIGINALS: dict[str, Any] = {}


@contextmanager
def intercepted(recorder: Interceptor) -> Iterator[None]:
    """Route module calls and opaque functions of this thread through the recorder, but for those inside of a
    `torch.func` transform, where tensors are not what they seem. Several threads may record at once.
    """
    previous = _STATE.active
    with _LOCK:
        if not _USERS[0]:
            _intercept()
        _USERS[0] += 1
    _STATE.active = recorder
    try:
        yield
    finally:
        _STATE.active = previous
        with _LOCK:
            _USERS[0] -= 1
            if not _USERS[0]:
                _release()


def _intercept() -> None:
    module_call, script_call = nn.Module.__call__, torch.jit.ScriptFunction.__call__
    apply = torch.autograd.Function.__dict__.get("apply")
    _ORIGINALS.update(module=module_call, script=script_call, apply=apply)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        active = _STATE.active
        if active is None or active.quiet or transformed():
            return module_call(self, *args, **kwargs)
        return active.module_call(module_call, self, args, kwargs)

    def scripted(self: Any, *args: Any, **kwargs: Any) -> Any:
        active = _STATE.active
        if active is None or active.quiet or transformed():
            return script_call(self, *args, **kwargs)
        return active.opaque_call(lambda *a, **k: script_call(self, *a, **k), self, args, kwargs)

    def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
        active = _STATE.active
        bound = super(torch.autograd.Function, cls).apply if apply is None else apply.__get__(None, cls)
        if active is None or active.quiet or transformed():
            return bound(*args, **kwargs)
        if cls is CheckpointFunction:  # what it runs is what counts; it would show nothing of it
            function, _, *inputs = args
            return function(*inputs)
        return active.opaque_call(bound, cls.apply, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    torch.jit.ScriptFunction.__call__ = scripted  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(apply_function)


def _release() -> None:
    nn.Module.__call__ = _ORIGINALS["module"]  # type: ignore[method-assign]
    torch.jit.ScriptFunction.__call__ = _ORIGINALS["script"]  # type: ignore[method-assign]
    if _ORIGINALS["apply"] is None:
        del torch.autograd.Function.apply
    else:
        torch.autograd.Function.apply = _ORIGINALS["apply"]
