"""What Python in the opened code of a host could decide on, apart from tensor values; see Note [Programs and signatures]."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_ as _is
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


class Standing:
    """What a host and the modules whose code its programs hold are now, apart from tensor values: hashable, and hashed once."""

    __slots__ = ("_hash", "_value")

    def __init__(self, host: nn.Module, guarded: Iterable[nn.Module]) -> None:
        modules = tuple((id(m), m.training) for m in host.modules())
        self._value = modules, tuple((m is not host and has_hooks(m), _attributes(m)) for m in guarded)
        self._hash = hash(self._value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Standing) and self._hash == other._hash and self._value == other._value)


class Look:
    """A quick way to see that the `Standing` of a host is what it was at the last call: by the identity of all that it was made of.

    It holds on to what it has seen, so that no other object takes its identity; so there is none where a tensor is among it.
    """

    def __init__(self, standing: Standing, host: nn.Module, guarded: Iterable[nn.Module]) -> None:
        """Look at them.

        Raises:
            TypeError: what is among their attributes cannot be told by identity, or must not be held on to.
        """
        self.standing = standing
        self._tree = [(m, m.training, m._modules, (*m._modules.values(),)) for m in host.modules()]
        registry = nn.modules.module
        self._empty: list[Any] = [registry._global_forward_hooks, registry._global_forward_pre_hooks]
        self._full: list[tuple[dict[Any, Any], list[Any], list[Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        for module in guarded:
            self._note(vars(module))
            for name, value in vars(module).items():
                if name not in _STRUCTURE:
                    self._enter(value)
        if any(self._empty):
            raise TypeError("hooks for all modules")

    def _note(self, found: dict[Any, Any]) -> None:
        values = [*found.values()]
        if any(isinstance(v, Tensor) for v in values):
            raise TypeError("tensors")
        self._full.append((found, [*found], values))

    def _enter(self, value: Any) -> None:
        if isinstance(value, (dict, list)) and not value:
            self._empty.append(value)
        elif isinstance(value, dict):
            self._check(value.values())
            self._note(value)
        elif isinstance(value, list):
            self._check(value)
            self._lists.append((value, [*value]))
        elif isinstance(value, tuple):
            self._check(value)
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
            self._note(vars(value))

    def _check(self, items: Iterable[Any]) -> None:
        """That a container holds nothing that holds something in turn."""
        if not all(isinstance(item, (*CONSTANTS, *IDENTITIES)) for item in items):
            raise TypeError("containers in containers")

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if any(self._empty):
            return False
        for module, training, children, seen in self._tree:
            if module.training is not training or module._modules is not children or len(children) != len(seen):
                return False
            if seen and not all(map(_is, children.values(), seen)):
                return False
        for found, names, values in self._full:
            if [*found] != names or not all(map(_is, found.values(), values)):
                return False
        return all(len(found) == len(values) and all(map(_is, found, values)) for found, values in self._lists)


def call_signature(args: Any, kwargs: Any, leaves: list[Any]) -> Any:
    """What Python could decide on in a call, apart from the module itself: hashable.

    Args:
        args, kwargs: of the call.
        leaves: the tensors and objects among them.
    """
    if len(leaves) == 1 and not kwargs and len(args) == 1 and args[0] is leaves[0] and type(leaves[0]) is Tensor and leaves[0].is_cpu:
        return _kind(leaves[0]), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    first = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
    devices = sorted({"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))})
    modes = (torch.is_grad_enabled(), *((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in devices))
    return (_skeleton((args, kwargs)), tuple(map(_kind, leaves)), tuple(first[id(leaf)] for leaf in leaves), modes)


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
