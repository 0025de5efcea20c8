"""All that a recompute must reproduce: random state, autocast, weights, buffers. It leaves no trace in global state.

Note [Weights that are exchanged]
    `torch.func.functional_call` lends a module other weights for the time of a forward. A recompute finds the module's own again,
    and takes those that the forward used: the gradients are theirs. A weight that somebody replaced for good looks much the same;
    that is a mistake, and is left for the checks to find. What was lent is no `Parameter`, or one that went while a tensor came back
    that the module had at conversion. Shards and other kinds of tensors are left to those who manage them.

Note [Buffers that are read and written]
    The power iteration of a spectral norm begins where the forward before ended, so its recompute needs the buffers as the forward
    found them. Which they are is seen from version counters, module by module: where a forward moved that of a floating-point
    buffer, copies of what it wrote are kept; else none, and from the next forward on none are made. (Batch normalisation moves no such
    counter; its counter of batches is no floating-point number.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter, is_
from threading import RLock
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from revwire._kernels import same_bytes

NOTHING = nullcontext()
"""A context that does nothing; one serves all."""

AutocastState = tuple[bool, torch.dtype]
RandomStates = dict[torch.device | None, Tensor]


def accelerators_of(values: Iterable[Any]) -> tuple[torch.device, ...]:
    """The devices, other than the CPU, on which any of these tensors lie."""
    return tuple({v.device for v in values if isinstance(v, Tensor) and v.device.type not in ("cpu", "meta")})


def random_states(devices: Iterable[torch.device]) -> RandomStates:
    """The generator states of the CPU (key None) and of ``devices``."""
    states: RandomStates = {None: torch.get_rng_state()}
    for device in devices:
        states[device] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_random_states(states: RandomStates) -> None:
    """The inverse of `random_states`."""
    for device, state in states.items():
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def preserved_random_state(devices: tuple[torch.device, ...] = ()) -> Iterator[None]:
    """Leave the generators as they were found."""
    before = random_states(devices)
    try:
        yield
    finally:
        set_random_states(before)


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Use deterministic kernels where PyTorch has them; where it has none, a warning says so."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def autocast_state(device_type: str) -> AutocastState:
    """(enabled, dtype) of autocast on a device type."""
    return torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)


def exporting() -> bool:
    """Whether an exporter writes this call down: it may have no values, and nothing will be rebuilt."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def transformed() -> bool:
    """Whether a `torch.func` transform is in force: tensors are not what they seem, and saved-tensor hooks do not work there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@dataclass(slots=True)
class Surroundings:
    """The state around one evaluation of a branch.

    Attributes:
        devices: the accelerators it runs on.
        randomness: generator states before the branch; emptied by `settle` where the branch drew nothing,
            so that a deterministic branch keeps none (a CPU state has 5 kB).
        autocast: (enabled, dtype) per device type.
        cache_enabled: whether autocast may cache its casts of weights.
    """

    devices: tuple[torch.device, ...]
    randomness: RandomStates
    autocast: dict[str, AutocastState]
    cache_enabled: bool

    @classmethod
    def capture(cls, tensors: Iterable[Tensor]) -> Surroundings:
        """The state now, on the CPU and on the devices of ``tensors``."""
        others = [t for t in tensors if not t.is_cpu]
        devices = accelerators_of(others) if others else ()
        autocast = {"cpu": autocast_state("cpu"), **{d.type: autocast_state(d.type) for d in devices}}
        return cls(devices, random_states(devices), autocast, torch.is_autocast_cache_enabled())

    def settle(self) -> None:
        """After the branch ran: forget the generators it did not draw from.

        At once: who runs next may set a generator back, after which it looks as if nothing had been drawn.
        """
        after = random_states(self.devices)
        if not self.devices:  # as below, in the common case
            if same_bytes(self.randomness[None], after[None]):
                self.randomness = {}
            return
        self.randomness = {d: s for d, s in self.randomness.items() if not same_bytes(s, after[d])}

    def restored(self) -> AbstractContextManager[None]:
        """Run a recompute as the forward ran; afterwards the generators are as they were before it."""
        return _Restored(self)

    def casts(self) -> list[tuple[str, bool, torch.dtype]]:
        """(device type, enabled, dtype) of the casts that a recompute must switch, on or off."""
        return [(kind, *cast) for kind, cast in self.autocast.items() if cast[0] or torch.is_autocast_enabled(kind)]


class _Restored:
    """A run in the surroundings of another one."""

    __slots__ = ("outside", "stack", "surroundings")

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings

    def __enter__(self) -> None:
        there = self.surroundings
        self.outside = random_states(there.devices)
        self.stack: ExitStack | None = None
        try:
            set_random_states(there.randomness)
            casts = there.casts()
            if casts:
                with ExitStack() as stack:
                    for kind, enabled, dtype in casts:
                        stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=there.cache_enabled))
                    self.stack = stack.pop_all()
        except BaseException:
            set_random_states(self.outside)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            if self.stack is not None:
                self.stack.__exit__(*error)
        finally:
            set_random_states(self.outside)


Table = dict[str, Any]
"""The parameters of one module, or its buffers, by name."""

Place = tuple[Table, str, Tensor, bool]
"""Where a module holds a tensor: (its table, the name, the tensor, whether it is a parameter)."""

_VERSION = attrgetter("_version")


@dataclass(slots=True)
class Inventory:
    """What the modules of a branch own.

    Attributes:
        weights: their parameters.
        versions: the version counter of each at the time.
        writers: those that a forward may write buffers of.
        tables: where their parameters and buffers stand: (the table, what stood in it, whether it is of parameters).
    """

    weights: list[Tensor]
    versions: list[int]
    writers: list[nn.Module]
    tables: list[tuple[Table, Table, bool]]

    @classmethod
    def of(cls, roots: Iterable[nn.Module]) -> Inventory:
        """The inventory of these modules and all below them (a plain walk: `nn.Module.modules` is slow)."""
        weights, writers, tables = list[Tensor](), list[nn.Module](), list[tuple[Table, Table, bool]]()
        todo: list[nn.Module | None] = list(roots)
        seen = set[int]()
        for module in todo:  # grows
            if module is None or id(module) in seen:
                continue
            seen.add(id(module))
            table, buffers, below = module._parameters, module._buffers, module._modules
            if table:
                tables.append((table, table.copy(), True))
                weights += [w for w in table.values() if w is not None]
            if buffers:
                if any(map(_is_written, buffers.values())):
                    writers.append(module)
                tables.append((buffers, buffers.copy(), False))
            if below:
                todo += below.values()
        return cls(weights, versions_of(weights), writers, tables)

    def note(self, weight: Tensor) -> None:
        """Take up one that the branch uses, which no module of it owns."""
        self.weights.append(weight)
        self.versions.append(version_of(weight))


def hooked(module: nn.Module) -> bool:
    """Whether hooks run around the forward of a module, its own or global ones."""
    registry = nn.modules.module
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or registry._global_forward_hooks or registry._global_forward_pre_hooks)


def version_of(x: Tensor) -> int:
    """The count of in-place writes to ``x``; inference tensors have none."""
    return -1 if x.is_inference() else x._version


def versions_of(tensors: list[Tensor]) -> list[int]:
    """`version_of` each of them."""
    try:
        return [*map(_VERSION, tensors)]
    except RuntimeError:  # inference tensors
        return [*map(version_of, tensors)]


def _is_written(buffer: Tensor | None) -> bool:
    """Whether a forward may write this buffer: statistics are floats, counters have one element."""
    return buffer is not None and (buffer.is_floating_point() or buffer.numel() == 1)


class Homes(dict[int, ReferenceType[Tensor]]):
    """The tensors that the modules of a model had at conversion, by identity; see Note [Weights that are exchanged]."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied model has other tensors."""
        return Homes, ()

    def note(self, module: nn.Module) -> None:
        """Learn the tensors of a module and of all below it."""
        for gone in [i for i, known in list(self.items()) if known() is None]:  # replicas do this in several threads at once
            self.pop(gone, None)
        self.update({id(t): ref(t) for t in (*module.parameters(), *module.buffers())})

    def have(self, t: Tensor) -> bool:
        """Whether ``t`` is one of them."""
        known = self.get(id(t))
        return known is not None and known() is t


def lent(tables: list[tuple[Table, Table, bool]], homes: Homes) -> list[Place]:
    """The places in which a tensor stood that was only lent, and has gone; see Note [Weights that are exchanged]."""
    out: list[Place] = []
    for table, then, is_weight in tables:
        if [*table] != [*then] or not all(map(is_, table.values(), then.values())):
            places = ((table, name, t, is_weight) for name, t in then.items() if t is not None and table.get(name) is not t)
            out += [place for place in places if _was_lent(place, homes)]
    return out


def _was_lent(place: Place, homes: Homes) -> bool:
    table, name, then, is_weight = place
    now: Any = table.get(name)
    if type(now) not in _PLAIN or type(then) not in _PLAIN or (then.numel() and not then.untyped_storage().nbytes()):
        return False  # FSDP manages it
    one_is_no_parameter = type(now) is not type(then) or type(now) is Tensor
    return homes.have(now) or (is_weight and one_is_no_parameter)


_PLAIN = (Tensor, nn.Parameter)


@contextmanager
def put_back(places: list[Place]) -> Iterator[None]:
    """Put tensors back where they stood."""
    now = [table[name] for table, name, _, _ in places]
    try:
        for table, name, tensor, _ in places:
            table[name] = tensor
        yield
    finally:
        for (table, name, _, _), tensor in zip(places, now, strict=True):
            table[name] = tensor


Copies = dict[tuple[int, str], Tensor]
"""Buffers as a forward found them, by the identity of their module, and name."""
_QUIET: WeakSet[nn.Module] = WeakSet()  # modules whose last forward moved no version counter of a floating-point buffer


class Written:
    """What a forward of these modules (not of those below them) writes to their buffers; see Note [Buffers that are read and written]."""

    def __init__(self, modules: Iterable[nn.Module], *, copied: bool = False) -> None:
        """Before the forward; ``copied``: with copies of all that is written, counters too, whatever was written last time."""
        self.copied = copied
        self.before = [(m, quiet := m in _QUIET and not copied, _with_copies(m, not quiet)) for m in modules]

    def copies(self) -> Copies:
        """After the forward: the old values of those buffers whose new ones must not be read by a recompute."""
        found: Copies = {}
        for module, quiet, buffers in self.before:
            old: dict[str, Tensor | None] = {}
            for name, buffer, version, copy in buffers:
                if version_of(buffer) != version:
                    old[name] = copy
                elif module._buffers.get(name) is not buffer:  # another tensor took its place: it is a copy itself
                    old[name] = buffer
            loud = any(b.is_floating_point() for name, b, _, _ in buffers if name in old)
            found |= {(id(module), name): value for name, value in old.items() if (loud or self.copied) and value is not None}
            if loud and quiet:
                _QUIET.discard(module)
            elif not (loud or quiet):
                _QUIET.add(module)
        return found


def statistics_of(modules: Iterable[nn.Module]) -> Copies:
    """Copies of the running statistics of those among these modules that are in train mode.

    Batch normalisation saves them for a gradient that does not use them, and its forward changes them: a recompute that is compared finds
    those of the forward.
    """
    found = [m for m in modules if m.training and isinstance(m, _NormBase)]
    named = [(m, name, m._buffers.get(name)) for m in found for name in ("running_mean", "running_var")]
    return {(id(m), name): b.detach().clone() for m, name, b in named if b is not None}


def _with_copies(module: nn.Module, copied: bool) -> list[tuple[str, Tensor, int, Tensor | None]]:
    """(name, buffer, its version counter, a copy if wanted) of what a forward may write."""
    buffers = [(name, b) for name, b in module._buffers.items() if b is not None and _is_written(b)]
    return [(name, b, version_of(b), b.detach().clone() if copied else None) for name, b in buffers]


_LOCKS = tuple(RLock() for _ in range(64))


@contextmanager
def undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep other threads from exchanging the buffers of these modules.

    Modules share a few locks, taken in one order; a nested chain takes a part of what its outer branch holds.
    """
    with ExitStack() as stack:
        for number in sorted({id(module) // 64 % len(_LOCKS) for module in modules}):
            stack.enter_context(_LOCKS[number])
        yield


@contextmanager
def buffers_exchanged(
    modules: Iterable[nn.Module], copies: Copies | None = None, *, only_training: bool = True, every: bool = False
) -> Iterator[None]:
    """Let these modules (not those below them) write to copies of their buffers, and give them the originals back.

    Args:
        modules: whose buffers are exchanged.
        copies: older values for some of them.
        only_training: not of those in eval mode.
        every: also what is usually a constant (integers).

    Batch normalisation writes its statistics without touching their version counter, so what was written cannot be
    seen afterwards; and writing values back would race with, and look like, a change by somebody else.
    """
    writers = [m for m in modules if m.training or not only_training]
    kept: list[tuple[nn.Module, str, Tensor]] = []
    with undisturbed(writers):
        try:
            for module in writers:
                for name, buffer in module._buffers.items():
                    if buffer is not None and (every or _is_written(buffer)):
                        kept.append((module, name, buffer))
                        module._buffers[name] = (copies or {}).get((id(module), name), buffer).clone()
            yield
        finally:
            for module, name, buffer in kept:
                module._buffers[name] = buffer


@contextmanager
def buffers_kept(roots: Iterable[nn.Module], *, only_training: bool = True) -> Iterator[None]:
    """`buffers_exchanged` for these modules and all below them."""
    with buffers_exchanged(Inventory.of(roots).writers, only_training=only_training):
        yield
