"""What Python in the opened code of a host could decide on, apart from tensor values; see Note [Programs and signatures]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from revwire._recording import CONSTANTS, IDENTITIES, has_hooks, is_constant, is_mapping, is_sequence, plain

_STAND_INS = (FakeTensor, FunctionalTensor)  # what torch.export runs on
_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules", "forward", "_revwire", "_replicate_for_data_parallel"})


class _Same:
    """Compares by identity, and keeps what it stands for alive, so that no other object takes its id."""

    __slots__ = ("obj",)

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def __hash__(self) -> int:
        return id(self.obj)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.obj is self.obj


def signature(host: nn.Module, guarded: Iterable[nn.Module], args: Any, kwargs: Any, leaves: list[Any]) -> Any:
    """The signature of a call of ``host`` by which programs are chosen: hashable.

    Args:
        host: the rewired module.
        guarded: the modules whose code its programs hold.
        args, kwargs: of the call.
        leaves: the tensors and objects among them.
    """
    first = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
    modules = tuple((id(m), m.training) for m in host.modules())
    attributes = tuple((m is not host and has_hooks(m), _attributes(m)) for m in guarded)
    devices = sorted({"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))})
    modes = (torch.is_grad_enabled(), *((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in devices))
    return (_skeleton((args, kwargs)), tuple(map(_kind, leaves)), tuple(first[id(leaf)] for leaf in leaves), modules, attributes, modes)


def details(host: nn.Module, leaves: list[Any]) -> Any:
    """What only counts for code that looks at shapes: sizes, strides, and which weights want gradients."""
    tensors = tuple((tuple(t.shape), t.stride(), t.storage_offset(), t.is_leaf) if _is_plain(t) else None for t in leaves)
    return tensors, tuple(p.requires_grad for p in host.parameters())


def _is_plain(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested


def _kind(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return _Same(leaf) if isinstance(leaf, IDENTITIES) else type(leaf)
    kind = Tensor if isinstance(leaf, _STAND_INS) else type(leaf)
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


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """Constants among the attributes of a module, in its containers and objects too; the rest by identity."""
    return tuple((k, _held(v, 2)) for k, v in vars(module).items() if k not in _STRUCTURE)


def _held(v: Any, depth: int) -> Any:
    if isinstance(v, CONSTANTS):
        return v
    if isinstance(v, Tensor):
        return Tensor
    if isinstance(v, dict):
        return (_Same(v), *((_held(k, 0), _held(item, depth - 1)) for k, item in v.items())) if depth else _Same(v)
    if isinstance(v, (list, tuple)):
        return (type(v), *(_held(item, depth - 1) for item in v)) if depth else _Same(v)
    if depth == 2 and hasattr(v, "__dict__") and not isinstance(v, (nn.Module, type)) and not callable(v):
        return _Same(v), tuple((k, item) for k, item in vars(v).items() if isinstance(item, CONSTANTS))
    return _Same(v)
