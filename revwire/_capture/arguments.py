"""Copies of a call's arguments, for a run that must not write to the caller's tensors, nor to the caller's objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revwire._structures import CONSTANTS, mapped
from revwire._surroundings.copies import snapshot
from revwire._torch import storage_id


def fresh_arguments(structure: Any) -> Any:
    """Arguments to run on: new containers and objects, and detached copies of the tensors, as alike as can be.

    Tensors that share memory share it in the copy; strides, and whether gradients are wanted, are kept. Parameters are
    not copied: a module may be given its own.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    seen: dict[int, Any] = {}

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, (*CONSTANTS, nn.Parameter, nn.Module)):
            return leaf
        if id(leaf) not in seen:
            seen[id(leaf)] = _copied_tensor(leaf, storages) if isinstance(leaf, Tensor) else snapshot(leaf, copied)
        return seen[id(leaf)]

    return mapped(structure, copied)


def _copied_tensor(t: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    if t.layout != torch.strided or t.is_nested or t.is_meta or type(t) is not Tensor or t.is_conj() or t.is_neg():
        return t.detach().clone().requires_grad_(t.requires_grad)
    storage = t.untyped_storage()
    if storage_id(storage) not in storages:
        storages[storage_id(storage)] = storage.clone()  # type: ignore[no-untyped-call]
    out = torch.empty(0, dtype=t.dtype, device=t.device)
    out.set_(storages[storage_id(storage)], t.storage_offset(), t.size(), t.stride())
    return out.requires_grad_(t.requires_grad)


@dataclass(frozen=True)
class Call:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_call(example_inputs: Any) -> Call:
    """A user's example as positional and keyword arguments."""
    if isinstance(example_inputs, Call):
        return example_inputs
    if isinstance(example_inputs, tuple) and not hasattr(example_inputs, "_fields"):
        return Call(example_inputs, {})
    if hasattr(example_inputs, "keys") and not isinstance(example_inputs, Tensor):
        return Call((), dict(example_inputs))
    return Call((example_inputs,), {})
