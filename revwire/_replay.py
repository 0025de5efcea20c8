"""All that a recompute must reproduce: random state, autocast, buffers. It leaves no trace in global state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

AutocastState = tuple[bool, torch.dtype]


def accelerators_of(values: Iterable[Any]) -> tuple[torch.device, ...]:
    """The devices, other than the CPU, on which any of these tensors lie."""
    return tuple({v.device for v in values if isinstance(v, Tensor) and v.device.type not in ("cpu", "meta")})


def random_states(devices: tuple[torch.device, ...]) -> dict[torch.device | None, Tensor]:
    """The generator states of the CPU (key None) and of ``devices``."""
    states: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
    for device in devices:
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: dict[torch.device | None, Tensor]) -> None:
    """The inverse of `random_states`."""
    for device, state in states.items():
        if device is None:
            torch.set_rng_state(state)
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


def autocast_state(device_type: str) -> AutocastState:
    """(enabled, dtype) of autocast on a device type."""
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


@dataclass
class Surroundings:
    """The state around one evaluation of a branch.

    Attributes:
        randomness: generator states before the branch; emptied by `settle` where the branch drew nothing,
            so that a deterministic branch keeps none (a CPU state has 5 kB).
        autocast: (enabled, dtype) per device type.
        cache_enabled: whether autocast may cache its casts of weights.
    """

    randomness: dict[torch.device | None, Tensor]
    autocast: dict[str, AutocastState]
    cache_enabled: bool

    @classmethod
    def capture(cls, tensors: Iterable[Any]) -> Surroundings:
        devices = accelerators_of(tensors)
        types = {"cpu", *(d.type for d in devices)}
        return cls(random_states(devices), {t: autocast_state(t) for t in types}, torch.is_autocast_cache_enabled())

    def settle(self) -> None:
        """After the branch ran: forget the generators it did not draw from."""
        after = random_states(tuple(d for d in self.randomness if d is not None))
        self.randomness = {d: s for d, s in self.randomness.items() if not torch.equal(s, after[d])}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run a recompute as the forward ran; afterwards the generators are as they were before it."""
        outside = random_states(tuple(d for d in self.randomness if d is not None)) if self.randomness else {}
        with ExitStack() as stack:
            for kind, (enabled, dtype) in self.autocast.items():
                if (enabled, dtype) != autocast_state(kind) or enabled:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache_enabled))
            try:
                set_random_states(self.randomness)
                yield
            finally:
                set_random_states(outside)


@contextmanager
def buffers_kept(modules: Iterable[nn.Module], *, only_training: bool = True) -> Iterator[None]:
    """Let modules write to copies of their buffers, and give them the originals back.

    Only buffers that a forward writes are copied: in modules in training mode (all modules, unless
    ``only_training``), the floating-point ones and the counters of one element. Batch normalisation writes its
    statistics without touching their version counter, so what was written cannot be seen afterwards.
    """
    kept: list[tuple[nn.Module, str, Tensor]] = []
    seen: set[int] = set()
    try:
        for root in modules:
            for module in root.modules():
                if id(module) in seen or (only_training and not module.training):
                    continue
                seen.add(id(module))
                for name, buffer in module._buffers.items():
                    if buffer is not None and (buffer.is_floating_point() or buffer.numel() == 1):
                        kept.append((module, name, buffer))
                        module._buffers[name] = buffer.clone()
        yield
    finally:
        for module, name, buffer in kept:
            module._buffers[name] = buffer
