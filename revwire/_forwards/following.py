"""One call of a host whose own code runs, followed: see Note [The host's own code runs] in `live`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revwire._capture.reads import kind_of, name_of
from revwire._forwards.host import Host
from revwire._forwards.open_units import OpenUnits, may_begin
from revwire._runtime.cells import kept_from_checkpoint
from revwire._runtime.follower import NOW
from revwire._runtime.links import link_of
from revwire._search.places import Origin, found_at
from revwire._structures import mapped, tensors_in, tensors_of
from revwire._torch import function_mode, function_modes, pop_function_mode, push_function_mode

_ADDS = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__})

_METHOD_WRAPPER: Any = type(object.__str__.__get__)

_READS: dict[Any, bool] = {}


class Following(TorchFunctionMode):
    """One call of a host."""

    def __init__(self, host: Host, plain: Callable[..., Any], names: Callable[[], Sequence[str]]) -> None:
        """``plain``: the forward of the host as it was; ``names``: gives those of its arguments."""
        super().__init__()
        self.host, self.plain, self.names, self.units = host, plain, names, OpenUnits(host)

    # -- the whole call --------------------------------------------------------------------------------------------

    def run(self, args: Any, kwargs: Any) -> Any:
        """Run the host's own code, followed."""
        for p, origin in self.host.by_argument:
            self.units.expect(p, self._argument(origin, args, kwargs))
        try:
            return self._finished(self._called(args, kwargs))
        finally:
            self.units.let_go()

    def _called(self, args: Any, kwargs: Any) -> Any:
        before, NOW.follower = NOW.follower, self
        push_function_mode(self)
        try:
            return self.plain(*args, **kwargs)
        finally:
            pop_function_mode()
            NOW.follower = before

    def closed(self, args: Any, kwargs: Any) -> Any:
        """Run a host that is one unit, as one call."""
        p, host = self.host.planned[0], self.host
        assert p.place.origin is not None
        x = self._argument(p.place.origin, args, kwargs)
        link = link_of(x, p.slot.chain) if isinstance(x, Tensor) else None
        if link is not None and p.unit.place(link.tape.position) is None:
            link = None
        if link is None and not may_begin(x):
            return self.plain(*args, **kwargs)
        one = self.units.begun(p, x, link)
        try:
            args, kwargs, given = self.units.with_state(one, args, kwargs, tensors_of(args, kwargs))
            make = one.segment.make_module
            out = make(host.module, args, kwargs, self.plain, given, host.leaf(host.module)[1])
            for call in one.segment.calls:
                call.function = self.plain
            value = found_at(p.place.out or (), out)
            if not isinstance(value, Tensor) or value.shape != one.segment.x.shape:
                host.tell(p.unit, "its output has not the shape of its input in this call; it is not rewired in it")
                return out
            new = one.step(value, p.unit, one.strides_of(value))
            return out if new is None else _exchanged(out, value, new)
        finally:
            self.units.let_go()

    def _finished(self, out: Any) -> Any:
        """What the host's code returns; a unit that is summed, and only lacks calls behind its sum, ends here."""
        for one in [o for o in self.units.open if o.posts >= 0]:
            latest = one.segment.latest
            if latest.shape == one.segment.x.shape and any(t is latest for t in tensors_in(out)):
                value = latest if one.f is None else one.f
                new = one.step(value, one.planned.unit, one.strides_of(latest))
                if new is not None:
                    out = _exchanged(out, latest, new)
        for one in self.units.open:
            if one.segment.values.size > 1:
                self.host.tell(
                    one.planned.unit,
                    "a call of its host did not come to its residual add as the example did; it ran as in the original "
                    "network, and its activations are kept",
                )
        if self.units.instead:
            out = self.units.renamed(out)
            self.units.write()
        return out

    def _argument(self, origin: Origin, args: Any, kwargs: Any) -> Any:
        found = found_at(origin.path, (args, kwargs))
        if found is None:
            found = found_at(origin.path[2:], self._by_name(origin.path, args, kwargs))
        return found

    def _by_name(self, path: Any, args: Any, kwargs: Any) -> Any:
        """An argument that is given by its name, and was by its place in the example, or the other way round."""
        names = self.names()
        if path[0] == 0:
            return kwargs.get(names[path[1]]) if path[1] < len(names) else None
        place = names.index(path[1]) if path[1] in names else len(args)
        return args[place] if place < len(args) else None

    # -- what the host's code calls --------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if NOW.follower is not self:
            return func(*args, **kwargs)
        if not self.units.stepped_inside:
            return self._torch_call(func, args, kwargs)
        with kept_from_checkpoint():
            return self._torch_call(func, args, kwargs)

    def _torch_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.units.instead:
            args, kwargs = self.units.renamed((args, kwargs))
        is_property = type(func) is _METHOD_WRAPPER
        if is_property and func.__name__ == "__set__":
            self.units.leave(args)
            return func(*args, **kwargs)
        if is_property or _is_read(func):
            out = func(*args, **kwargs)
            if not isinstance(out, Tensor):
                return out
        out = self.units.viewed(func, args, kwargs) if self.units.views else None
        given = tensors_of(args, kwargs)
        owner = self.units.owner(given, None) if out is None else None
        if out is not None:
            pass
        elif owner is None:
            out = func(*args, **kwargs)
        else:
            if owner.raw is not owner.segment.x:
                args, kwargs, given = self.units.with_state(owner, args, kwargs, given)
            if is_property:
                out = func(*args)
                owner.segment.note_done(func, args, out)
            elif func in _ADDS and len(args) == 2 and not kwargs and isinstance(args[1], Tensor):
                out = owner.added(func, args, given)
            else:
                out = owner.after(func, given, owner.segment.make(func, args, kwargs, func, given))
        if self.host.by_call and (name := name_of(func)) in self.host.by_call:
            self.units.met(name, out)
        return out

    def opaque_call(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of the host's own code that no function mode sees."""
        return self.module_call(self.host.opaque(call, args), call, args, kwargs)

    def expects(self, args: Any, kwargs: Any) -> bool:
        """Whether one of these arguments of a module that is opened is a part of a unit of the host, or begins one."""
        return any(map(self.units.is_expected, tensors_of(args, kwargs)))

    def module_call(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a module by the host's own code."""
        if id(module) in self.host.opened:
            return call(*args, **kwargs)
        modes = function_modes()
        popped = modes > 0 and function_mode(modes - 1) is self
        if popped:  # inside of a leaf nothing is followed
            pop_function_mode()
        NOW.follower = None
        try:
            if not self.units.stepped_inside:
                return self._leaf_call(module, call, args, kwargs)
            with kept_from_checkpoint():
                return self._leaf_call(module, call, args, kwargs)
        finally:
            NOW.follower = self
            if popped:
                push_function_mode(self)

    def _leaf_call(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        host = self.host
        if self.units.instead:
            args, kwargs = self.units.renamed((args, kwargs))
        given = tensors_of(args, kwargs)
        passes, known = host.leaf(module)
        owner = None if passes else self.units.owner(given, module)
        if owner is None:
            out = call(*args, **kwargs)
            if passes:
                self.units.passed(out)
        else:
            if owner.raw is not owner.segment.x:
                args, kwargs, given = self.units.with_state(owner, args, kwargs, given)
            out = owner.segment.make_module(module, args, kwargs, call, given, known)
            out = owner.after(module, given, out)
        if host.by_call and (name := host.names.get(id(module), "")) in host.by_call:
            self.units.met(name, out)
        return out


def _is_read(func: Any) -> bool:
    """Whether a function only looks at a tensor, and gives none."""
    found = _READS.get(func)
    if found is None:
        found = _READS[func] = kind_of(func) != "data" and name_of(func) not in ("__iter__", "requires_grad")
    return found


def _exchanged(out: Any, old: Tensor, new: Tensor) -> Any:
    """A result with one tensor in place of another."""
    return mapped(out, lambda leaf: new if leaf is old else leaf)
