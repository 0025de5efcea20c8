"""What a run of a module leaves behind: values, events, reads. Data only; `recorder` writes it, `_search` and
`_programs` read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revwire._capture.lines import Line, shown
from revwire._capture.products import PRODUCTS
from revwire._structures import Ref, refs, renumbered
from revwire._surroundings.inventory import has_hooks

ADDITIONS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})


SPELLED_SUMS = frozenset(
    getattr(getattr(torch.ops.aten, name + suffix), overload)
    for name, overloads in (
        ("sub", ["Tensor"]),
        ("lerp", ["Scalar", "Tensor"]),
        ("addcmul", ["default"]),
        ("addcdiv", ["default"]),
    )
    for overload in overloads
    for suffix in ("", "_")
)
"""Kernels that add something to their first operand, or take something from it, in other words than an addition."""


_CASTS = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default})


HIDDEN = {
    "data": "decides on the values of a tensor in Python ({})",
    "state": "changes {}",
    "object": "looks into the {} that it is given",
    "random": "draws {}",
}
"""The kinds of `Read` that a graph cannot hold, and how to say so."""


HOOKED = "must open a {} on which hooks are registered, and they would not run"
"""A module whose code would be a part of another one's graph."""


ASSIGNS = "assigns to its attribute"
"""How the entries of `Event.changes` begin that are about attributes."""


def at(line: Line | None) -> str:
    """A line, as it is put behind what is said of it; nothing where it is not known."""
    return f" ({shown(line)})" if line else ""


Modes = tuple[bool, bool, tuple[tuple[str, bool, torch.dtype], ...]]
"""(gradients enabled, inference mode, (device type, autocast enabled, its dtype) ...)."""


@dataclass
class Value:
    """One tensor as it was between two writes to it.

    ``event`` is its producer (-1: it existed before). ``existing`` is the tensor itself, and ``names`` its qualified
    names in the root, where it existed before. ``storage`` is equal for tensors that share memory. ``dynamic``: its
    shape may depend on the values of other tensors. ``custom``: a custom autograd function that was not seen gave it
    another gradient than its producer would. ``largest`` is its largest magnitude, and ``usual`` that of most of
    its elements (`_streams.samples.usual_magnitude`), measured for what enters or leaves an addition. ``wants``: a
    backward pass brings it a gradient.
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
    usual: float = 0.0
    wants: bool = False
    strides: tuple[int, ...] = ()


@dataclass
class Event:
    """A call of a torch function or of a module.

    ``parent`` is the module call around it (-1: none). A module call ends before event ``end``. ``writes`` holds
    (value before, value after) for each tensor that was written in place, under each of its names. ``view``: the result
    is a re-reading of the input's storage with all its elements, or a copy of them in another shape or layout.
    ``keeps``: the memory that autograd would keep for it, as numbers of storages; ``saved``: bytes of it which no event
    before keeps.
    ``dynamic``: some kernel makes a shape out of values (``nonzero``, a boolean index). ``modes`` are those it ran
    under.
    ``opaque``: a call that shows nothing of what it does inside. ``hooked``: a module call whose own hooks are in it,
    around a second call of the module that is its forward alone. ``changes`` names what a module call changed besides
    tensors: attributes, containers. ``line``: of the code that made it.
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
    keeps: list[int] = field(default_factory=list)
    modes: Modes = (True, False, ())
    dynamic: bool = False
    opaque: bool = False
    hooked: bool = False
    changes: tuple[str, ...] = ()
    line: Line | None = None

    @property
    def at(self) -> str:
        """Its line, as it is put behind what is said of it: `` (model.py:12)``."""
        return at(self.line)

    @property
    def is_addition(self) -> bool:
        """Two tensors added element by element, nothing else."""
        if self.is_module:
            return False
        kernels = [k for k in self.kernels if k not in _CASTS]
        scaled = "alpha" in (self.kwargs or {}) or len(self.args) > 2
        return (
            len(kernels) == 1
            and kernels[0] in ADDITIONS
            and not scaled
            and len(list(refs((self.args, self.kwargs)))) == 2
        )

    @property
    def is_spelled_sum(self) -> bool:
        """A sum that is no plain addition: something is added to, or taken from, the first of its tensors, scaled or
        not.
        """
        if self.is_module or self.is_addition:
            return False
        kernels = [k for k in self.kernels if k not in _CASTS]
        return len(kernels) == 1 and kernels[0] in (SPELLED_SUMS | ADDITIONS)

    @property
    def is_symmetric_sum(self) -> bool:
        """A spelled sum in which either of the first two tensors may be carried on: a scaled addition, an
        interpolation.
        """
        return self.is_spelled_sum and not {"sub", "addcmul", "addcdiv"} & {
            k.overloadpacket.__name__.rstrip("_") for k in self.kernels if k not in _CASTS
        }

    @property
    def stacks(self) -> bool:
        """Tensors stacked, nothing else."""
        return self.target is torch.stack and not self.is_module

    @property
    def sums_up(self) -> bool:
        """The sum over a dimension of one tensor, nothing else."""
        return [k for k in self.kernels if k not in _CASTS] == [torch.ops.aten.sum.dim_IntList] and not self.is_module

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
    line: Line | None = None


@dataclass
class Recording:
    """All that one run did. ``events[0]`` is the call of the root module; ``storages`` has the bytes of each memory,
    ``released`` the first event before which the code that ran had let go of it (autograd keeps nothing in this run);
    ``training``: all modules were in train mode; ``drew``: random numbers were drawn, as far as generators tell that
    belong to nobody; ``derived``: what has been found out about it, once for all who ask.
    """

    root: nn.Module
    module_names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    storages: dict[int, int] = field(default_factory=dict)
    released: dict[int, int] = field(default_factory=dict)
    training: bool = False
    drew: bool = True
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def note_released(self, storage: int) -> None:
        """Note that the code which runs has let go of a memory; the last time counts."""
        self.released[storage] = len(self.events)

    def of_call(self, call: int) -> Recording:
        """The recording of one module call, as if its module had been the root."""
        if ("call", call) not in self.derived:
            self.derived["call", call] = self._of_call(call)
        found: Recording = self.derived["call", call]
        return found

    def _of_call(self, call: int) -> Recording:
        top = self.events[call]
        inside = self.events[call : top.end]
        numbers = {
            r.value for e in inside for r in refs((e.args, e.kwargs, e.out, [Ref(w) for p in e.writes for w in p]))
        }
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
        """What these module calls do in their own code that a graph cannot hold, or None. The first one's hooks do not
        count.
        """
        _, *others = calls = sorted(calls)
        for read in self.reads:
            if read.parent in calls and read.kind in HIDDEN:
                return f"{HIDDEN[read.kind].format(read.name)}{at(read.line)}"
        for event in (self.events[n] for n in calls):
            if event.changes:
                return event.changes[0]
        for call in (self.events[n] for n in others):
            if has_hooks(call.target):
                return f"{HOOKED.format(type(call.target).__name__)}{call.at}"
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
