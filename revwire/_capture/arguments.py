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

    Tensors that share memory share it in the copy; strides are kept, whether gradients are wanted, and whether a tensor
    is a leaf (code cannot write to those that are, but to what a layer gave). Parameters are not copied: a module may
    be given its own.
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
    return _wanting(out, t)


def _wanting(out: Tensor, t: Tensor) -> Tensor:
    """``out``, with gradients wanted as they are of ``t``: of a leaf, or of what a layer gave."""
    if t.is_leaf or torch.is_inference_mode_enabled():
        return out.requires_grad_(t.requires_grad)
    with torch.enable_grad():
        return _Given.apply(torch.empty(0, requires_grad=True), out)  # type: ignore[no-any-return]


class _Given(torch.autograd.Function):
    """A tensor as it is, with a history that leads nowhere."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, t: Tensor) -> Tensor:
        ctx.mark_dirty(t)
        return t

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[None, None]:
        return None, None


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
