"""What a branch finds besides its weights and its input: attributes and buffers of its modules, hooks, generators, and
what its code may change elsewhere.

Note [What a branch finds]
    A recompute must find all of it as the forward did, and leave no trace. Attributes, hooks and modules below are
    compared by identity with those of the forward: what was assigned, added or removed since is exchanged for a
    recompute, and what the recompute itself assigns is taken back. What may be written to in place is noted besides:
    tensors, arrays and containers among the attributes of modules with code of their own, buffers, and what their code
    may change outside (`outside`). Of a tensor the version counter tells whether a forward wrote to it; a copy is made
    beforehand if it is small, or was seen to be written to before, as in the run of an example. Arrays and containers
    are copied; of long lists and dicts, what was added since is left out. What is large, was never written to before,
    and is read by the same branch, is left for the checks to find; so are items of long lists and dicts that are
    replaced.
    What the code of the modules is, and so what it may change, is looked up once, and again when the modules are others
    or have more or fewer buffers (`Known`).
    Floating-point buffers in train mode, and those of normalisation, are `buffers`' business; here are the others:
    those of modules in eval mode, those that are None, and integers. Weights are that of `weights`; of those that a
    forward was seen to write to (a teacher that follows, a weight that is cut off) copies are made here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from revwire._surroundings.attributes import MISSING, STANDARD
from revwire._surroundings.buffers import undisturbed
from revwire._surroundings.code import is_of_torch
from revwire._surroundings.generators import (
    States,
    drawn_from,
    generators_at,
    generators_in,
    generators_of_all,
    is_generator,
    states_of,
)
from revwire._surroundings.inventory import REQUIRES_GRAD, Inventory, Table, is_written
from revwire._surroundings.modes import NOTHING
from revwire._surroundings.noted import (
    HeldTensor,
    again,
    differs,
    is_written_to,
    kinds_noted,
    note_write,
    noted,
    was_changed,
)
from revwire._surroundings.outside import EVERYWHERE, NOTHING_REACHED, Reached, put, reached
from revwire._torch import HOOKS_OF_ALL, ModuleWithStatistics, hooks_of

_SHARDED = "torch.distributed.fsdp.fully_sharded_data_parallel"
"""Whose modules change their attributes in forward and backward, and know why."""


class Found(NamedTuple):
    """What the modules of a branch were found to have.

    Attributes:
        modules, size: their identities, in order, and how many buffers and modules they have, by which they are known
            again.
        own: the numbers of those with code of their own, in that order.
        buffers: (number of the module, name) of those that are looked at here.
        weights: (number of the module, name) of those that a forward was seen to write to.
        drawing: (number of the module, name) of attributes with generators in them.
        reached: what their code may change, and draw from.
    """

    modules: list[int]
    size: int
    own: list[int]
    buffers: list[tuple[int, str]]
    weights: list[tuple[int, str]]
    drawing: list[tuple[int, str]]
    reached: Reached

    @classmethod
    def of(cls, owned: Inventory) -> Found:
        """What these modules have now."""
        modules = [*owned.modules.values()]
        own = [i for i, m in enumerate(modules) if not (is_of_torch(type(m)) or type(m).__module__ == _SHARDED)]
        return cls(
            [*owned.modules],
            owned.size,
            own,
            [(i, name) for i, m in enumerate(modules) for name in _buffers_of(m)],
            [(i, name) for i, m in enumerate(modules) for name, w in m._parameters.items() if _is_moved(w)],
            [
                (i, name)
                for i in own
                for name, value in vars(modules[i]).items()
                if name not in STANDARD and next(generators_in(value), None) is not None
            ],
            reached(modules),
        )


class Known:
    """What was found in the modules of a branch, as long as these are the same.

    Attributes:
        draws: in eval and in train mode, whether a forward draws from the generators of Python and NumPy: not known
            before the first one; then, where the code says so, or once one was seen to.
    """

    __slots__ = ("draws", "last")

    def __init__(self) -> None:
        self.last: Found | None = None
        self.draws: list[bool | None] = [None, None]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied model has other modules."""
        return Known, ()

    def found(self, owned: Inventory) -> Found:
        """What these modules have; looked up if they are others."""
        last = self.last
        if last is None or last.size != owned.size or last.modules != [*owned.modules]:
            last = self.last = Found.of(owned)
        return last

    def note_moved(self, owned: Inventory) -> bool:
        """A forward has ended: whether it wrote to weights of which there is no copy; the next one makes copies."""
        moved = owned.moved()
        for weight in moved:
            note_write(weight)
            self.last = None
        return bool(moved)


def _is_moved(weight: Any) -> bool:
    """Whether a forward was seen to write to this weight. (Others than plain ones belong to sharding.)"""
    return type(weight) is nn.Parameter and is_written_to(weight)


def _buffers_of(module: nn.Module) -> list[str]:
    """Names of the buffers that are looked at here. (Those of a scripted module, whose table is no dict, are `buffers`'
    business alone.)
    """
    buffers = module._buffers
    if not isinstance(buffers, dict):
        return []  # type: ignore[unreachable]
    counts = isinstance(module, ModuleWithStatistics)
    return [name for name, b in buffers.items() if not (counts and (b is None or is_written(b)))]


Standing = tuple[Any, Any, Any]
"""(table, name, value): what stands there, or is to."""

Hooks = list[tuple[dict[Any, Any], dict[Any, Any]]]
"""Tables of hooks, each with what it held."""

_NOTED = object()
"""Stands in a copy of attributes for one that was `noted`."""


@dataclass(slots=True)
class Held:
    """What a forward found.

    Attributes:
        owned: the modules of the branch.
        values: what stood where, as `noted`.
        generators: those that may draw, with their states.
        hooks: those around the forwards of the modules; none: there were none.
        reached: what the code of the branch may change, and draw from.
        read: what stood where it reads.
    """

    owned: Inventory
    values: Sequence[Standing]
    generators: States
    hooks: Hooks
    reached: Reached = NOTHING_REACHED
    read: Sequence[Any] = ()

    @classmethod
    def by(cls, known: Known, owned: Inventory, training: bool) -> Held:
        """What the modules of a branch hold now."""
        found, drawn = known.found(owned), known.draws[training]
        hooked = any(HOOKS_OF_ALL) or any(map(any, map(hooks_of, owned.modules.values())))
        drawing = [*found.reached.generators, *(() if drawn is False else generators_of_all())]
        unseen = found.reached.unseen
        values = _attributes_noted(owned, found.own, drawing, unseen=unseen) if found.own else []
        for number, name in found.drawing:
            drawing.extend(generators_in(owned.attributes[number][0].get(name)))
        modules = [*owned.modules.values()]
        for number, name in found.buffers:
            module = modules[number]
            value = module._buffers.get(name, MISSING)
            if not (module.training and isinstance(value, Tensor) and value.is_floating_point()):
                values.append((module._buffers, name, noted(value, drawing, unseen=unseen)))
        for number, name in found.weights:
            values += _weight_noted(modules[number]._parameters, name, owned, unseen=unseen)
        for table, name in found.reached.places:
            values.append((table, name, noted(table.get(name, MISSING), drawing, unseen=True)))
        hooks = [(t, t.copy()) for t in _tables_of_hooks(owned)] if hooked else []
        states = states_of(drawing) if drawing else []
        reads = found.reached.reads
        return cls(owned, values, states, hooks, found.reached, reads.now() if reads else ())

    def undisturbed(self, writers: Iterable[nn.Module]) -> AbstractContextManager[None]:
        """Keep other threads from exchanging what these modules hold, and what the code of the branch may change."""
        modules = self.owned.modules.values() if self.reached.changes else writers
        return undisturbed(modules, EVERYWHERE) if self.reached.places else undisturbed(modules)

    def settle(self, known: Known, training: bool) -> None:
        """After the forward: forget the generators that it did not draw from."""
        if self.generators:
            self.generators = drawn_from(self.generators)
        if known.draws[training] is None:
            shared = generators_of_all()
            drawn = any(g is s for g, _ in self.generators for s in shared)
            known.draws[training] = drawn or (known.last is not None and known.last.reached.draws)

    def was_changed(self) -> bool:
        """Whether a run since drew from generators, or wrote to anything."""
        values = (was_changed(then, table.get(name, MISSING)) for table, name, then in self.values)
        return bool(drawn_from(self.generators)) or bool(self._differences()) or any(values)

    def found_again(self) -> AbstractContextManager[None]:
        """Let a recompute find all as the forward did, and leave no trace."""
        owned = self.owned
        if (
            self.values
            or self.generators
            or self.hooks
            or self.reached.changes
            or any(HOOKS_OF_ALL)
            or any(map(any, map(hooks_of, owned.modules.values())))
            or sum(map(len, owned.inner)) != owned.size
            or [*map(REQUIRES_GRAD, owned.weights)] != owned.trained
            or (self.reached.reads and self.reached.reads.differing(self.read))
        ):
            return self._exchanged()
        for table, then in chain(owned.attributes, owned.below):
            if len(table) != len(then) or not all(map(is_, table.values(), then.values())):
                return self._exchanged()
        return NOTHING

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        owned = self.owned
        settings = self.reached.reads.differing(self.read) if self.reached.reads else []
        exchanged, places = [*settings, *self._differences()], [(t, n, t.get(n, MISSING)) for t, n, _ in settings]
        for table, name, then in self.values:
            value = table.get(name, MISSING)
            places.append((table, name, value))
            if differs(then, value):
                exchanged.append((table, name, again(then)))
        now = [w.requires_grad for w in owned.weights]
        before = self.hooks or [(t, {}) for t in _tables_of_hooks(owned)]
        hooks = [(t, t.copy() if t else {}) for t, _ in before]
        attributes = [(t, t.copy()) for t, _ in owned.attributes]
        tables = [(t, t.copy()) for t in owned.inner if isinstance(t, dict)]
        with generators_at(self.generators) if self.generators else NOTHING:
            try:
                _train(owned.weights, owned.trained)
                _refill(before)
                put(exchanged)
                yield
            finally:
                put(_differences(attributes))
                _refill((*tables, *hooks))
                put(places)
                _train(owned.weights, now)

    def _differences(self) -> list[Standing]:
        """What is another now than it was, or was not there, but for what was `noted`."""
        owned = self.owned
        out = _differences(chain(owned.attributes, owned.below))
        if sum(map(len, owned.inner)) != owned.size:
            known = {id(table): then for table, then, _ in owned.tables} | {
                id(table): then for table, then in owned.below
            }
            for table in owned.inner:
                out += [(table, name, MISSING) for name in table if name not in known.get(id(table), ())]
        return out


def _attributes_noted(owned: Inventory, own: list[int], drawing: list[Any], *, unseen: bool) -> list[Standing]:
    """What may be written to among the attributes of these modules, by number: `_NOTED` is in its place in copies."""
    values, kinds = list[Standing](), kinds_noted("numpy.random" in sys.modules)
    for number in own:
        table, then = owned.attributes[number]
        for name, value in then.items():
            if not (type(value) in kinds or isinstance(value, Tensor)) or name in STANDARD:
                continue
            if is_generator(value):
                drawing.append(value)
                continue
            values.append((table, name, noted(value, drawing, unseen=unseen)))
            then[name] = _NOTED  # it may be of a graph, which the copy must not own
    return values


def _weight_noted(table: dict[str, Any], name: str, owned: Inventory, *, unseen: bool) -> list[Standing]:
    """A weight that a forward may write to, as this one finds it."""
    weight = table.get(name)
    if weight is None or not _is_moved(weight):
        return []
    owned.copied(weight)
    return [(table, name, HeldTensor(weight, unseen=unseen))]


NO_HOLDINGS = Held(Inventory.of(()), (), (), [])
"""Those of no modules."""


def _tables_of_hooks(owned: Inventory) -> Iterable[dict[int, Any]]:
    return chain(HOOKS_OF_ALL, *map(hooks_of, owned.modules.values()))


def _differences(tables: Iterable[tuple[Table, Table]]) -> list[Standing]:
    """Where something else stands in tables than stood there."""
    out = list[Standing]()
    for table, then in tables:
        if len(table) != len(then) or not all(map(is_, table.values(), then.values())):  # else in the same order, too
            out += [(table, n, v) for n, v in then.items() if v is not _NOTED and table.get(n, MISSING) is not v]
            out += [(table, n, MISSING) for n in table if n not in then]
    return out


def _refill(tables: Iterable[tuple[dict[Any, Any], dict[Any, Any]]]) -> None:
    """Let tables hold what they held, in that order."""
    for table, contents in tables:
        if not (table or contents):  # as most tables of hooks
            continue
        if [*table] != [*contents] or not all(map(is_, table.values(), contents.values())):
            table.clear()
            table.update(contents)


def _train(weights: Sequence[Tensor], wanted: Sequence[bool]) -> None:
    """Let each of these want a gradient, or none."""
    for weight, wants in zip(weights, wanted, strict=True):
        if weight.requires_grad != wants:
            weight.requires_grad_(wants)
