"""Settings of PyTorch outside of a model that decide what a call computes: default dtype and device, and the choice of
kernels. A recompute finds those of its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from revwire._surroundings.modes import NOTHING
from revwire._torch import BENCHMARK, PRECISIONS, SETTINGS, default_device, function_modes

_ALWAYS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    *SETTINGS,
)

_ALL = (*_ALWAYS, *PRECISIONS.values())

_LOOKED = tuple(
    tuple(
        read for read, _ in (*_ALWAYS, *(p for (on, what), p in PRECISIONS.items() if on in backends and what != "all"))
    )
    for backends in (("mkldnn",), ("mkldnn", "cuda"))
)
"""What is looked at for each unit, on the CPU and on an accelerator: reading all takes a few microseconds."""


class Settings(NamedTuple):
    """The settings at one moment.

    Attributes:
        device: the default one; None: nobody chose it.
        looked: what `_LOOKED` gave.
        values: of `_ALL`; where ``looked`` is as it was, another read would decide nothing.
    """

    device: torch.device | None
    looked: list[Any]
    values: list[Any]


_LATEST = [Settings(None, [], []), Settings(None, [], [])]


def settings_now(accelerated: bool = True) -> Settings:
    """The settings in force: the same object as long as nothing changes, so that units share it.

    Args:
        accelerated: also those that count on an accelerator only.
    """
    device = default_device() if function_modes() else None
    looked, latest = [read() for read in _LOOKED[accelerated]], _LATEST[accelerated]
    if looked == latest.looked and device == latest.device:
        return latest
    latest = _LATEST[accelerated] = Settings(device, looked, [read() for read, _ in _ALL])
    return latest


def settings_restored(then: Settings, accelerated: bool = True) -> AbstractContextManager[None]:
    """A context in which these settings are in force again, and after which those are that are in force now; `NOTHING`
    where they are the same.
    """
    return NOTHING if settings_now(accelerated) is then else _restored(then)


searches_kernels: Callable[[], bool] = SETTINGS[BENCHMARK][0]
"""Whether cuDNN tries the algorithms of each new convolution, and takes the fastest: in each thread for itself."""


@contextmanager
def kernels_not_searched() -> Iterator[None]:
    """Let cuDNN choose by its rules: what it finds by trying is another algorithm in the thread of a backward pass."""
    set_search, before = SETTINGS[BENCHMARK][1], searches_kernels()
    set_search(False)
    try:
        yield
    finally:
        set_search(before)


@contextmanager
def _restored(then: Settings) -> Iterator[None]:
    now = Settings(default_device(), [], [read() for read, _ in _ALL])
    with NOTHING if then.device == now.device else torch.device(then.device or "cpu"):
        try:
            _set(then)
            yield
        finally:
            _set(now)


def _set(settings: Settings) -> None:
    """Set what has another value; in order, as some follow those before them."""
    for (read, write), value in zip(_ALL, settings.values, strict=True):
        if read() != value:
            write(value)
