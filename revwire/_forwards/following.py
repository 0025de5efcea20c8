"""One call of a host whose own code runs, followed: see Note [The host's own code runs] in `live`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revwire._capture.reads import kind_of, name_of
from revwire._programs.calls import Slot, writable
from revwire._runtime.follower import NOW
from revwire._runtime.links import LINK, Link, link_of
from revwire._runtime.live import begun, ended
from revwire._runtime.run import relayout
from revwire._runtime.segment import Segment
from revwire._runtime.unit import Unit
from revwire._search.places import Origin, Place, found_at
from revwire._structures import mapped, tensors_in, tensors_of
from revwire._torch import function_mode, function_modes, pop_function_mode, push_function_mode, storage_id

if TYPE_CHECKING:
    from revwire._forwards.live import LiveForward

_ADDS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})

_COPYING_VIEWS = frozenset({"reshape", "flatten", "contiguous", "reshape_as"})

_METHOD_WRAPPER: Any = type(object.__str__.__get__)

_READS: dict[Any, bool] = {}


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
        )

    def as_block(self) -> Unit:
        """The unit, where what lies behind its sum is part of it."""
        return self.unit if self.unit.kind == "block" else replace(self.unit, kind="block")


def _no_branch(*_: Any) -> Any:
    raise NotImplementedError("internal: this unit is run by its host's own code; please report this")


def _modules_of(names: tuple[str, ...], host: nn.Module) -> list[nn.Module]:
    return [host.get_submodule(name) for name in names]


class _Open:
    """A segment, and the unit that it is to be."""

    __slots__ = ("adds", "f", "planned", "posts", "raw", "segment", "since")

    def __init__(self, planned: Planned, segment: Segment, raw: Tensor) -> None:
        self.planned, self.segment, self.raw = planned, segment, raw
        self.adds, self.posts, self.since = 0, -1, 0
        self.f: Tensor | None = None  # what the branch gave, where the sum may yet be handed back
        if raw is not segment.x:
            segment.numbers[id(raw)] = ref(raw), 0


class Following(TorchFunctionMode):
    """One call of a host."""

    def __init__(self, forward: LiveForward) -> None:
        super().__init__()
        self.forward = forward
        self.open: list[_Open] = []
        self.forks: dict[int, tuple[Tensor, Planned]] = {}
        self.counts: dict[str, int] = {}
        self.views = {i: n for i, units in forward.chains.items() if (n := units[0].place.views[0])}  # still to come
        self.instead: dict[int, tuple[Any, Any]] = {}
        self.gradients = torch.is_grad_enabled()

    # -- the whole call --------------------------------------------------------------------------------------------

    def run(self, args: Any, kwargs: Any) -> Any:
        """Run the host's own code, followed."""
        for p in self.forward.planned:
            if p.place.origin is not None and p.place.origin.call is None:
                self._expect(p, self._argument(p.place.origin, args, kwargs))
        before, NOW.follower = NOW.follower, self
        push_function_mode(self)
        try:
            try:
                out = self.forward.plain(*args, **kwargs)
            finally:
                pop_function_mode()
                NOW.follower = before
            return self._finished(out)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        for one in self.open:
            one.segment.let_go()
        self.open.clear()

    def closed(self, args: Any, kwargs: Any) -> Any:
        """Run a host that is one unit, as one call."""
        p, forward = self.forward.planned[0], self.forward
        assert p.place.origin is not None
        x = self._argument(p.place.origin, args, kwargs)
        link = link_of(x, p.slot.chain) if isinstance(x, Tensor) else None
        if link is not None and p.unit.place(link.tape.position) is None:
            link = None
        if link is None and not _may_begin(x):
            return forward.plain(*args, **kwargs)
        one = self._begun(p, x, link)
        try:
            args, kwargs, given = self._instead_of_raw(one, args, kwargs, tensors_of(args, kwargs))
            make = one.segment.make_module
            out = make(forward.module, args, kwargs, forward.plain, given, forward.about(forward.module))
            for call in one.segment.calls:
                call.function = forward.plain
            value = found_at(p.place.out or (), out)
            if not isinstance(value, Tensor) or value.shape != one.segment.x.shape:
                forward.tell(p.unit, "its output has not the shape of its input in this call; it is not rewired in it")
                return out
            new = self._step(one, value, p.unit)
            return out if new is None else _exchanged(out, value, new)
        finally:
            self._let_go()

    def _finished(self, out: Any) -> Any:
        """What the host's code returns; a unit that is summed, and only lacks calls behind its sum, ends here."""
        for one in [o for o in self.open if o.posts >= 0]:
            latest = one.segment.latest
            if latest.shape == one.segment.x.shape and any(t is latest for t in tensors_in(out)):
                new = self._step(one, latest if one.f is None else one.f, one.planned.unit)
                if new is not None:
                    out = _exchanged(out, latest, new)
        for one in self.open:
            if one.segment.size > 1:
                self.forward.tell(
                    one.planned.unit,
                    "a call of its host did not come to its residual add as the example did; it ran as in the original "
                    "network, and its activations are kept",
                )
        return out

    def _argument(self, origin: Origin, args: Any, kwargs: Any) -> Any:
        found = found_at(origin.path, (args, kwargs))
        if found is None:
            found = found_at(origin.path[2:], self._by_name(origin.path, args, kwargs))
        return found

    def _by_name(self, path: Any, args: Any, kwargs: Any) -> Any:
        """An argument that is given by its name, and was by its place in the example, or the other way round."""
        original = self.forward.original
        code = getattr(type(self.forward.module).forward if original is None else original, "__code__", None)
        names = () if code is None else code.co_varnames[original is None : code.co_argcount]
        if path[0] == 0:
            return kwargs.get(names[path[1]]) if path[1] < len(names) else None
        place = names.index(path[1]) if path[1] in names else len(args)
        return args[place] if place < len(args) else None

    # -- what the host's code calls --------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if NOW.follower is not self:
            return func(*args, **kwargs)
        if self.instead:
            args, kwargs = self._renamed(args, kwargs)
        is_property = type(func) is _METHOD_WRAPPER
        if is_property and func.__name__ == "__set__":
            self._leave(args)
            return func(*args, **kwargs)
        if is_property or _is_read(func):
            out = func(*args, **kwargs)
            if not isinstance(out, Tensor):
                return out
        out = self._viewed(func, args, kwargs) if self.views else None
        given = tensors_of(args, kwargs)
        owner = self._owner(given, None) if out is None else None
        if out is not None:
            pass
        elif owner is None:
            out = func(*args, **kwargs)
        else:
            if owner.raw is not owner.segment.x:
                args, kwargs, given = self._instead_of_raw(owner, args, kwargs, given)
            if is_property:
                out = func(*args)
                owner.segment.note_done(func, args, out)
            elif func in _ADDS and len(args) == 2 and not kwargs and isinstance(args[1], Tensor):
                out = self._added(owner, func, args, given)
            else:
                out = self._after(owner, func, given, owner.segment.make(func, args, kwargs, func, given))
        if self.forward.by_call:
            self._met(name_of(func), out)
        return out

    def module_call(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a module by the host's own code."""
        forward = self.forward
        if id(module) in forward.opened:
            return call(*args, **kwargs)
        popped = function_modes() > 0 and function_mode(function_modes() - 1) is self
        if popped:  # inside of a leaf nothing is followed
            pop_function_mode()
        NOW.follower = None
        try:
            return self._leaf_call(module, call, args, kwargs)
        finally:
            NOW.follower = self
            if popped:
                push_function_mode(self)

    def _leaf_call(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        forward = self.forward
        if self.instead:
            args, kwargs = self._renamed(args, kwargs)
        given = tensors_of(args, kwargs)
        owner = None if forward.passes(module) else self._owner(given, module)
        if owner is None:
            out = call(*args, **kwargs)
        else:
            if owner.raw is not owner.segment.x:
                args, kwargs, given = self._instead_of_raw(owner, args, kwargs, given)
            out = owner.segment.make_module(module, args, kwargs, call, given, forward.about(module))
            out = self._after(owner, module, given, out)
        if owner is None and forward.passing.get(id(module)):
            self._passed(out)
        if forward.by_call:
            self._met(forward.names.get(id(module), ""), out)
        return out

    def _passed(self, out: Any) -> None:
        """A state went through units of other hosts: views may come before the next unit of this one."""
        for t in tensors_of((out,), None):
            link = getattr(t, LINK, None)
            if not isinstance(link, Link):
                continue
            p = self.forward.next_unit(link.tape.chain, link.tape.position, None)
            if p is not None and p.place.views[0]:
                self.views[id(p.slot.chain)] = p.place.views[0]

    def _leave(self, args: Any) -> None:
        """An attribute of a tensor is set: what it is part of is no unit."""
        for one in [o for o in self.open for t in args if isinstance(t, Tensor) and o.segment.number(t) is not None]:
            if one in self.open:
                self.open.remove(one)
                one.segment.let_go()
                self.forward.tell(one.planned.unit, "its host sets an attribute of a tensor that its branch uses")

    # -- units -----------------------------------------------------------------------------------------------------

    def _owner(self, given: list[Tensor], module: nn.Module | None) -> _Open | None:
        """The unit to which a call with these tensors belongs, begun now if need be."""
        best: _Open | None = None
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
        return self._begun(*waiting)

    def _start(self, t: Tensor, module: nn.Module | None) -> tuple[Planned, Tensor, Link | None] | None:
        """The unit that begins with a tensor, if one does."""
        if getattr(t, LINK, None) is not None or t._base is not None:
            for units in self.forward.chains.values():
                link = link_of(t, units[0].slot.chain)
                if link is None:
                    continue
                p = self.forward.next_unit(link.tape.chain, link.tape.position, module)
                if p is not None:
                    return p, t, link
        fork = self.forks.get(id(t)) if self.forks else None
        if fork is None or fork[0] is not t or not _may_begin(t) or any(one.planned is fork[1] for one in self.open):
            return None
        return fork[1], t, None

    def _viewed(self, func: Any, args: Any, kwargs: Any) -> Any:
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
        return relayout(link.tape.chain, lambda t: func(t, *args[1:], **kwargs), x)

    def _begun(self, p: Planned, x: Tensor, link: Link | None) -> _Open:
        if torch.is_grad_enabled() == self.gradients:
            segment = begun(p.slot.chain, p.unit, self.forward.module, x, link)
        else:  # a part of the branch, without gradients, is its first call
            with torch.set_grad_enabled(self.gradients):
                segment = begun(p.slot.chain, p.unit, self.forward.module, x, link)
        one = _Open(p, segment, x)
        self.open.append(one)
        self.forks.pop(id(x), None)
        return one

    def _instead_of_raw(self, one: _Open, args: Any, kwargs: Any, given: list[Tensor]) -> tuple[Any, Any, list[Tensor]]:
        """Where a chain began, what its streams hold takes the place of the tensor that it began with."""
        raw, x = one.raw, one.segment.x
        if raw is x or not any(t is raw for t in given):
            return args, kwargs, given
        args, kwargs = mapped((args, kwargs), lambda leaf: x if leaf is raw else leaf)
        return args, kwargs, tensors_of(args, kwargs)

    def _expect(self, p: Planned, t: Any) -> None:
        if isinstance(t, Tensor):
            self.forks[id(t)] = t, p

    def _met(self, target: str, out: Any) -> None:
        """A call was made: a chain may begin with its result."""
        number = self.counts.get(target, 0)
        self.counts[target] = number + 1
        for p in self.forward.by_call.get((target, number), ()):
            assert p.place.origin is not None
            self._expect(p, found_at(p.place.origin.path, out))

    # -- the end of a unit -----------------------------------------------------------------------------------------

    def _added(self, one: _Open, func: Any, args: Any, given: list[Tensor]) -> Any:
        """An addition of two tensors."""
        segment, place = one.segment, one.planned.place
        first, second = args
        numbers = segment.number(first), segment.number(second)
        summed = one.posts < 0 and None not in numbers and first is not second
        if summed and (0 in numbers or not place.literal):
            one.adds += 1
            if one.adds == place.adds and _keeps_shape(segment.x, first, second):
                return self._sum(one, func, args, given, numbers)
        elif summed and place.adds == 1 and _is_sum_of_skip(segment, first, second):
            segment.latest = segment.make(func, args, {}, func, given)
            return self._close(one, segment.latest, one.planned.as_block())
        return self._after(one, func, given, segment.make(func, args, {}, func, given))

    def _sum(self, one: _Open, func: Any, args: Any, given: list[Tensor], numbers: Any) -> Any:
        """The residual add."""
        segment, place, unit = one.segment, one.planned.place, one.planned.unit
        f = args[1] if numbers[0] == 0 else args[0]
        if place.idle:
            one.f = f
        elif not place.block and not place.posts:
            new = self._step(one, f, unit, _strides_of_sum(segment.x, *args))
            if new is None:
                return func(*args)
            if args[0] is f and name_of(func) in ("add_", "__iadd__"):
                self.instead[id(f)] = ref(f), ref(new)
            return new
        if place.drops:
            out = segment.make(writable, (f,), {}, writable, [f]) if place.writes else f
        else:
            out = segment.make(func, args, {}, func, given)
        return self._summed(one, out)

    def _summed(self, one: _Open, out: Tensor) -> Any:
        """The residual add was made, and is part of a block."""
        one.posts, one.segment.latest, one.since = 0, out, one.segment.number(out) or 0
        return out if one.planned.place.posts or one.planned.place.idle else self._close(one, out, one.planned.unit)

    def _after(self, one: _Open, function: Any, given: list[Tensor], out: Any) -> Any:
        """A call of a unit was made: it may be the last one behind the sum, or one on the way of the skip."""
        segment = one.segment
        if one.posts < 0:
            if one.planned.place.spelled is not None and name_of(function) == one.planned.place.spelled:
                one.adds += 1
                if one.adds == one.planned.place.adds and _has_shape_of(segment.x, out):
                    return self._summed(one, out)
            if given and given[0] is segment.skip and self.forward.is_light(function) and _has_shape_of(segment.x, out):
                segment.skip = out
            return out
        if not any((segment.number(t) or -1) >= one.since for t in given):
            return out
        one.posts += 1
        if out is segment.latest and one.f is not None:
            return self._close(one, one.f, one.planned.unit) if one.posts >= one.planned.place.idle else out
        one.f = None
        if not _has_shape_of(segment.x, out):
            return out
        segment.latest = out
        unit = one.planned.as_block() if one.planned.place.idle else one.planned.unit
        return self._close(one, out, unit) if one.posts >= one.planned.place.posts + one.planned.place.idle else out

    def _close(self, one: _Open, value: Tensor, unit: Unit) -> Any:
        """End a unit by ``value``: F(x), or the block's; in place of what the code would go on with."""
        strides = None if value.stride() == one.segment.x.stride() else _dense_strides(value)
        new = self._step(one, value, unit, strides)
        return one.segment.latest if new is None else new

    def _step(self, one: _Open, value: Tensor, unit: Unit, strides: tuple[int, ...] | None = None) -> Tensor | None:
        """The next state, of these strides; None where the unit cannot be stepped, and runs on as it was written."""
        self.open.remove(one)
        new = ended(one.segment, value, unit, strides)
        self.views[id(one.planned.slot.chain)] = one.planned.place.views[1]
        if new is None:
            one.segment.let_go()
            self.forward.tell(unit, "its state was written in place, or left for another gradient mode, before its add")
        return new

    def _renamed(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A sum that was to be written over a tensor is the new state, under that tensor's name too."""

        def new(leaf: Any) -> Any:
            found = self.instead.get(id(leaf))
            if found is None or found[0]() is not leaf:
                return leaf
            return leaf if (state := found[1]()) is None else state

        return mapped((args, kwargs), new)  # type: ignore[no-any-return]


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


def _is_read(func: Any) -> bool:
    """Whether a function only looks at a tensor, and gives none."""
    found = _READS.get(func)
    if found is None:
        found = _READS[func] = kind_of(func) != "data" and name_of(func) not in ("__iter__", "requires_grad")
    return found


def _may_begin(x: Any) -> bool:
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


def _exchanged(out: Any, old: Tensor, new: Tensor) -> Any:
    """A result with one tensor in place of another."""
    return mapped(out, lambda leaf: new if leaf is old else leaf)
