"""Write a run down, call by call, while it happens; `run` says why on real values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from revwire._capture.aliasing import address_of, is_view
from revwire._capture.intercept import active
from revwire._capture.lines import Line, current_line
from revwire._capture.reads import kind_of, name_of, state_change
from revwire._capture.recording import ASSIGNS, Event, Modes, Read, Recording, Value
from revwire._capture.values import Values
from revwire._capture.watch import Watch
from revwire._structures import Ref, is_constant, mapped, tensors_in
from revwire._surroundings.attributes import attributes_of, changed, containers_in, refilled
from revwire._surroundings.interrupts import let_wait
from revwire._surroundings.inventory import has_hooks, version_of
from revwire._surroundings.modes import backward_hooks_left_out, transformed
from revwire._surroundings.noted import note_write
from revwire._surroundings.randomness import python_random_state, same_random_state
from revwire._torch import TorchDispatchMode, arguments_of, no_torch_function


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which kernels the current event runs, and undoes what they write to weights: no version counter tells what
    is written through ``weight.data``, and there may be too many weights to copy them all.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.weights = {a: p for p in recorder.recording.root.parameters() if (a := address_of(p)) is not None}
        self.written: list[tuple[Tensor, Tensor]] = []

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for weight, before in self.written:
            note_write(weight)
            weight.data.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dynamic = torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(func, args)
        for event in self.recorder.open_events:
            event.kernels.append(func)
            event.dynamic |= dynamic
        self._before_write([args[i] if i < len(args) else (kwargs or {}).get(name) for i, name in _written_by(func)])
        return func(*args, **(kwargs or {}))

    def _before_write(self, to: Any) -> None:
        """Copy the weights that a kernel is about to write to, once."""
        for t in tensors_in(to) if to and self.weights else ():
            weight = self.weights.pop(address_of(t) or 0, None)
            if weight is not None:
                self.written.append((weight, weight.detach().clone()))


@lru_cache(maxsize=4096)
def _written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that a kernel writes to."""
    arguments = enumerate(arguments_of(func))
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _indexes_by_numbers(func: Any, args: Any) -> bool:
    """Whether this is an index by numbers, whose result has a shape that the shapes of its arguments tell."""
    return func is torch.ops.aten.index.Tensor and not any(
        t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1])
    )


class Recorder(TorchFunctionMode):
    """Sees every torch call of Python's, and by `intercepted` every module call, and writes a `Recording`."""

    def __init__(self, root: nn.Module, device_types: tuple[str, ...]) -> None:
        super().__init__()
        self.recording = Recording(root)
        self.device_types = device_types
        self.values = Values(self.recording)
        self.stack: list[Event] = []
        self.open_events: list[Event] = []
        self.drawn = python_random_state()
        self.watch = Watch(self.note_look)
        self.quiet = False

    # -- events ----------------------------------------------------------------------------------------------------

    @property
    def parent(self) -> int:
        return self.stack[-1].number if self.stack else -1

    @contextmanager
    def bookkeeping(self) -> Iterator[None]:
        """The recorder's own calls and looks are no events, and not interrupted."""
        waited, quiet = let_wait(True), self.quiet
        try:
            self.quiet = True
            with no_torch_function():
                yield
        finally:
            self.quiet = quiet
            let_wait(waited)

    def open(self, target: Any, is_module: bool, args: Any, kwargs: Any) -> tuple[Event, list[tuple[Tensor, int]]]:
        versions = [(t, version_of(t)) for t in tensors_in((args, kwargs))]
        event = Event(
            len(self.recording.events),
            target,
            is_module,
            self.parent,
            self.values.noted(args),
            self.values.noted(kwargs),
        )
        event.modes, event.line = modes_now(self.device_types), current_line(2)
        self.values.kept.pop(event.number, None)  # of a call that raised
        self.values.mark_custom((args, kwargs))
        self.recording.events.append(event)
        return event, versions

    def close(self, event: Event, versions: list[tuple[Tensor, int]], out: Any) -> None:
        inputs = (self.recording.values[n] for n in (self.values.number_of(t) for t, _ in versions))
        dynamic = event.dynamic or any(v.dynamic for v in inputs)
        writes: dict[int, tuple[int, int]] = {}
        for t, version in versions:
            produced = self.recording.values[self.values.number_of(t)].event
            if version_of(t) != version and not (
                event.is_module and produced > event.number
            ):  # else noted by a call inside
                for alias in self.values.memory.aliases(t):
                    if id(alias) not in writes:
                        writes[id(alias)] = (
                            self.values.number_of(alias),
                            self.values.bind(alias, event.number, dynamic),
                        )
        event.writes = tuple(writes.values())
        self.values.mark_custom(out)
        event.out = self.values.noted_output(out, event, dynamic)
        self.values.count_saved(event)
        event.end = len(self.recording.events)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.quiet or active() is not self or transformed():
            return func(*args, **kwargs)
        if func is torch.Tensor.__iter__:
            self.recording.reads.append(Read("shape", "__iter__", self.parent))
            return iter(self.call(torch.Tensor.unbind, (args[0], 0), {}))
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        event, versions = self.open(func, False, args, kwargs)
        self.open_events.append(event)
        try:
            out = func(*args, **kwargs)
        except BaseException:
            self.recording.events.pop()  # a call that raises made nothing; what caught the error decided on it
            self.note_read(func, args, event.line)
            raise
        finally:
            self.open_events.pop()
        self.note_state(func, event.line)
        if next(tensors_in(out), None) is None and all(version_of(t) == version for t, version in versions):
            self.recording.events.pop()
            self.note_read(func, args, event.line)
            return out
        self.close(event, versions, out)
        event.view = not event.writes and is_view(args, out, event.kernels)
        if event.is_addition or event.is_spelled_sum:
            self.values.measure_magnitudes([*tensors_in((args, kwargs)), *tensors_in(out)])
        return out

    def module_call(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any, body: bool = False
    ) -> Any:
        """A module call; ``body``: it is the forward alone, without the module's hooks."""
        with self.bookkeeping():
            self.note_draws(module)
            event, versions = self.open(module, True, args, kwargs)
            event.hooked = has_hooks(module) and not body
            self.watch_objects(event, (args, kwargs))
            family = [(m, attributes_of(m)) for m in (module, *module.children())]
            containers = containers_in((args, kwargs))
        self.stack.append(event)
        try:
            out = (
                _hooked_call(self, original, module, args, kwargs)
                if event.hooked
                else original(module, *args, **kwargs)
            )
            with self.bookkeeping():
                self.note_draws(module)
        except BaseException:
            self.stack.pop()
            event.end = len(self.recording.events)
            self.recording.reads.append(Read("data", "an exception", self.parent))
            raise
        self.stack.pop()
        with self.bookkeeping():
            self.close(event, versions, out)
            event.changes = self.changes(event, family, containers)
        return out

    def opaque_call(self, original: Callable[..., Any], target: Any, args: Any, kwargs: Any) -> Any:
        """One event, whatever it does inside: a custom autograd function, or a TorchScript function."""
        with self.bookkeeping():
            event, versions = self.open(target, False, args, kwargs)
            event.opaque = True
            self.open_events.append(event)
            try:
                out = original(*args, **kwargs)
            finally:
                self.open_events.pop()
            self.close(event, versions, out)
        return out

    # -- reads -----------------------------------------------------------------------------------------------------

    def note_read(self, func: Any, args: Any, line: Line | None) -> None:
        kind = kind_of(func)
        values = [self.recording.values[self.values.number_of(t)] for t in tensors_in(args)]
        if kind == "free" or not values or getattr(func, "__name__", "") == "__set__":
            return
        unseen = any(v.dynamic or self.is_foreign(v) for v in values)
        self.recording.reads.append(Read("data" if unseen else kind, name_of(func), self.parent, line))

    def is_foreign(self, v: Value) -> bool:
        """Neither an argument, nor the model's own, nor computed: inside an object (a cache), or made unseen."""
        return v.event < 0 and not v.names and v.number not in _given(self.recording)

    def note_state(self, func: Any, line: Line | None) -> None:
        change = state_change(func)
        if change is not None:
            self.recording.reads.append(Read("state", change, self.parent, line))

    def note_draws(self, module: nn.Module) -> None:
        if not _may_draw(module):
            return
        now = python_random_state()
        if not same_random_state(self.drawn, now):
            self.recording.reads.append(Read("random", "Python's random numbers", self.parent))
            self.drawn = now

    def note_look(self, obj: Any, name: str) -> None:
        if not self.quiet and active() is self:
            self.recording.reads.append(Read("object", type(obj).__name__, self.parent, current_line()))

    def watch_objects(self, event: Event, arguments: Any) -> None:
        for leaf in _objects(arguments):
            if not self.watch.add(leaf):
                self.recording.reads.append(Read("object", type(leaf).__name__, event.number))

    def changes(
        self, event: Event, family: list[tuple[nn.Module, Any]], containers: list[tuple[Any, Any]]
    ) -> tuple[str, ...]:
        called = {id(e.target) for e in self.recording.events[event.number + 1 :] if e.is_module}
        names = [f"{ASSIGNS} {n!r}" for m, before in family if id(m) not in called for n in changed(before, m)]
        if refilled(containers):
            names.append("changes a list, dict or set that it is given")
        return tuple(names)

    # -- measurements ----------------------------------------------------------------------------------------------

    def measure_saved(self, t: Tensor) -> None:
        """Count what autograd would keep, once per tensor and module call; weights are there anyway."""
        with self.bookkeeping():
            if self.recording.events:
                event = self.open_events[-1] if self.open_events else self.recording.events[-1]
                self.values.note_saved(t, event)
                if not self.open_events:
                    self.values.count_saved(event)


def _hooked_call(recorder: Recorder, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Note the forward inside of its hooks as a call of its own: it is what a rewired forward replaces.

    There is no backward pass here, so backward hooks are left out; in a step, chains go on through what they put
    between modules.
    """
    forward, own = module.forward, vars(module).get("forward", None)

    def body(*args: Any, **kwargs: Any) -> Any:
        back()
        return recorder.module_call(lambda _, *a, **k: forward(*a, **k), module, args, kwargs, body=True)

    def back() -> None:
        if own is not None:
            vars(module)["forward"] = own
        else:
            vars(module).pop("forward", None)

    vars(module)["forward"] = body
    try:
        with backward_hooks_left_out(module):
            return original(module, *args, **kwargs)
    finally:
        back()


def _may_draw(module: nn.Module) -> bool:
    """Whether a call of a module may draw Python's random numbers: layers of PyTorch's do not, and call no others."""
    return (
        has_hooks(module)
        or not type(module).__module__.startswith("torch.nn.modules.")
        or next(module.children(), None) is not None
        or "forward" in vars(module)
    )


def _given(recording: Recording) -> list[int]:
    """The values that the root was called with."""
    top = recording.events[0]
    return [leaf.value for leaf in _flat((top.args, top.kwargs)) if isinstance(leaf, Ref)]


def _flat(structure: Any) -> list[Any]:
    out: list[Any] = []
    mapped(structure, out.append)
    return out


def _objects(structure: Any) -> list[Any]:
    """What is neither tensor nor constant in real arguments."""
    return [leaf for leaf in _flat(structure) if not isinstance(leaf, Tensor) and not is_constant(leaf)]


def modes_now(device_types: tuple[str, ...]) -> Modes:
    """The modes that change what a torch call does, as they are now."""
    autocast = tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in device_types)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
