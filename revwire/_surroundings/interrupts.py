"""An interrupt from the keyboard while a model is being converted.

Note [Interrupts]
    The handler of its signal raises `KeyboardInterrupt` wherever Python stands: also between a patch and the ``try``
    that would take it off, or in the midst of a ``finally``. So while a conversion puts things on PyTorch's classes or
    on a model, and takes them off, the signal waits (`uninterrupted`); while the model itself runs, it does not
    (`interruptible`). One that waited is handled as soon as it may. Python handles signals in the main thread alone, so
    elsewhere there is nothing to do. Both are functions, not contexts: the entry and the exit of a context are calls,
    before and after which the signal may come.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from inspect import currentframe
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class _State(threading.local):
    """Of this thread.

    Attributes:
        handler: what handles the signal, while it is asked to wait.
        waits: whether it waits now.
        pending: whether one has come.
    """

    handler: Callable[[int, FrameType | None], Any] | None = None
    waits = False
    pending = False


_STATE = _State()


def uninterrupted(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function; the signal waits until it is done, or until `interruptible` is called in it."""
    state = _STATE
    if state.handler is not None:
        return _with_waits(True, function, *args, **kwargs)
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        return function(*args, **kwargs)
    try:
        state.handler, state.waits, state.pending = handler, True, False
        signal.signal(signal.SIGINT, _come)
        return function(*args, **kwargs)
    finally:
        if signal.getsignal(signal.SIGINT) is _come:  # else somebody inside has chosen another, which stays
            signal.signal(signal.SIGINT, handler)
        state.handler, state.waits = None, False
        if state.pending:
            state.pending = False
            handler(signal.SIGINT, currentframe())


def interruptible(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function, a model's own, in the midst of `uninterrupted`, as if outside of it."""
    return _with_waits(False, function, *args, **kwargs)


def _with_waits(waits: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    state = _STATE
    before = state.waits
    try:
        state.waits = waits
        _deliver()
        return function(*args, **kwargs)
    finally:
        state.waits = before
        _deliver()


def let_through() -> None:
    """Handle a signal that has come, in the midst of `uninterrupted` where nothing is half done."""
    interruptible(bool)


def let_wait(waits: bool) -> bool:
    """Let the signal wait, or not, where somebody has called `uninterrupted`: (whether it did before)."""
    before, _STATE.waits = _STATE.waits, waits
    _deliver()
    return before


def _deliver() -> None:
    """Handle a signal that has come, where it need not wait any more."""
    state = _STATE
    if state.pending and not state.waits and state.handler is not None:
        state.pending = False
        state.handler(signal.SIGINT, currentframe())


def _come(number: int, frame: FrameType | None) -> None:
    state = _STATE
    if state.waits or state.handler is None:
        state.pending = True
    else:
        state.handler(number, frame)
