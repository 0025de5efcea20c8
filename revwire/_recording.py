"""What a run of a module leaves behind: values, events, reads. Data only; `_trace` writes it, `_chains` and `_graph` read it."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

ADDITIONS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})
PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "matmul", "linear", "convolution", "_convolution")
)
_CASTS = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default})
CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    type(Ellipsis),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
IDENTITIES = (type, Enum, FunctionType, BuiltinFunctionType, MethodType, nn.Module, torch.Generator)
"""Objects that Python decides on by what they are, not by what they hold."""

HIDDEN = {
    "data": "decides on the values of a tensor in Python ({})",
    "state": "changes {}",
    "object": "looks into the {} that it is given",
    "random": "draws {}",
}
"""The kinds of `Read` that a graph cannot hold, and how to say so."""

ASSIGNS = "assigns to its attribute"
"""How the entries of `Event.changes` begin that are about attributes."""

Modes = tuple[bool, bool, tuple[tuple[str, bool, torch.dtype], ...]]
"""(gradients enabled, inference mode, (device type, autocast enabled, its dtype) ...)."""


@dataclass(frozen=True)
class Ref:
    """In a recorded argument or result: the tensor with this value number."""

    value: int


@dataclass(frozen=True, eq=False)
class Opaque:
    """In a recorded argument or result: an object that is neither a tensor nor a plain constant (a cache, a config).

    ``fields`` are the recorded fields of a dataclass instance, from which an equal one can be made; else None.
    """

    obj: Any
    fields: dict[str, Any] | None = None


@dataclass
class Value:
    """One tensor as it was between two writes to it.

    ``event`` is its producer (-1: it existed before). ``existing`` is the tensor itself, and ``names`` its qualified
    names in the root, where it existed before. ``storage`` is equal for tensors that share memory. ``dynamic``: its
    shape may depend on the values of other tensors. ``custom``: a custom autograd function that was not seen gave it
    another gradient than its producer would. ``largest`` is its largest magnitude, measured for what enters or
    leaves an addition.
    """

    number: int
    event: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    existing: Tensor | None = None
    names: tuple[str, ...] = ()
    storage: int = -1
    dynamic: bool = False
    custom: bool = False
    largest: float = 0.0


@dataclass
class Event:
    """A call of a torch function or of a module.

    ``parent`` is the module call around it (-1: none). A module call ends before event ``end``. ``writes`` holds
    (value before, value after) for each tensor that was written in place, under each of its names. ``view``: the result
    is a re-reading of the input's storage with all its elements, or a copy of them in another shape or layout.
    ``saved``: bytes that autograd would keep for it.
    ``dynamic``: some kernel makes a shape out of values (``nonzero``, a boolean index). ``modes`` are those it ran under.
    ``opaque``: a call that shows nothing of what it does inside. ``hooked``: a module call whose own hooks are in it,
    around a second call of the module that is its forward alone. ``changes`` names what a module call changed besides
    tensors: attributes, containers; ``assigned`` holds the attributes.
    """

    number: int
    target: Any
    is_module: bool
    parent: int
    args: Any = ()
    kwargs: Any = None
    out: Any = None
    end: int = 0
    writes: tuple[tuple[int, int], ...] = ()
    kernels: list[Any] = field(default_factory=list)
    view: bool = False
    saved: int = 0
    modes: Modes = (True, False, ())
    dynamic: bool = False
    opaque: bool = False
    hooked: bool = False
    changes: tuple[str, ...] = ()
    assigned: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def is_addition(self) -> bool:
        """Two tensors added element by element, nothing else."""
        if self.is_module:
            return False
        kernels = [k for k in self.kernels if k not in _CASTS]
        scaled = "alpha" in (self.kwargs or {}) or len(self.args) > 2
        return len(kernels) == 1 and kernels[0] in ADDITIONS and not scaled and len(list(refs((self.args, self.kwargs)))) == 2

    @property
    def is_product(self) -> bool:
        """Some kernel multiplies by a matrix or convolves."""
        return any(k.overloadpacket in PRODUCTS for k in self.kernels if hasattr(k, "overloadpacket"))

    @property
    def is_pointwise(self) -> bool:
        """Every kernel works element by element (by its own declaration)."""
        kernels = [k for k in self.kernels if k not in _CASTS]
        return bool(kernels) and all(torch.Tag.pointwise in k.tags for k in kernels)


@dataclass(frozen=True)
class Read:
    """What Python looked at, or did, that a graph does not hold, inside the module call ``parent``.

    ``kind``: ``"shape"`` of a tensor, ``"data"`` in one, ``"state"`` of a tensor assigned, an ``"object"`` among the
    arguments, ``"random"`` numbers of Python's own.
    """

    kind: str
    name: str
    parent: int


@dataclass
class Recording:
    """All that one run did. ``events[0]`` is the call of the root module."""

    root: nn.Module
    module_names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)

    def cut(self, call: int) -> Recording:
        """The recording of one module call, as if its module had been the root."""
        top = self.events[call]
        inside = self.events[call : top.end]
        numbers = {r.value for e in inside for r in refs((e.args, e.kwargs, e.out, [Ref(w) for p in e.writes for w in p]))}
        renumber = {old: new for new, old in enumerate(sorted(numbers))}
        prefixes = [f"{n}." if n else "" for n in self.module_names.get(id(top.target), ())]
        out = Recording(top.target, {k: _within(v, prefixes, "") for k, v in self.module_names.items()})
        for old, new in renumber.items():
            v = self.values[old]
            event = v.event - call if call <= v.event < top.end else -1
            out.values.append(dataclasses.replace(v, number=new, event=event, names=_within(v.names, prefixes)))
        for e in inside:
            args, kwargs, result = (renumbered(s, renumber) for s in (e.args, e.kwargs, e.out))
            writes = tuple((renumber[a], renumber[b]) for a, b in e.writes)
            copy = dataclasses.replace(e, args=args, kwargs=kwargs, out=result, writes=writes)
            copy.number, copy.parent, copy.end = e.number - call, -1 if e is top else e.parent - call, e.end - call
            out.events.append(copy)
        out.reads = [dataclasses.replace(r, parent=r.parent - call) for r in self.reads if call <= r.parent < top.end]
        return out

    def hidden(self, calls: Iterable[int]) -> str | None:
        """What these module calls do in their own code that a graph cannot hold, or None. The first one's hooks do not count."""
        _, *others = calls = sorted(calls)
        for read in self.reads:
            if read.parent in calls and read.kind in HIDDEN:
                return HIDDEN[read.kind].format(read.name)
        for event in (self.events[n] for n in calls):
            if event.changes:
                return event.changes[0]
        for module in (self.events[n].target for n in others):
            if has_hooks(module):
                return f"must open a {type(module).__name__} on which hooks are registered, and they would not run"
        return None

    def calls_around(self, number: int) -> tuple[int, ...]:
        """The module calls around an event, outermost first."""
        out = []
        parent = self.events[number].parent
        while parent >= 0:
            out.append(parent)
            parent = self.events[parent].parent
        return tuple(reversed(out))


def _within(names: tuple[str, ...], prefixes: list[str], own: str | None = None) -> tuple[str, ...]:
    """Qualified names relative to a module whose own names, with a dot, are ``prefixes``."""
    inside = [n[len(p) :] for p in prefixes for n in names if n.startswith(p)]
    exact = [own for p in prefixes for n in names if own is not None and f"{n}." == p]
    return tuple(dict.fromkeys([*exact, *inside]))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the forward of a module, its own or global ones."""
    registry = nn.modules.module
    return any(getattr(module, h) for h in _HOOKS) or bool(registry._global_forward_hooks or registry._global_forward_pre_hooks)


# -- nested structures -------------------------------------------------------------------------------------------------


def is_constant(leaf: Any) -> bool:
    """Whether a leaf is a plain constant, or one of NumPy's scalars, which count as such."""
    numpy = sys.modules.get("numpy")
    return isinstance(leaf, CONSTANTS) or (numpy is not None and isinstance(leaf, numpy.generic))


def plain(leaf: Any) -> Any:
    """A constant of a subclass (NumPy's scalars, an int enum) as the plain one that a graph can spell."""
    if not isinstance(leaf, CONSTANTS):
        return leaf.item()
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    for kind in kinds:
        if isinstance(leaf, kind):
            return leaf if type(leaf) is kind else kind(leaf)
    return leaf


def is_named_tuple(structure: Any) -> bool:
    """Whether this is a ``NamedTuple`` (made from its items one by one)."""
    return isinstance(structure, tuple) and hasattr(structure, "_fields")


def is_sequence(structure: Any) -> bool:
    """Lists and tuples whose items say all about them: the plain ones, named tuples, ``torch.Size`` and torch's results."""
    if type(structure) in (list, tuple, torch.Size) or is_named_tuple(structure):
        return True
    return isinstance(structure, tuple) and type(structure).__module__.startswith("torch.return_types")


def is_mapping(structure: Any) -> bool:
    """Dicts whose items say all about them."""
    return type(structure) in (dict, OrderedDict)


def mapped(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """A structure with ``leaf`` applied to all that is no list, tuple, dict or slice (nor such an `Opaque` with fields)."""
    if is_sequence(structure):
        items = [mapped(s, leaf) for s in structure]
        if isinstance(structure, list):
            return items
        if is_named_tuple(structure):
            return type(structure)(*items)
        return tuple(items) if type(structure) is torch.Size else type(structure)(items)
    if is_mapping(structure):
        return type(structure)((k, mapped(v, leaf)) for k, v in structure.items())
    if isinstance(structure, slice):
        return slice(*(mapped(s, leaf) for s in (structure.start, structure.stop, structure.step)))
    if isinstance(structure, Opaque) and structure.fields is not None:
        return Opaque(structure.obj, {k: mapped(v, leaf) for k, v in structure.fields.items()})
    return leaf(structure)


def leaves_of(structure: Any, into_objects: bool = True) -> Iterator[Any]:
    """What `mapped` would apply its function to, in order; or an `Opaque` as one leaf, even if it has fields."""
    if is_sequence(structure):
        for item in structure:
            yield from leaves_of(item, into_objects)
    elif is_mapping(structure):
        for item in structure.values():
            yield from leaves_of(item, into_objects)
    elif isinstance(structure, slice):
        yield from leaves_of((structure.start, structure.stop, structure.step), into_objects)
    elif isinstance(structure, Opaque) and structure.fields is not None and into_objects:
        yield from leaves_of(structure.fields)
    else:
        yield structure


def renumbered(structure: Any, numbers: dict[int, int]) -> Any:
    """A recorded structure with its values renumbered."""
    return mapped(structure, lambda s: Ref(numbers[s.value]) if isinstance(s, Ref) else s)


def refs(structure: Any) -> Iterator[Ref]:
    """The `Ref`s in a recorded structure, in order."""
    return (leaf for leaf in leaves_of(structure) if isinstance(leaf, Ref))


def tensors_in(structure: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts, slices and dataclasses of any kind, in order."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from tensors_in(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from tensors_in(item)
    elif isinstance(structure, slice):
        yield from tensors_in((structure.start, structure.stop, structure.step))
    elif dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        yield from tensors_in(list(vars(structure).values()) if hasattr(structure, "__dict__") else [])
