"""Observe a module at work: one run on real values, from which the graph of any of its parts can be cut.

Note [Why a run on values]
    Proxies that stand for values break on ``isinstance``, on control flow and on every C function that wants a number.
    Here forward runs on the caller's own tensors, and three interception points write down what happens: a
    `TorchFunctionMode` (every torch call that Python makes), a wrapper of ``nn.Module.__call__`` (which module calls
    which) and a `TorchDispatchMode` (which kernels a call runs). Python decides as it always does. What it decided *on*
    is written down too: reading a shape or a value of a tensor is an event (`Read`).

Note [Nothing is kept alive]
    The run happens with gradients enabled, as a training step would, but what autograd saves is measured and dropped,
    and the recording holds weak references: memory stays that of inference.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from revwire._replay import accelerators_of, buffers_kept, preserved_random_state

ADDITIONS = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor})
_CASTS = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default})
_SHAPE_READS = frozenset(
    "shape size numel nelement __len__ stride is_contiguous storage_offset element_size nbytes itemsize is_non_overlapping_and_dense".split()
)
_FREE_READS = frozenset(  # part of every signature, or properties of the module's own tensors
    "device dtype dim ndim ndimension requires_grad is_leaf is_floating_point is_complex is_cuda is_mps is_xpu is_meta is_cpu is_sparse "
    "is_quantized is_nested is_mkldnn is_xla is_mtia is_maia is_ipu is_vulkan layout get_device is_inference _version names grad_fn "
    "is_tensor names __hash__ __repr__ __str__ __format__ is_autocast_enabled result_type __dlpack_device__ grad is_signed is_sparse_csr".split()
)


@dataclass(frozen=True)
class Ref:
    """In a recorded argument or result: the tensor with this value number."""

    value: int


@dataclass(frozen=True)
class Opaque:
    """In a recorded argument: an object that is neither a tensor nor a plain constant (a cache, a config)."""

    obj: Any

    def __hash__(self) -> int:
        return id(self.obj)


@dataclass
class Value:
    """One tensor as it was between two writes to it.

    ``event`` is its producer (-1: it existed before). ``existing`` is the tensor itself, and ``names`` its qualified
    names as a parameter or buffer of the root, where it existed before. ``largest`` is its largest magnitude, measured
    for what enters or leaves an addition.
    """

    number: int
    event: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    existing: Tensor | None = None
    names: tuple[str, ...] = ()
    largest: float = 0.0


@dataclass
class Event:
    """A call of a torch function or of a module.

    ``parent`` is the module call around it (-1: none). A module call ends before event ``end``. ``writes`` holds
    (value before, value after) of what was written in place. ``view``: the result is a re-reading of the input's
    storage with all its elements. ``saved``: bytes that autograd would keep for it.
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

    @property
    def is_addition(self) -> bool:
        """Two tensors added element by element, nothing else."""
        kernels = [k for k in self.kernels if k not in _CASTS]
        tensors = [r for r in refs((self.args, self.kwargs))]
        scaled = "alpha" in (self.kwargs or {}) or len(self.args) > 2
        return not self.is_module and len(kernels) == 1 and kernels[0] in ADDITIONS and len(tensors) == 2 and not scaled

    @property
    def is_pointwise(self) -> bool:
        """Every kernel works element by element (by its own declaration)."""
        kernels = [k for k in self.kernels if k not in _CASTS]
        return bool(kernels) and all(torch.Tag.pointwise in k.tags for k in kernels)


@dataclass(frozen=True)
class Read:
    """Python looked at a tensor: at its ``"shape"`` or at its ``"data"``, inside the module call ``parent``."""

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
        numbers = {r.value for e in self.events[call : top.end] for r in refs((e.args, e.kwargs, e.out, [Ref(w) for p in e.writes for w in p]))}
        renumber = {old: new for new, old in enumerate(sorted(numbers))}
        prefixes = [f"{n}." if n else "" for n in self.module_names.get(id(top.target), ())]
        out = Recording(top.target, {k: _within(v, prefixes, "") for k, v in self.module_names.items()})
        for old in renumber:
            v = self.values[old]
            event = v.event - call if call <= v.event < top.end else -1
            out.values.append(Value(renumber[old], event, v.shape, v.dtype, v.existing, _within(v.names, prefixes), v.largest))
        for e in self.events[call : top.end]:
            writes = tuple((renumber[a], renumber[b]) for a, b in e.writes)
            args, kwargs, result = (renumbered(s, renumber) for s in (e.args, e.kwargs, e.out))
            parent = -1 if e is top else e.parent - call
            out.events.append(Event(e.number - call, e.target, e.is_module, parent, args, kwargs, result, e.end - call, writes, e.kernels, e.view, e.saved))
        out.reads = [Read(r.kind, r.name, r.parent - call) for r in self.reads if call <= r.parent < top.end]
        return out

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


def renumbered(structure: Any, numbers: dict[int, int]) -> Any:
    """A recorded structure with its values renumbered."""
    if isinstance(structure, Ref):
        return Ref(numbers[structure.value])
    if isinstance(structure, (list, tuple)):
        return _alike(structure, [renumbered(s, numbers) for s in structure])
    if isinstance(structure, dict):
        return {k: renumbered(v, numbers) for k, v in structure.items()}
    if isinstance(structure, slice):
        return slice(*(renumbered(s, numbers) for s in (structure.start, structure.stop, structure.step)))
    return structure


def refs(structure: Any) -> Iterator[Ref]:
    """The `Ref`s in a recorded structure, in order."""
    if isinstance(structure, Ref):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from refs(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from refs(item)
    elif isinstance(structure, slice):
        yield from refs((structure.start, structure.stop, structure.step))


def tensors_in(structure: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts and slices, in order."""
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
    elif hasattr(structure, "__dataclass_fields__") and not isinstance(structure, type):
        yield from tensors_in(vars(structure))


CONSTANTS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)


def _alike(like: Any, items: list[Any]) -> Any:
    """A list, tuple or named tuple like ``like`` with these items (other subclasses become plain tuples)."""
    if isinstance(like, list):
        return items
    return type(like)(*items) if hasattr(like, "_fields") else tuple(items)


class _State(threading.local):
    active: _Recorder | None = None


_STATE = _State()


def is_recording() -> bool:
    """Whether this thread is observing a module: converted hosts then run their original forward."""
    return _STATE.active is not None


class _Kernels(TorchDispatchMode):
    """Notes which kernels the current event runs."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for event in self.recorder.open_events:
            event.kernels.append(func)
        return func(*args, **(kwargs or {}))


class _Recorder(TorchFunctionMode):
    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.recording = Recording(root)
        self.names: dict[int, tuple[str, ...]] = {}
        self.known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.stack: list[Event] = []
        self.open_events: list[Event] = []
        self.addresses: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.owned: set[int] = set()
        self.counted: set[tuple[int, int]] = set()

    def name_all(self) -> None:
        """Learn the qualified names of the root's modules, parameters and buffers (as they are during the run)."""
        root = self.recording.root
        for name, module in root.named_modules(remove_duplicate=False):
            self.recording.module_names[id(module)] = (*self.recording.module_names.get(id(module), ()), name)
        for source in (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)):
            for name, t in source:
                self.names[id(t)] = (*self.names.get(id(t), ()), name)
                if t.layout == torch.strided:
                    self.owned.add(t.untyped_storage().data_ptr())

    # -- values ----------------------------------------------------------------------------------------------------

    def number_of(self, t: Tensor) -> int:
        found = self.known.get(id(t))
        if found is not None and found[0]() is t:
            return found[1]
        return self.bind(t, -1)

    def bind(self, t: Tensor, event: int) -> int:
        number = len(self.recording.values)
        existing, names = (t, self.names.get(id(t), ())) if event < 0 else (None, ())
        self.recording.values.append(Value(number, event, tuple(t.shape), t.dtype, existing, names))
        reference = weakref.ref(t)
        self.known[id(t)] = (reference, number)
        if t.layout == torch.strided and not t.is_meta:
            self.addresses[t.untyped_storage().data_ptr()] = (reference, number)
        return number

    def noted(self, structure: Any) -> Any:
        """``structure`` with tensors as `Ref`, and what is no plain constant as `Opaque`."""
        if isinstance(structure, Tensor):
            return Ref(self.number_of(structure))
        if isinstance(structure, (list, tuple)):
            return _alike(structure, [self.noted(s) for s in structure])
        if isinstance(structure, dict):
            return {k: self.noted(v) for k, v in structure.items()}
        if isinstance(structure, slice):
            return slice(*(self.noted(s) for s in (structure.start, structure.stop, structure.step)))
        return structure if isinstance(structure, CONSTANTS) else Opaque(structure)

    def noted_output(self, structure: Any, event: Event, before: set[int]) -> Any:
        """As `noted`, where tensors that did not exist before the event are its results."""
        for t in tensors_in(structure):
            found = self.known.get(id(t))
            if found is None or found[0]() is not t:
                self.bind(t, event.number)
        return self.noted(structure)

    # -- events ----------------------------------------------------------------------------------------------------

    def open(self, target: Any, is_module: bool, args: Any, kwargs: Any) -> tuple[Event, list[tuple[Tensor, int]]]:
        versions = [(t, t._version) for t in tensors_in((args, kwargs)) if not t.is_inference()]
        parent = self.stack[-1].number if self.stack else -1
        event = Event(len(self.recording.events), target, is_module, parent, self.noted(args), self.noted(kwargs))
        self.recording.events.append(event)
        return event, versions

    def close(self, event: Event, versions: list[tuple[Tensor, int]], out: Any) -> None:
        writes = []
        for t, version in versions:
            if t._version != version:
                before = self.number_of(t)
                produced = self.recording.values[before].event
                if event.is_module and produced > event.number:
                    continue  # a call inside wrote it, and has been noted
                writes.append((before, self.bind(t, event.number)))
        event.writes = tuple(writes)
        event.out = self.noted_output(out, event, set())
        event.end = len(self.recording.events)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__iter__:
            self.recording.reads.append(Read("shape", "__iter__", self.parent))
            return iter(args[0].unbind(0)) if self is not _STATE.active else iter(self.call(torch.Tensor.unbind, (args[0], 0), {}))
        return self.call(func, args, kwargs)

    @property
    def parent(self) -> int:
        return self.stack[-1].number if self.stack else -1

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        event, versions = self.open(func, False, args, kwargs)
        self.open_events.append(event)
        try:
            out = func(*args, **kwargs)
        finally:
            self.open_events.pop()
        written = any(t._version != version for t, version in versions)
        if not written and next(tensors_in(out), None) is None:
            self.recording.events.pop()
            self.note_read(func, args)
            return out
        self.close(event, versions, out)
        event.view = self.is_view(event, args, out)
        if event.is_addition:
            for t in (*tensors_in((args, kwargs)), *tensors_in(out)):
                if t.is_floating_point() and t.numel() and not t.is_meta:
                    value = self.recording.values[self.number_of(t)]
                    value.largest = float(torch.linalg.vector_norm(t.detach(), float("inf")))
        return out

    def is_view(self, event: Event, args: Any, out: Any) -> bool:
        if event.writes or not isinstance(out, Tensor) or not args or not isinstance(args[0], Tensor) or out is args[0]:
            return False
        same = out.numel() == args[0].numel() and out.dtype == args[0].dtype and out.layout == torch.strided == args[0].layout
        return same and not out.is_meta and out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()

    def note_read(self, func: Any, args: Any) -> None:
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in _FREE_READS or (name == "__set__") or next(tensors_in(args), None) is None:
            return
        self.recording.reads.append(Read("shape" if name in _SHAPE_READS else "data", name, self.parent))

    def module_call(self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        event, versions = self.open(module, True, args, kwargs)
        self.stack.append(event)
        try:
            out = original(module, *args, **kwargs)
        finally:
            self.stack.pop()
        self.close(event, versions, out)
        return out

    def function_apply(self, original: Callable[..., Any], cls: Any, args: Any, kwargs: Any) -> Any:
        """A custom autograd function: one event, whatever it does inside."""
        event, versions = self.open(cls.apply, False, args, kwargs)
        with torch._C.DisableTorchFunction():
            out = original(*args, **kwargs)
        self.close(event, versions, out)
        return out

    def measure_saved(self, t: Tensor) -> None:
        """Count what autograd would keep, once per tensor and module call; weights are there anyway."""
        if t.layout != torch.strided or not self.recording.events:
            return
        address = t.untyped_storage().data_ptr()
        if address in self.owned:
            return
        found = self.addresses.get(address)
        if found is not None and found[0]() is not None:
            key = (found[1], t.numel())
            if key in self.counted:
                return
            self.counted.add(key)
        event = self.open_events[-1] if self.open_events else self.recording.events[-1]
        event.saved += t.numel() * t.element_size()


@contextmanager
def _patched(recorder: _Recorder) -> Iterator[None]:
    """Route module calls and custom functions of this thread through the recorder, while it is active."""
    module_call, apply = nn.Module.__call__, torch.autograd.Function.__dict__["apply"]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        active = _STATE.active
        if active is None:
            return module_call(self, *args, **kwargs)
        return active.module_call(module_call, self, args, kwargs)

    def apply_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
        active = _STATE.active
        bound = apply.__get__(None, cls)
        return bound(*args, **kwargs) if active is None else active.function_apply(bound, cls, args, kwargs)

    previous = _STATE.active
    _STATE.active = recorder
    nn.Module.__call__ = call  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(apply_function)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = module_call  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply
        _STATE.active = previous


def fresh_containers(structure: Any) -> Any:
    """The same tensors and objects in new lists, tuples and dicts: some models write to the list they are given."""
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(fresh_containers(s) for s in structure))
    if type(structure) in (list, tuple):
        return type(structure)(fresh_containers(s) for s in structure)
    return {k: fresh_containers(v) for k, v in structure.items()} if type(structure) is dict else structure


def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[..., Any] | None = None) -> Recording:
    """Run ``module`` once and write down what happens; the module and the random state stay as found.

    Args:
        module: the root of the recording.
        args, kwargs: real arguments of its forward.
        forward: called instead of the module itself, as the body of the root call (to record an original forward
            under a rewired one).
    """
    recorder = _Recorder(module)
    args, kwargs = fresh_containers(args), fresh_containers(kwargs)
    devices = accelerators_of([*tensors_in((args, kwargs)), *module.parameters()])
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state(devices))
        stack.enter_context(buffers_kept([module]))
        recorder.name_all()
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.measure_saved, _dropped))
        stack.enter_context(_Kernels(recorder))
        stack.enter_context(recorder)
        stack.enter_context(_patched(recorder))
        if forward is None:
            module(*args, **kwargs)
        else:
            body = forward
            recorder.module_call(lambda _, *a, **k: body(*a, **k), module, args, kwargs)
    return recorder.recording


def _dropped(_: Any) -> Tensor:
    raise RuntimeError("internal: a backward pass through an observed run")
