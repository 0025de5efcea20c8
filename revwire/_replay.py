"""All that a recompute must reproduce: random state, autocast, buffers. It leaves no trace in global state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

AutocastState = tuple[bool, torch.dtype]
_CPU = torch.device("cpu")
RandomStates = dict[torch.device | None, Tensor]


def accelerators_of(values: Iterable[Any]) -> tuple[torch.device, ...]:
    """The devices, other than the CPU, on which any of these tensors lie."""
    return tuple({v.device for v in values if isinstance(v, Tensor) and v.device.type not in ("cpu", "meta")})


def random_states(devices: Iterable[torch.device]) -> RandomStates:
    """The generator states of the CPU (key None) and of ``devices``."""
    states: RandomStates = {None: torch.get_rng_state()}
    for device in devices:
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: RandomStates) -> None:
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


def exporting() -> bool:
    """Whether an exporter writes this call down: it may have no values, and nothing will be rebuilt."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


@dataclass(slots=True)
class Surroundings:
    """The state around one evaluation of a branch.

    Attributes:
        devices: the accelerators it runs on.
        randomness: generator states before the branch; emptied by `settle` where the branch drew nothing,
            so that a deterministic branch keeps none (a CPU state has 5 kB).
        autocast: (enabled, dtype) per device type.
        cache_enabled: whether autocast may cache its casts of weights.
    """

    devices: tuple[torch.device, ...]
    randomness: RandomStates
    autocast: dict[str, AutocastState]
    cache_enabled: bool

    @classmethod
    def capture(cls, tensors: Iterable[Tensor]) -> Surroundings:
        """The state now, on the CPU and on the devices of ``tensors``."""
        found = {t.device for t in tensors}
        devices = () if found == {_CPU} else tuple(d for d in found if d.type not in ("cpu", "meta"))
        autocast = {kind: autocast_state(kind) for kind in ("cpu", *(d.type for d in devices))}
        return cls(devices, random_states(devices), autocast, torch.is_autocast_cache_enabled())

    def settle(self) -> None:
        """After the branch ran: forget the generators it did not draw from."""
        after = random_states(self.devices)
        self.randomness = {d: s for d, s in self.randomness.items() if not _same_bytes(s, after[d])}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run a recompute as the forward ran; afterwards the generators are as they were before it."""
        outside = random_states(self.devices)
        casts = [(kind, *cast) for kind, cast in self.autocast.items() if cast[0] or torch.is_autocast_enabled(kind)]
        try:
            set_random_states(self.randomness)
            with ExitStack() as stack:
                for kind, enabled, dtype in casts:
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=self.cache_enabled))
                yield
        finally:
            set_random_states(outside)


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    words = a.numel() % 8 == 0  # comparing words is four times as fast
    return torch.equal(a.view(torch.int64), b.view(torch.int64)) if words else torch.equal(a, b)


@dataclass(slots=True)
class Inventory:
    """What the modules of a branch own.

    Attributes:
        weights: their parameters, each with its version counter at the time.
        writers: those that a forward may write buffers of.
    """

    weights: list[tuple[Tensor, int]]
    writers: list[nn.Module]

    @classmethod
    def of(cls, roots: Iterable[nn.Module]) -> Inventory:
        """The inventory of these modules and all below them (a plain walk: `nn.Module.modules` is slow)."""
        out, seen = cls([], []), set[int]()
        todo: list[nn.Module | None] = list(roots)
        while todo:
            module = todo.pop()
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            for weight in module._parameters.values():
                if weight is not None:
                    out.weights.append((weight, version_of(weight)))
            if module._buffers and any(_is_written(b) for b in module._buffers.values()):
                out.writers.append(module)
            if module._modules:
                todo.extend(module._modules.values())
        return out


def version_of(x: Tensor) -> int:
    """The count of in-place writes to ``x``; inference tensors have none."""
    return -1 if x.is_inference() else x._version


def _is_written(buffer: Tensor | None) -> bool:
    """Whether a forward may write this buffer: statistics are floats, counters have one element."""
    return buffer is not None and (buffer.is_floating_point() or buffer.numel() == 1)


_LOCKS = tuple(RLock() for _ in range(64))


@contextmanager
def undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep other threads from exchanging the buffers of these modules.

    Modules share a few locks, taken in one order; a nested chain takes a part of what its outer branch holds.
    """
    with ExitStack() as stack:
        for number in sorted({id(module) // 64 % len(_LOCKS) for module in modules}):
            stack.enter_context(_LOCKS[number])
        yield


@contextmanager
def buffers_exchanged(modules: Iterable[nn.Module], *, only_training: bool = True) -> Iterator[None]:
    """Let these modules (not those below them) write to copies of their buffers, and give them the originals back.

    Batch normalisation writes its statistics without touching their version counter, so what was written cannot be
    seen afterwards; and writing values back would race with, and look like, a change by somebody else.
    """
    writers = [m for m in modules if m.training or not only_training]
    kept: list[tuple[nn.Module, str, Tensor]] = []
    with undisturbed(writers):
        try:
            for module in writers:
                for name, buffer in module._buffers.items():
                    if buffer is not None and _is_written(buffer):
                        kept.append((module, name, buffer))
                        module._buffers[name] = buffer.clone()
            yield
        finally:
            for module, name, buffer in kept:
                module._buffers[name] = buffer


@contextmanager
def buffers_kept(roots: Iterable[nn.Module], *, only_training: bool = True) -> Iterator[None]:
    """`buffers_exchanged` for these modules and all below them."""
    with buffers_exchanged(Inventory.of(roots).writers, only_training=only_training):
        yield
