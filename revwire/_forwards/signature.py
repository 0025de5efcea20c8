"""What Python in the opened code of a host could decide on, apart from tensor values; see Note [Programs and
signatures] in `cached`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revwire._structures import IDENTITIES, ByIdentity, is_constant, is_mapping, is_sequence, plain
from revwire._torch import FakeTensor, FunctionalTensor

_STAND_INS = (FakeTensor, FunctionalTensor)  # what torch.export runs on


def call_signature(args: Any, kwargs: Any, leaves: list[Any]) -> Any:
    """What Python could decide on in a call, apart from the module itself: hashable.

    Args:
        args, kwargs: of the call.
        leaves: the tensors and objects among them.
    """
    if (
        len(leaves) == 1
        and not kwargs
        and len(args) == 1
        and args[0] is leaves[0]
        and type(leaves[0]) is Tensor
        and leaves[0].is_cpu
    ):
        cast = "cpu", torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return _OF_ONE, (_kind_of_tensor(Tensor, leaves[0]),), (0,), (torch.is_grad_enabled(), cast)  # as below
    first = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
    devices = sorted({"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))})
    modes = (
        torch.is_grad_enabled(),
        *((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in devices),
    )
    return (_skeleton((args, kwargs)), tuple(map(_kind, leaves)), tuple(first[id(leaf)] for leaf in leaves), modes)


def details(host: nn.Module, leaves: list[Any]) -> Any:
    """What only counts for code that looks at shapes: sizes, strides, and which weights want gradients."""
    tensors = tuple(
        (tuple(t.shape), t.stride(), t.storage_offset(), t.is_leaf) if _is_plain(t) else None for t in leaves
    )
    return tensors, tuple(p.requires_grad for p in host.parameters())


def _is_plain(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return ByIdentity(leaf) if isinstance(leaf, IDENTITIES) else type(leaf)
    return _kind_of_tensor(Tensor if isinstance(leaf, _STAND_INS) else type(leaf), leaf)


def _kind_of_tensor(kind: type[Tensor], leaf: Tensor) -> Any:
    return kind, leaf.dtype, leaf.device, leaf.dim(), leaf.requires_grad, leaf.layout, leaf.is_nested


def _skeleton(structure: Any) -> Any:
    """The arguments of a call with tensors and objects blanked."""
    if is_sequence(structure):
        return type(structure), tuple(_skeleton(s) for s in structure)
    if is_mapping(structure):
        return type(structure), tuple((k, _skeleton(v)) for k, v in structure.items())
    if isinstance(structure, slice):
        return slice, tuple(map(_skeleton, (structure.start, structure.stop, structure.step)))
    return (type(structure), plain(structure)) if is_constant(structure) else None


_OF_ONE = _skeleton(((torch.empty(0),), {}))
"""The skeleton of a call with one tensor."""
