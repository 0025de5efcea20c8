"""States of random generators: PyTorch's on every device that is used, and Python's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def python_random_state() -> tuple[Any, ...]:
    """The states of ``random`` and, where it is loaded, ``numpy.random``."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def same_random_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether nothing was drawn between two `python_random_state`s."""
    if a[0] != b[0] or (a[1] is None) != (b[1] is None):
        return False
    return a[1] is None or bool(a[1][2:] == b[1][2:] and (a[1][1] == b[1][1]).all())


@contextmanager
def python_random_kept() -> Iterator[None]:
    """Leave the generators of Python and NumPy as found."""
    before = python_random_state()
    try:
        yield
    finally:
        set_python_random_state(before)


def set_python_random_state(state: tuple[Any, Any]) -> None:
    """The inverse of `python_random_state`."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


RandomStates = dict[torch.device | None, Tensor]


def accelerators_of(values: Iterable[Any]) -> tuple[torch.device, ...]:
    """The devices, other than the CPU, on which any of these tensors lie."""
    return tuple({v.device for v in values if isinstance(v, Tensor) and v.device.type not in ("cpu", "meta")})


def random_states(devices: Iterable[torch.device]) -> RandomStates:
    """The generator states of the CPU (key None) and of ``devices``."""
    states: RandomStates = {None: torch.default_generator.get_state()}
    for device in devices:
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: RandomStates) -> None:
    """The inverse of `random_states`."""
    for device, state in states.items():
        if device is None:
            torch.default_generator.set_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def preserved_random_state(devices: tuple[torch.device, ...] = ()) -> Iterator[None]:
    """Leave the generators as they were found."""
    before = random_states(devices)
    try:
        yield
    finally:
        set_random_states(before)
