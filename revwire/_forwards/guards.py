"""Guards: whether a host and its modules are what they were when a program was captured, tensor values aside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

from torch import Tensor, nn

from revwire._structures import CONSTANTS, ByIdentity
from revwire._surroundings.attributes import contents_of, items_in
from revwire._surroundings.inventory import has_hooks
from revwire._torch import CALL, REPLICATE, hooks_on_all_modules

_STRUCTURE = frozenset({"_parameters", "_buffers", "_modules", "forward", "_revwire", REPLICATE, CALL, "compile"})


class Standing:
    """What a host and the modules whose code its programs hold are now, apart from tensor values: hashable, and hashed
    once.
    """

    __slots__ = ("_hash", "_value")

    def __init__(self, host: nn.Module, guarded: Iterable[nn.Module]) -> None:
        modules = tuple((id(m), m.training) for m in host.modules())
        self._value = modules, tuple((m is not host and has_hooks(m), _attributes(m)) for m in guarded)
        self._hash = hash(self._value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Standing) and self._hash == other._hash and self._value == other._value
        )


class _Owner(NamedTuple):
    """A module or an object, and what stood in its attributes."""

    ref: ReferenceType[Any]
    names: list[str]
    ids: tuple[int, ...]
    containers: list[
        tuple[str, tuple[Any, ...]]
    ]  # by name: the type, the keys (of a dict), and the identities of the items


class StandingGuard:
    """A quick way to see that the `Standing` of a host is what it was at the last call: by the identity of all that it
    was made of.

    It keeps constants and empty containers alive, so that no other object takes the identity of one, and nothing else:
    of the rest it hears when it dies, and of containers it sees what is in them.
    """

    def __init__(self, standing: Standing, host: nn.Module, guarded: Sequence[nn.Module]) -> None:
        """StandingGuard at them.

        Raises:
            TypeError: what is among their attributes cannot be told in this way.
        """
        self.standing = standing
        self.count = len(guarded)
        self._dead: list[ReferenceType[Any]] = []
        self._refs: list[ReferenceType[Any]] = []
        self._constants: list[Any] = []
        self._empty: list[Any] = []
        self._tree = [(self._ref(m), m.training, self._ids(m._modules.values())) for m in host.modules()]
        self._owners: list[_Owner] = []
        for module in guarded:
            self._enter(module, vars(module), deep=True)
        if hooks_on_all_modules():
            raise TypeError("hooks for all modules")

    def _ref(self, value: Any) -> ReferenceType[Any]:
        self._refs.append(ref(value, self._dead.append))
        return self._refs[-1]

    def _ids(self, values: Iterable[Any], *, counts: bool = True) -> tuple[int, ...]:
        """The identities of values; where only constants among them ``count``, others may die."""
        for value in values:
            if isinstance(value, CONSTANTS):
                self._constants.append(value)
            elif counts and not isinstance(value, _CONTAINERS):
                self._ref(value)
        return tuple(map(id, values))

    def _enter(self, owner: Any, found: dict[str, Any], *, deep: bool) -> None:
        """Note all of an object's attributes; if ``deep``, what is in its containers and its objects' attributes."""
        if any(isinstance(v, Tensor) for v in found.values()):
            raise TypeError("tensors")
        containers = []
        for name, value in found.items() if deep else ():
            if name in _STRUCTURE:
                continue
            if type(value) in _EMPTY and not value:
                self._empty.append(value)
            elif isinstance(value, _CONTAINERS):
                containers.append((name, self._content(value)))
            elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
                self._enter(value, vars(value), deep=False)
        self._owners.append(_Owner(self._ref(owner), [*found], self._ids(found.values(), counts=deep), containers))

    def _content(self, container: Any) -> tuple[Any, ...]:
        items = items_in(container) or []
        if not all(isinstance(item, CONSTANTS) or type(item) in _LASTING for item in items):
            raise TypeError("something that holds more")
        self._ids(items)
        return _content(container)

    def holds(self) -> bool:
        """Whether nothing has changed."""
        if self._dead or any(self._empty) or hooks_on_all_modules():
            return False
        for reference, training, ids in self._tree:
            module = reference()
            if module is None or module.training is not training:
                return False
            below = module._modules
            if (below or ids) and tuple(map(id, below.values())) != ids:
                return False
        for owner in self._owners:
            found = vars(owner.ref())
            if tuple(map(id, found.values())) != owner.ids or [*found] != owner.names:
                return False
            for name, content in owner.containers:
                value = found[name]
                if not isinstance(value, _CONTAINERS) or ((value or content) and _content(value) != content):
                    return False
        return True


_CONTAINERS = (dict, list, tuple)


_EMPTY = (dict, OrderedDict, list)


_LASTING = (type, FunctionType, BuiltinFunctionType)


def _content(container: Any) -> tuple[Any, ...]:
    if not container:
        return ()
    keys = (*dict.keys(container),) if isinstance(container, dict) else ()
    return type(container), keys, tuple(map(id, items_in(container) or ()))


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """Constants among the attributes of a module, in its containers and objects too; the rest by identity."""
    return tuple((k, _held(v, 2)) for k, v in vars(module).items() if k not in _STRUCTURE)


def _held(v: Any, depth: int) -> Any:
    if isinstance(v, CONSTANTS):
        return v
    if isinstance(v, Tensor):
        return Tensor
    if isinstance(v, dict):
        return (
            (ByIdentity(v), *((_held(k, 0), _held(item, depth - 1)) for k, item in contents_of(v)))
            if depth
            else ByIdentity(v)
        )
    if isinstance(v, (list, tuple)):
        return (type(v), *(_held(item, depth - 1) for item in items_in(v) or ())) if depth else ByIdentity(v)
    if depth == 2 and hasattr(v, "__dict__") and not isinstance(v, (nn.Module, type)) and not callable(v):
        return ByIdentity(v), tuple((k, item) for k, item in vars(v).items() if isinstance(item, CONSTANTS))
    return ByIdentity(v)
