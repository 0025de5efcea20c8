"""The values of a recording: which tensor is which, what it is called, and what it weighs.

Note [Writes]
    A write in place makes a new value of every tensor that shares the memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from revwire._capture.aliasing import Memory, address_of
from revwire._capture.recording import Event, Recording, Value
from revwire._streams.samples import usual_magnitude
from revwire._structures import Opaque, Ref, is_constant, mapped, plain, tensors_in
from revwire._surroundings.modes import NOTHING
from revwire._torch import no_torch_dispatch


class Values:
    """Numbers tensors for a recording, and writes its `Value`s.

    Attributes:
        memory: which tensors share memory, and their numbers.
        names: of the tensors that the modules hold, by identity.
        owned: the addresses of their storages.
        kept: what autograd keeps for the events that still run.
        counted: the storages that it keeps so far.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.memory = Memory(recording.note_released)
        self.names: dict[int, tuple[str, ...]] = {}
        self.owned: set[int] = set()
        self.kept: dict[int, list[Tensor]] = {}
        self.counted: set[int] = set()

    def name_all(self) -> None:
        """Learn the qualified names of the root's modules and of all tensors they hold (as they are during the run)."""
        for name, module in self.recording.root.named_modules(remove_duplicate=False):
            self.recording.module_names[id(module)] = (*self.recording.module_names.get(id(module), ()), name)
            held = {
                **{k: v for k, v in vars(module).items() if isinstance(v, Tensor)},
                **module._parameters,
                **module._buffers,
            }
            for key, t in held.items():
                if t is not None:
                    self.names[id(t)] = (*self.names.get(id(t), ()), f"{name}.{key}" if name else key)
                    if (
                        address_of(t) is not None
                    ):  # else it has no memory of its own that can be named: sharded, meta, sparse
                        self.owned.add(t.untyped_storage().data_ptr())

    def number_of(self, t: Tensor) -> int:
        """The number of the value that a tensor has now."""
        found = self.memory.number_of(t)
        return self.bind(t, -1) if found is None else found

    def bind(self, t: Tensor, event: int, dynamic: bool = False) -> int:
        """Begin a new value: what a tensor is from this event on (-1: it was there before)."""
        number = len(self.recording.values)
        existing, names = (t, self.names.get(id(t), ())) if event < 0 else (None, ())
        storage = self.memory.bind(t, number)
        self.recording.storages.setdefault(storage, _size(t))
        value = Value(number, event, _shape(t), t.dtype, existing, names, storage, dynamic)
        value.wants, value.strides = t.requires_grad, _strides(t)
        self.recording.values.append(value)
        return number

    def noted(self, structure: Any) -> Any:
        """``structure`` with tensors as `Ref`, and what is no plain constant as `Opaque`."""
        return mapped(structure, self.noted_leaf)

    def noted_leaf(self, leaf: Any) -> Any:
        """As `noted`, of one leaf."""
        if isinstance(leaf, Tensor):
            return Ref(self.number_of(leaf))
        if is_constant(leaf):
            return plain(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            return Opaque(
                leaf, {f.name: self.noted(getattr(leaf, f.name, None)) for f in dataclasses.fields(leaf) if f.init}
            )
        return Opaque(leaf)

    def mark_custom(self, structure: Any) -> None:
        """A custom function whose ``apply`` was bound to a name before the run is not intercepted, but its results show
        it.
        """
        for t in tensors_in(structure):
            number = self.memory.number_of(t)
            if number is not None and issubclass(type(t.grad_fn), BackwardCFunction):
                value = self.recording.values[number]
                event = self.recording.events[value.event] if value.event >= 0 else None
                value.custom |= event is not None and not (event.is_module or event.opaque)

    def noted_output(self, structure: Any, event: Event, dynamic: bool) -> Any:
        """As `noted`, where tensors that did not exist before the event are its results."""
        for t in tensors_in(structure):
            if self.memory.number_of(t) is None:
                self.bind(t, event.number, dynamic)
        return self.noted(structure)

    def measure_magnitudes(self, tensors: list[Tensor]) -> None:
        """Note the largest magnitude of each of these, and the usual one, unless they are known."""
        for t in tensors:
            value = self.recording.values[self.number_of(t)]
            if t.is_floating_point() and t.numel() and not t.is_meta and not t.is_nested and not value.largest:
                with no_torch_dispatch() if type(t) in (Tensor, nn.Parameter) else NOTHING:  # a mode need not see it
                    value.largest = float(torch.linalg.vector_norm(t.detach(), float("inf")))
                    value.usual = usual_magnitude(t)

    def note_saved(self, t: Tensor, event: Event) -> None:
        """Note that autograd keeps this tensor for an event that still runs; weights are there anyway."""
        if t.layout != torch.strided or t.is_nested:
            return
        try:
            if address_of(t) is not None and t.untyped_storage().data_ptr() in self.owned:
                return
        except RuntimeError:  # the wrapper of a `torch.func` transform has no memory of its own
            return
        self.kept.setdefault(event.number, []).append(t)

    def count_saved(self, event: Event) -> None:
        """Find out, when its results are known, what memory autograd keeps for an event, and what is new of it."""
        unseen: dict[int | None, int] = {}  # what a call made and kept inside
        for t in self.kept.pop(event.number, ()):
            address = address_of(t)
            storage = self.memory.storage_at(address)
            if address is not None and storage not in self.recording.storages:
                storage = unseen.setdefault(address, storage)
            if storage not in event.keeps:
                event.keeps.append(storage)
            if storage not in self.counted:
                self.counted.add(storage)
                self.recording.storages[storage] = _size(t)
                event.saved += _size(t)


def _shape(t: Tensor) -> tuple[int, ...]:
    return (-1,) * t.dim() if t.is_nested else tuple(t.shape)


def _strides(t: Tensor) -> tuple[int, ...]:
    return t.stride() if t.layout == torch.strided and not t.is_nested else ()


def _size(t: Tensor) -> int:
    """Bytes of the memory that a tensor lies in."""
    if t.layout != torch.strided or t.is_nested:
        return 0
    return t.numel() * t.element_size() if address_of(t) is None else t.untyped_storage().nbytes()
