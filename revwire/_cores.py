"""The core of a module: calls whose results are larger than what goes into them, and which treat parts of it alone.

Note [Cores]
    Where two activations are multiplied (each query with each key), the product may be much larger than both. Around such a product, a
    core is grown call by call, along one of its dimensions (the heads, or the queries): a call belongs to it as long as a part of its
    result, along a dimension, needs the same part of its inputs alone, or what all parts share. For element-wise calls that is known from
    their declaration; of others it is found out by running them on random tensors of the recorded shapes, whole and in two halves. Calls
    that multiply by weights stay outside, and so does all that owns weights or buffers. In place, a core may write to what it made itself.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from revwire._chunks import alike
from revwire._errors import CaptureError
from revwire._flow import Flow
from revwire._graph import HostGraph, build_graph
from revwire._parts import Border, InParts, Parting
from revwire._program import Compiled
from revwire._recording import Event, Recording, Value, has_hooks, refs
from revwire._replay import preserved_random_state

_DROPS = (functional.dropout, torch.dropout, nn.Dropout)
_MOST_WAYS = 64
_SIZED = ("view", "reshape", "expand", "unflatten", "repeat")


class Relation(NamedTuple):
    """What a part of a call's result needs: the dimension of each input along which it needs the same part (None: all of it).

    ``size``: the place among the call's constants of the number that stands for the size of the parted dimension, if there is one.
    """

    dims: tuple[int | None, ...]
    size: int | None = None


Known = dict[Any, Relation | None]
"""The relations that were found, by call and shapes."""
Sizes = tuple[int, ...]
"""Of the dimensions along which a core may be cut, best first."""


def which(sizes: Sizes, count: int) -> int:
    """The dimension along which to cut a core into so many parts: the first that has as many elements, or the one that has most."""
    return next((i for i, size in enumerate(sizes) if size >= count), sizes.index(max(sizes)))


@dataclass(frozen=True)
class CoreProgram:
    """A module's forward for one signature, with its core in parts.

    Attributes:
        compiled: its graph.
        shape_dependent: it holds for the shapes of its capture only.
        guarded: the modules whose attributes its code depends on.
    """

    compiled: Compiled
    guarded: tuple[nn.Module, ...]
    shape_dependent: bool = True

    def __call__(self, module: nn.Module, leaves: list[Any]) -> Any:
        return self.compiled.run(module, module, *leaves)


@dataclass
class _Core:
    """Nodes of a graph and the dimension along which each is cut, in the order of the graph."""

    dims: dict[fx.Node, int]
    size: int
    inputs: dict[fx.Node, int | None] = field(default_factory=dict)
    outs: list[fx.Node] = field(default_factory=list)
    sizes: dict[fx.Node, int] = field(default_factory=dict)


def core_program(recording: Recording, path: str, parting: Parting, known: Known) -> CoreProgram:
    """The program of the root of a recording with its core in parts.

    Args:
        recording: a run of the module alone.
        path: its qualified name, for errors.
        parting: into how many parts its core is cut.
        known: relations found before, to which new ones are added.

    Raises:
        CaptureError: it has none, or does what a graph cannot repeat; the message is a short reason.
    """
    host = build_graph(recording, set())
    return _Search(host, known).program(path, parting)


def calls_with_cores(flow: Flow, host: int, region: Iterable[int], known: Known) -> dict[int, Sizes]:
    """The module calls inside of a host whose own code holds a core, with its sizes; the innermost, where several lie inside each other.

    Args:
        flow: of a run of the model.
        host: the call of the host.
        region: the events inside of it where cores are looked for.
        known: relations found before, to which new ones are added.
    """
    recording = flow.recording
    found: dict[int, Sizes] = {}
    for number in sorted(region):
        around = [call for call in recording.calls_around(number) if call > host]
        if not _multiplies_activations(flow, recording.events[number]) or not found.keys().isdisjoint(around):
            continue
        for call in reversed(around):
            sizes = _sizes(recording, call, known)
            if sizes:
                found[call] = sizes
                break
    return found


def _sizes(recording: Recording, call: int, known: Known) -> Sizes:
    """The sizes of the dimensions along which the core of a module call may be cut; none where it has none."""
    if recording.events[call].hooked or any(_is_compiled(recording.events[c].target) for c in (*recording.calls_around(call), call)):
        return ()
    try:
        return tuple(core.size for core in _Search(build_graph(recording.cut(call), set()), known).found())
    except CaptureError:
        return ()


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module's code is compiled as a whole: another forward would break its graph."""
    return module._compiled_call_impl is not None or type(module).__module__.startswith("torch._dynamo")


def _multiplies_activations(flow: Flow, event: Event) -> bool:
    active = {r.value for r in refs((event.args, event.kwargs)) if flow.active[r.value]}
    return not event.is_module and event.is_product and len(active) > 1


class _Search:
    """Finds the core in the graph of a module, and puts the graph together again around it."""

    def __init__(self, host: HostGraph, known: Known) -> None:
        self.host = host
        self.known = known
        self.flow = Flow(host.recording)
        self.nodes = list(host.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.value_of: dict[fx.Node, Value] = {n: host.recording.values[v] for v, n in host.node_of.items()}
        self.written = {s for storages in host.writes.values() for s in storages}
        self.silent = {n for n, module in host.elided.items() if self.is_silent(n, module)}

    def is_silent(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether a module only hands its input on (dropout that drops nothing): it is called where that is made."""
        return not node.users and len(node.all_input_nodes) == 1 and _owns_nothing(module)

    def users(self, node: fx.Node) -> list[fx.Node]:
        return [user for user in node.users if user not in self.silent]

    # -- finding ---------------------------------------------------------------------------------------------------

    def found(self) -> list[_Core]:
        """The core that is largest compared with what goes in, along each dimension along which it may be cut.

        Raises:
            CaptureError: there is none.
        """
        best: list[_Core] = []
        for seed in [n for n in self.nodes if n in self.host.event_of and n in self.value_of]:
            if _multiplies_activations(self.flow, self.event(seed)) and not (best and seed in best[0].dims):
                cores = [self.grown(seed, dim) for dim in self.dimensions(self.value_of[seed].shape)]
                good = [core for core in cores if core is not None and self.gain(core) > 1]
                if good and (not best or self.gain(good[0]) > self.gain(best[0])):
                    best = good
        if not best:
            raise CaptureError("holds no core that may run in parts")
        return best

    def dimensions(self, shape: tuple[int, ...]) -> list[int]:
        """Those along which a core may be cut, best first: heads, then queries, then samples. The last one is what is summed over."""
        return [*range(1, len(shape) - 1), 0] if len(shape) > 3 else [*range(len(shape) - 1)]

    def event(self, node: fx.Node) -> Event:
        return self.host.recording.events[self.host.event_of[node]]

    def grown(self, seed: fx.Node, dim: int) -> _Core | None:
        """The core around a product, cut along one of its dimensions; None if it is none."""
        size = self.value_of[seed].shape[dim]
        if size < 2 or self.relation(seed, dim) is None:
            return None
        dims, grows = {seed: dim}, True
        while grows:
            grows = self.grow_down(dims, size) or self.grow_up(dims, size)
        core = _Core({n: dims[n] for n in self.nodes if n in dims}, size)
        for node in core.dims:
            relation = self.relation(node, dims[node])
            assert relation is not None
            if relation.size is not None:
                core.sizes[node] = relation.size
            for i, d in zip(node.all_input_nodes, relation.dims, strict=True):
                if i in dims and dims[i] != d:
                    return None
                if i not in dims and core.inputs.setdefault(i, d) != d:
                    return None
        if self.writes_outside(core):
            return None
        core.outs = [n for n in core.dims if any(u not in dims for u in self.users(n))]
        floats = all(self.value_of[n].dtype.is_floating_point for n in core.outs)
        return core if core.outs and floats else None

    def writes_outside(self, core: _Core) -> bool:
        """Whether anything writes to memory that is seen from inside of the core and from outside."""
        storages = self.host.storage_of
        touched = {storages[n] for n in (*core.dims, *core.inputs) if n in storages} & self.written
        return any(storage in touched and n not in core.dims for n, storage in storages.items())

    def grow_down(self, dims: dict[fx.Node, int], size: int) -> bool:
        """Take in a call that goes on from the core, if there is one."""
        for node in list(dims):
            for user in self.users(node):
                if user in dims or not self.may_belong(user):
                    continue
                for d, s in enumerate(self.value_of[user].shape):
                    relation = self.relation(user, d) if s == size else None
                    if relation is not None and self.fits(user, relation, dims):
                        dims[user] = d
                        return True
        return False

    def fits(self, node: fx.Node, relation: Relation, dims: dict[fx.Node, int]) -> bool:
        return all(dims.get(i, d) == d for i, d in zip(node.all_input_nodes, relation.dims, strict=True))

    def grow_up(self, dims: dict[fx.Node, int], size: int) -> bool:
        """Take in a call that only the core needs, if there is one."""
        for node in list(dims):
            relation = self.relation(node, dims[node])
            assert relation is not None
            for i, d in zip(node.all_input_nodes, relation.dims, strict=True):
                if i in dims or d is None or not self.may_belong(i) or any(u not in dims for u in self.users(i)):
                    continue
                if self.value_of[i].shape[d] == size and self.relation(i, d) is not None:
                    dims[i] = d
                    return True
        return False

    def may_belong(self, node: fx.Node) -> bool:
        """Whether a call may be computed again in parts: it owns nothing, and does not multiply by weights; see also `writes_outside`."""
        if node not in self.host.event_of or node not in self.value_of or any(i not in self.value_of for i in node.all_input_nodes):
            return False
        event, events = self.event(node), self.host.recording.events
        if node in self.host.writes and not event.is_pointwise:
            return False
        inner = [e for e in events[event.number : event.end] if not e.is_module] if event.is_module else [event]
        if event.is_module and not _owns_nothing(event.target):
            return False
        return not any(e.is_product and not _multiplies_activations(self.flow, e) for e in inner) and not any(e.opaque for e in inner)

    def gain(self, core: _Core) -> float:
        """How much larger the largest that is made inside is than what goes in: that is kept instead of it.

        What is handed in, and enters by element-wise calls only (a bias, a mask), is there anyway. Where more comes out than stays
        inside (a map of attention, at each of its stages), nothing is gained.
        """
        inside = [self.bytes_of(n) for n in core.dims if n not in core.outs and not self.event(n).view]
        hidden = [max(0, self.event(n).saved - sum(map(self.bytes_of, (n, *n.all_input_nodes)))) for n in core.outs]
        if sum(inside) + sum(hidden) < sum(map(self.bytes_of, core.outs)):
            return 0.0
        returned = self.nodes[-1].all_input_nodes
        there = [i for i in core.inputs if i.op in ("placeholder", "get_attr") or i in returned]
        light = [i for i in there if all(self.event(u).is_pointwise for u in self.users(i) if u in core.dims)]
        return max([*inside, *hidden]) / max(1, sum(self.bytes_of(i) for i in core.inputs if i not in light))

    def bytes_of(self, node: fx.Node) -> int:
        value = self.value_of[node]
        return torch.Size(value.shape).numel() * value.dtype.itemsize

    # -- relations -------------------------------------------------------------------------------------------------

    def relation(self, node: fx.Node, dim: int) -> Relation | None:
        """What a part of a call's result along a dimension needs; None where that is not a part of its inputs."""
        if not self.may_belong(node):
            return None
        key = self.key(node), dim
        if key not in self.known:
            self.known[key] = self.looked_up(node, dim)
        return self.known[key]

    def key(self, node: fx.Node) -> Any:
        target = self.event(node).target
        if isinstance(target, nn.Module):
            target = type(target), repr(target), target.training
        inputs = node.all_input_nodes
        shapes = [(self.value_of[i].shape, self.value_of[i].dtype) for i in inputs]
        return target, tuple(shapes), repr(fx.map_arg((node.args, node.kwargs), lambda n: f"<{inputs.index(n)}>"))

    def looked_up(self, node: fx.Node, dim: int) -> Relation | None:
        event, shape = self.event(node), self.value_of[node].shape
        drops = event.target in _DROPS or type(event.target) in _DROPS
        if event.is_pointwise or drops:
            return Relation(tuple(_aligned(self.value_of[i].shape, shape, dim) for i in node.all_input_nodes))
        try:
            with torch.no_grad(), preserved_random_state(() if self.device.type == "cpu" else (self.device,)):
                return self.tried(node, dim)
        except Exception:  # noqa: BLE001 - a call that knows its sizes fails on a part in any way
            return None

    def tried(self, node: fx.Node, dim: int) -> Relation | None:
        """Run the call on random tensors, whole and in halves, and see which parts of them a half needs."""
        given = [_random(self.value_of[i], self.device) for i in node.all_input_nodes]
        size = self.value_of[node].shape[dim]
        half = size // 2
        whole = self.run(node, given)
        if not isinstance(whole, Tensor) or whole.shape != self.value_of[node].shape:
            return None
        for relation in self.ways(node, dim):
            if all(self.holds(node, given, relation, whole, dim, *part) for part in ((0, half), (half, size - half))):
                return relation
        return None

    def ways(self, node: fx.Node, dim: int) -> Iterator[Relation]:
        """The relations that may hold, the likely ones first."""
        shape = self.value_of[node].shape
        options: list[list[int | None]] = []
        for i in node.all_input_nodes:
            own = self.value_of[i].shape
            good = [d for d in range(len(own)) if own[d] == shape[dim]]
            good.sort(key=lambda d: (len(own) - d != len(shape) - dim, d != dim))
            options.append([*good, None])
        names = getattr(self.event(node).target, "__name__", "")
        numbers: list[int | None] = [None]
        if names in _SIZED:
            numbers += [k for k, constant in enumerate(_constants(node)) if type(constant) is int and constant == shape[dim]]
        for count, dims in enumerate(product(*options)):
            if count < _MOST_WAYS and any(d is not None for d in dims):
                yield from (Relation(dims, number) for number in numbers)

    def holds(self, node: fx.Node, given: list[Tensor], relation: Relation, whole: Tensor, dim: int, start: int, length: int) -> bool:
        part = [x if d is None else x.narrow(d, start, length) for x, d in zip(given, relation.dims, strict=True)]
        try:
            found = self.run(node, part, relation.size, length)
        except Exception:  # noqa: BLE001 - as in `looked_up`
            return False
        return isinstance(found, Tensor) and alike(found, whole.narrow(dim, start, length))

    def run(self, node: fx.Node, given: list[Tensor], number: int | None = None, size: int = 0) -> Any:
        tensors = dict(zip(node.all_input_nodes, given, strict=True))
        args, kwargs = fx.map_arg(_with_size(node, number, size), lambda n: tensors[n])
        call: Any = self.event(node).target if node.op == "call_module" else node.target
        return call(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        root = self.host.recording.root
        return next((t.device for t in (*root.parameters(), *root.buffers())), torch.device("cpu"))

    # -- putting together ------------------------------------------------------------------------------------------

    def program(self, path: str, parting: Parting) -> CoreProgram:
        """The module's graph with its core in parts."""
        cores = self.found()
        core = cores[which(tuple(core.size for core in cores), parting.count)]
        shapes = tuple(torch.Size(self.value_of[i].shape) for i in core.inputs)
        border = Border(shapes, tuple(core.inputs.values()), core.size, tuple(core.dims[n] for n in core.outs))
        call = InParts(Compiled(self.inner(core)).run, border, parting, path)
        modules = [self.event(n).target for n in core.dims if n.op == "call_module"]  # whose hooks would not be called as they are
        return CoreProgram(Compiled(self.outer(core, call)), (*self.host.opened, *self.host.elided.values(), *modules))

    def is_within(self, node: fx.Node, core: _Core) -> bool:
        """Whether a call that only hands on what the core makes goes into it."""
        return node in self.silent and node.all_input_nodes[0] in core.dims

    def inner(self, core: _Core) -> fx.Graph:
        """The graph of the core: ``f(module, size, *inputs)``."""
        graph = fx.Graph()
        size = graph.placeholder("size")
        env = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(core.inputs)}
        for node in self.nodes:
            if node in core.dims or self.is_within(node, core):
                env[node] = graph.node_copy(node, lambda n: env[n])
            if node in core.sizes:
                copied = env[node]
                copied.args, copied.kwargs = _with_size(copied, core.sizes[node], size)
        graph.output(tuple(env[n] for n in core.outs))
        return graph

    def outer(self, core: _Core, call: InParts) -> fx.Graph:
        """The module's graph, with one call for its core."""
        graph = fx.Graph()
        module = graph.placeholder("module")
        env: dict[fx.Node, fx.Node] = {}
        last = max(core.dims, key=self.order.__getitem__)
        waiting: list[fx.Node | None] = []
        for node in self.nodes:
            waiting += [None] if node is last else [] if node in core.dims or self.is_within(node, core) else [node]
            progress = True
            while progress:
                ready = [w for w in waiting if all(i in env for i in (core.inputs if w is None else w.all_input_nodes))]
                for item in ready:
                    if item is None:
                        both = graph.call_function(call, (module, *(env[i] for i in core.inputs)))
                        env.update({n: graph.call_function(operator.getitem, (both, i)) for i, n in enumerate(core.outs)})
                    else:
                        env[item] = graph.node_copy(item, lambda n: env[n])
                waiting = [w for w in waiting if w not in ready]
                progress = bool(ready)
        if waiting:
            raise CaptureError("interleaves its core with what needs a part of it")
        return graph


def _owns_nothing(module: nn.Module) -> bool:
    """Whether a module and those below it have neither weights nor buffers, nor hooks."""
    return not any(m._parameters or m._buffers or has_hooks(m) for m in module.modules())


def _aligned(own: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    """The dimension of an input that is broadcast to ``shape``, of which it needs the same part; None: it is the same for all."""
    d = dim - (len(shape) - len(own))
    return d if d >= 0 and own[d] == shape[dim] else None


def _random(value: Value, device: torch.device) -> Tensor:
    if value.dtype.is_floating_point or value.dtype.is_complex:
        return torch.randn(value.shape, dtype=value.dtype, device=device)
    if value.dtype is torch.bool:
        return torch.rand(value.shape, device=device) < 0.5
    return torch.zeros(value.shape, dtype=value.dtype, device=device)


def _constants(node: fx.Node) -> list[Any]:
    out: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda a: out.append(a))
    return out


def _with_size(node: fx.Node, number: int | None, size: Any) -> tuple[Any, Any]:
    """The arguments of a call, with the number at a place among them replaced."""
    count = iter(range(1 << 30))
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: size if next(count) == number else a)
    return args, kwargs
