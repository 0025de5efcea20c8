"""Units that are open while a host's code is followed: from where it first uses a state to the residual add."""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from revwire._capture.reads import name_of
from revwire._forwards.host import Host, Planned
from revwire._programs.calls import writable
from revwire._runtime.links import LINK, Link, link_of
from revwire._runtime.live import begun, ended
from revwire._runtime.run import relayout
from revwire._runtime.segment import Segment
from revwire._runtime.unit import Unit
from revwire._search.places import found_at
from revwire._structures import mapped, tensors_of
from revwire._torch import inside_checkpoint, storage_id

_IN_PLACE = ("add_", "__iadd__")

_COPYING_VIEWS = frozenset({"reshape", "flatten", "contiguous", "reshape_as"})


class OpenUnit:
    """The calls that the code has made with a state, and the unit that they are to be.

    Attributes:
        raw: the tensor that it began with; where that began a chain, another one, ``segment.x``, takes its place.
        adds: sums so far that its own might have been.
        posts: calls since its sum; -1 before it.
        since: the number of its sum.
        f: what the branch gave, where the sum may yet be handed back.
    """

    __slots__ = ("adds", "f", "planned", "posts", "raw", "segment", "since", "units")

    def __init__(self, units: OpenUnits, planned: Planned, segment: Segment, raw: Tensor) -> None:
        self.units, self.planned, self.segment, self.raw = units, planned, segment, raw
        self.adds, self.posts, self.since = 0, -1, 0
        self.f: Tensor | None = None
        if raw is not segment.x:
            segment.values.is_state(raw)

    def added(self, func: Any, args: Any, given: list[Tensor]) -> Any:
        """An addition of two tensors."""
        segment, place = self.segment, self.planned.place
        first, second = args
        numbers = segment.number(first), segment.number(second)
        summed = self.posts < 0 and None not in numbers and first is not second
        if numbers[0] == 0 and name_of(func) in _IN_PLACE:  # it writes over the state, which the step needs
            summed = False
        if summed and (0 in numbers or not place.literal):
            self.adds += 1
            if self.adds == place.adds and _keeps_shape(segment.x, first, second):
                return self._sum(func, args, given, numbers)
        elif summed and place.adds == 1 and _is_sum_of_skip(segment, first, second):
            segment.latest = segment.make(func, args, {}, func, given)
            return self._close(segment.latest, self.planned.as_block())
        return self.after(func, given, segment.make(func, args, {}, func, given))

    def _sum(self, func: Any, args: Any, given: list[Tensor], numbers: Any) -> Any:
        """The residual add."""
        segment, place, unit = self.segment, self.planned.place, self.planned.unit
        f = args[1] if numbers[0] == 0 else args[0]
        if place.idle and not place.block:
            self.f = f
        elif not place.block and not place.posts:
            new = self.step(f, unit, _strides_of_sum(segment.x, *args))
            if new is None:
                return func(*args)
            if args[0] is f and name_of(func) in _IN_PLACE:
                self.units.instead[id(f)] = ref(f), new, True
            return new
        if place.drops:
            out = segment.make(writable, (f,), {}, writable, [f]) if place.writes else f
        else:
            out = segment.make(func, args, {}, func, given)
        return self._summed(out)

    def _summed(self, out: Tensor) -> Any:
        """The residual add was made, and is part of a block."""
        self.posts, self.segment.latest, self.since = 0, out, self.segment.number(out) or 0
        return out if self.planned.place.posts or self.planned.place.idle else self._close(out, self.planned.unit)

    def after(self, function: Any, given: list[Tensor], out: Any) -> Any:
        """A call of a unit was made: it may be its sum, one on the way of the skip, or the last one behind the sum."""
        if self.posts < 0:
            return self._on_the_way(function, given, out)
        if any((self.segment.number(t) or -1) >= self.since for t in given):
            self.posts += 1
            return self._behind_the_sum(out)
        return out

    def _on_the_way(self, function: Any, given: list[Tensor], out: Any) -> Any:
        segment, place = self.segment, self.planned.place
        if place.spelled is not None and name_of(function) == place.spelled:
            self.adds += 1
            if self.adds == place.adds and _has_shape_of(segment.x, out):
                return self._summed(out)
        skips = given and given[0] is segment.skip and self.units.host.is_light(function)
        if skips and _has_shape_of(segment.x, out):
            segment.skip = out
        return out

    def _behind_the_sum(self, out: Any) -> Any:
        segment, place, unit = self.segment, self.planned.place, self.planned.unit
        last = self.posts >= place.posts + place.idle
        if out is segment.latest and (self.f is not None or place.block):  # it was handed back
            if not last:
                return out
            new = self._close(out if self.f is None else self.f, unit)
            if new is not out:  # the code holds the sum, too
                self.units.instead[id(out)] = ref(out), new, False
            return new
        self.f = None
        if not _has_shape_of(segment.x, out):
            return out
        segment.latest = out
        return self._close(out, self.planned.as_block() if place.idle else unit) if last else out

    def _close(self, value: Tensor, unit: Unit) -> Any:
        """End a unit by ``value``: F(x), or the block's; in place of what the code would go on with."""
        new = self.step(value, unit, self.strides_of(value))
        return self.segment.latest if new is None else new

    def strides_of(self, value: Tensor) -> tuple[int, ...] | None:
        """Those of the next state, where a block gives a value that lies otherwise in memory than its state."""
        return None if value.stride() == self.segment.x.stride() else _dense_strides(value)

    def step(self, value: Tensor, unit: Unit, strides: tuple[int, ...] | None = None) -> Tensor | None:
        """The next state, of these strides; None where the unit cannot be stepped, and runs on as it was written."""
        self.units.open.remove(self)
        self.units.stepped_inside |= inside_checkpoint()
        new = ended(self.segment, value, unit, strides)
        self.units.views[id(self.planned.slot.chain)] = self.planned.place.views[1]
        if new is None:
            self.segment.let_go()
            self.units.host.tell(
                unit, "its state was written in place, or left for another gradient mode, before its add"
            )
        return new


class OpenUnits:
    """Those of one call of a host.

    Attributes:
        forks: tensors with which chains may begin, by identity.
        counts: calls so far, by name.
        views: how many views of a state may still come, by the identity of its chain.
        instead: the new states that stand for sums which the code holds under other names, by the identity of these; as
            long as somebody holds them. Those that the code writes to are written: whoever else holds them looks there.
        gradients: whether they were enabled when the host was called.
        stepped_inside: a step was made inside of the code's own checkpointing, which would run again without it.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.open: list[OpenUnit] = []
        self.forks: dict[int, tuple[Tensor, Planned]] = {}
        self.counts: dict[str, int] = {}
        self.views = host.views.copy()
        self.instead: dict[int, tuple[ReferenceType[Tensor], Tensor, bool]] = {}
        self.gradients = torch.is_grad_enabled()
        self.stepped_inside = False

    def let_go(self) -> None:
        """What is still open keeps its activations."""
        for one in self.open:
            one.segment.let_go()
        self.open.clear()

    def owner(self, given: list[Tensor], module: nn.Module | None) -> OpenUnit | None:
        """The unit to which a call with these tensors belongs, begun now if need be."""
        best: OpenUnit | None = None
        waiting: tuple[Planned, Tensor, Link | None] | None = None
        for t in given:
            for one in self.open:
                if one.segment.number(t) is not None:
                    if best is None or one.planned.number < best.planned.number:
                        best = one
                    break
            else:
                found = self._start(t, module)
                if found is not None and (waiting is None or found[0].number < waiting[0].number):
                    waiting = found
        if waiting is None or (best is not None and best.planned.number < waiting[0].number):
            return best
        return self.begun(*waiting)

    def _start(self, t: Tensor, module: nn.Module | None) -> tuple[Planned, Tensor, Link | None] | None:
        """The unit that begins with a tensor, if one does."""
        if getattr(t, LINK, None) is not None or t._base is not None:
            for units in self.host.chains.values():
                link = link_of(t, units[0].slot.chain)
                if link is None:
                    continue
                p = self.host.next_unit(link.tape.chain, link.tape.position, module)
                if p is not None:
                    return p, t, link
        fork = self.forks.get(id(t)) if self.forks else None
        if fork is None or fork[0] is not t or not may_begin(t) or any(one.planned is fork[1] for one in self.open):
            return None
        return fork[1], t, None

    def is_expected(self, t: Tensor) -> bool:
        """Whether a tensor is a part of a unit of this host, or its next unit begins with it."""
        fork = self.forks.get(id(t))
        if (fork is not None and fork[0] is t) or any(one.segment.number(t) is not None for one in self.open):
            return True
        links = (link_of(t, units[0].slot.chain) for units in self.host.chains.values())
        return any(link is not None and self.host.has_unit(link.tape.chain, link.tape.position) for link in links)

    def viewed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A view of a state before a unit, or behind it, as a view of both streams; None for any other call."""
        x = args[0] if args else None
        link = getattr(x, LINK, None)
        if x is None or link is None or not self.views.get(id(link.tape.chain)) or any(o.raw is x for o in self.open):
            return None
        y = func(*args, **kwargs)
        if not isinstance(y, Tensor) or y is x or y.numel() != x.numel():
            return None
        if storage_id(y.untyped_storage()) != storage_id(x.untyped_storage()) and name_of(func) not in _COPYING_VIEWS:
            return None
        self.views[id(link.tape.chain)] -= 1
        others = args[1:]  # what is made of them here must not hold x
        return relayout(link.tape.chain, lambda t: func(t, *others, **kwargs), x)

    def begun(self, p: Planned, x: Tensor, link: Link | None) -> OpenUnit:
        """Begin a unit on a tensor."""
        if torch.is_grad_enabled() == self.gradients:
            segment = begun(p.slot.chain, p.unit, self.host.module, x, link)
        else:  # a part of the branch, without gradients, is its first call
            with torch.set_grad_enabled(self.gradients):
                segment = begun(p.slot.chain, p.unit, self.host.module, x, link)
        one = OpenUnit(self, p, segment, x)
        self.open.append(one)
        self.forks.pop(id(x), None)
        return one

    def with_state(self, one: OpenUnit, args: Any, kwargs: Any, given: list[Tensor]) -> tuple[Any, Any, list[Tensor]]:
        """Where a chain began, what its streams hold takes the place of the tensor that it began with."""
        raw, x = one.raw, one.segment.x
        if raw is x or not any(t is raw for t in given):
            return args, kwargs, given
        args, kwargs = mapped((args, kwargs), lambda leaf: x if leaf is raw else leaf)
        return args, kwargs, tensors_of(args, kwargs)

    def expect(self, p: Planned, t: Any) -> None:
        """A chain may begin with a tensor."""
        if isinstance(t, Tensor):
            self.forks[id(t)] = t, p

    def met(self, target: str, out: Any) -> None:
        """Such a call was made that a chain may begin with its result."""
        number = self.counts.get(target, 0)
        self.counts[target] = number + 1
        for p in self.host.by_call[target].get(number, ()):
            assert p.place.origin is not None
            self.expect(p, found_at(p.place.origin.path, out))

    def passed(self, out: Any) -> None:
        """A state went through units of other hosts: views may come before the next unit of this one."""
        for t in tensors_of((out,), None):
            link = getattr(t, LINK, None)
            if not isinstance(link, Link):
                continue
            p = self.host.next_unit(link.tape.chain, link.tape.position, None)
            if p is not None and p.place.views[0]:
                self.views[id(p.slot.chain)] = p.place.views[0]

    def leave(self, args: Any) -> None:
        """An attribute of a tensor is set: what it is part of is no unit."""
        for one in [o for o in self.open for t in args if isinstance(t, Tensor) and o.segment.number(t) is not None]:
            if one in self.open:
                self.open.remove(one)
                one.segment.let_go()
                self.host.tell(one.planned.unit, "its host sets an attribute of a tensor that its branch uses")

    def renamed(self, structure: Any) -> Any:
        """A sum that was to be written over a tensor is the new state, under that tensor's name too."""
        for number in [n for n, (old, *_) in self.instead.items() if old() is None]:
            del self.instead[number]
        if not self.instead:
            return structure

        def new(leaf: Any) -> Any:
            found = self.instead.get(id(leaf))
            return leaf if found is None or found[0]() is not leaf else found[1]

        return mapped(structure, new)

    def write(self) -> None:
        """At the end of the call: who still holds a tensor over which a sum was to be written finds it there."""
        for old, new, written in self.instead.values():
            tensor = old() if written else None
            if tensor is not None:
                tensor.copy_(new)
        self.instead.clear()


def _strides_of_sum(x: Tensor, first: Tensor, second: Tensor) -> tuple[int, ...] | None:
    """The strides of a sum, where they are not those of the state ``x``: a sum is laid out as its first operand."""
    if first.stride() == x.stride():
        return None
    a, b = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in (first, second))
    return _dense_strides(a + b) if (a + b).stride() != x.stride() else None


def _dense_strides(value: Tensor) -> tuple[int, ...] | None:
    """The strides of a value of which each element is stored once; else None."""
    strides = value.stride()
    return strides if torch.empty_like(value, device="meta").stride() == strides else None


def may_begin(x: Any) -> bool:
    """Whether a chain may begin with this."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    return x.layout is torch.strided and not x.is_nested


def _keeps_shape(x: Tensor, first: Tensor, second: Tensor) -> bool:
    if first.shape == second.shape:
        return first.shape == x.shape
    return bool(torch.broadcast_shapes(first.shape, second.shape) == x.shape)  # type: ignore[no-untyped-call]


def _has_shape_of(x: Tensor, out: Any) -> bool:
    return isinstance(out, Tensor) and out.shape == x.shape


def _is_sum_of_skip(segment: Segment, first: Tensor, second: Tensor) -> bool:
    """Whether something is added, not to the state, but to what came from it by calls without weights."""
    skip = segment.skip
    if skip is segment.x or not (first is skip or second is skip):
        return False
    return first.shape == second.shape == segment.x.shape
