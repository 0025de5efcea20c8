"""A host, as its own code is followed: the units that it holds, and the modules that it may call."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from revwire._forwards.base import standing_forward
from revwire._forwards.leaf import are_leaves, make_leaf
from revwire._forwards.rewired import RewiredForward
from revwire._programs.calls import Slot
from revwire._runtime.chain import Chain
from revwire._runtime.unit import Unit
from revwire._search.places import Layout, Origin, Place
from revwire._surroundings.holdings import Known


class Planned:
    """A unit of a host: its slot, and how it shows in the host's code."""

    __slots__ = ("number", "place", "slot", "unit")

    def __init__(self, number: int, slot: Slot, place: Place) -> None:
        self.number, self.slot, self.place = number, slot, place
        self.unit = Unit(
            slot.path,
            slot.index,
            "block" if place.block else "residual",
            _no_branch,
            partial(_modules_of, place.modules),
            slot.later,
            line=place.line,
            has_branch=False,
        )

    def as_block(self) -> Unit:
        """The unit, where what lies behind its sum is part of it."""
        return self.unit if self.unit.kind == "block" else replace(self.unit, kind="block")


def _no_branch(*_: Any) -> Any:
    raise NotImplementedError("internal: this unit is run by its host's own code; please report this")


def _modules_of(names: tuple[str, ...], host: nn.Module) -> list[nn.Module]:
    return [host.get_submodule(name) for name in names]


_MOST_OPAQUE = 64
"""Custom functions that a host tells apart."""


class Opaque(nn.Module):
    """Stands for a module where code calls something else that no function mode sees into.

    Attributes:
        function: what is called, whose code may read and change what that of a module may.
    """

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("internal: what it stands for is called; please report this")


class Host:
    """One host, with all that is looked up by identity: a copy of the module has another.

    Attributes:
        planned: its units, in order.
        chains: its units of each chain, by the identity of that.
        views: how many views of a state may come before its first unit, by the identity of its chain.
        by_argument: those that begin with an argument.
        by_call: those that begin with the result of a call, by its name, and the number of such calls before.
        names: of the modules below it, by identity, with a dot in front.
        opened: those whose code is followed as its own, by identity.
    """

    def __init__(self, module: nn.Module, slots: list[Slot], layout: Layout) -> None:
        self.module = module
        self.told: set[str] = set()
        self.planned = [Planned(i, s, p) for i, (s, p) in enumerate(zip(slots, layout.places, strict=True))]
        self.chains = {
            id(p.slot.chain): [q for q in self.planned if q.slot.chain is p.slot.chain] for p in self.planned
        }
        self._at = {(id(p.slot.chain), i): p for p in self.planned for i in (p.slot.index, *p.slot.later)}
        self.views = {i: n for i, units in self.chains.items() if (n := units[0].place.views[0])}
        self.by_argument: list[tuple[Planned, Origin]] = []
        self.by_call: dict[str, dict[int, list[Planned]]] = {}
        for p in self.planned:
            origin = p.place.origin
            if origin is not None and origin.call is None:
                self.by_argument.append((p, origin))
            elif origin is not None and origin.call is not None:
                self.by_call.setdefault(origin.call, {}).setdefault(origin.number, []).append(p)
        self._learn(layout)

    def _learn(self, layout: Layout) -> None:
        """Learn its modules, and make them leaves."""
        self.names = {id(module): f".{name}" for name, module in self.module.named_modules()}
        at = {name[1:]: i for i, name in self.names.items()}
        self.opened = {at[name] for name in layout.opened if name in at}
        opened = [self.module, *(self.module.get_submodule(n) for n in layout.opened if n in at)]
        self._below = [m._modules.values() for m in opened if m._modules]
        self._users: dict[int, set[int]] = {}
        for p in self.planned:
            for name in p.place.modules:
                self._users.setdefault(at.get(name, -1), set()).add(p.number)
        self._heavy = {id(m) for m in self.module.modules() if next(m.parameters(), None) is not None}
        self._leaves: dict[int, tuple[bool, Known]] = {}
        self._opaque: dict[int, Opaque] = {}
        make_leaves(self.module)

    @property
    def is_current(self) -> bool:
        """Whether what its code may call are leaves: modules may be exchanged, or compiled, at any time."""
        return all(map(are_leaves, self._below))

    def leaf(self, module: nn.Module) -> tuple[bool, Known]:
        """Of a module that its code calls: whether it holds units of the same chains, so that a state which it is
        given goes on inside; and what is known of it.
        """
        found = self._leaves.get(id(module))
        if found is None:
            forwards = (standing_forward(m) for m in module.modules())
            passes = any(isinstance(f, RewiredForward) and self._shares_chain(f) for f in forwards)
            found = self._leaves[id(module)] = passes, Known()
        return found

    def _shares_chain(self, other: RewiredForward) -> bool:
        return any(id(slot.chain) in self.chains for slot in other.slots)

    def opaque(self, call: Any, args: Any) -> Opaque:
        """What stands for a custom autograd function, by its ``apply``, or for a TorchScript function; the modules that
        it is given are below it.
        """
        function = getattr(call, "__self__", call)
        found = self._opaque.get(id(function))
        if found is None:
            if len(self._opaque) == _MOST_OPAQUE:  # code that makes its functions anew in each call has no end of them
                self._leaves.pop(id(self._opaque.pop(next(iter(self._opaque)))), None)
            found = self._opaque[id(function)] = Opaque(function)
        found._modules = {str(i): a for i, a in enumerate(args) if isinstance(a, nn.Module)}
        return found

    def is_light(self, function: Any) -> bool:
        """Whether what is called has no weights."""
        return id(function) not in self._heavy

    def next_unit(self, chain: Chain, position: int, module: nn.Module | None) -> Planned | None:
        """The unit of a chain that comes first behind a position: of those that call ``module``, if there are any."""
        users = self._users.get(id(module), ()) if module is not None else ()
        expected = self._at.get((id(chain), position))
        if expected is not None and (not users or expected.number in users):
            return expected
        found = [(place, p) for p in self.chains.get(id(chain), ()) if (place := p.unit.place(position)) is not None]
        return min(found, key=lambda f: (bool(users) and f[1].number not in users, f[0]), default=(0, None))[1]

    def has_unit(self, chain: Chain, position: int) -> bool:
        """Whether the unit at a place of a chain is its own."""
        return (id(chain), position) in self._at

    def tell(self, unit: Unit, what: str) -> None:
        """Warn, once for each unit."""
        if unit.path not in self.told:
            self.told.add(unit.path)
            warnings.warn(f"{unit.where()}: {what}", stacklevel=2)


def make_leaves(host: nn.Module) -> None:
    """Make all modules below a host leaves."""
    for module in host.modules():
        if module is not host:
            make_leaf(module)
