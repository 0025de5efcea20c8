"""The core of a module: calls whose results are larger than what goes into them, and which treat parts of it alone.

Note [Cores]
    Where two activations are multiplied (each query with each key), the product may be much larger than both. Around
    such a product, a core is grown call by call, along one of its dimensions (the heads, or the queries): a call
    belongs to it as long as a part of its result, along a dimension, needs the same part of its inputs alone, or what
    all parts share. For element-wise calls that is known from their declaration; of others it is found out by running
    them on random tensors of the recorded shapes, whole and in two halves (of another size each, so that statistics of
    the whole cannot pass for those of a half). Calls that multiply by weights stay outside. Modules that own nothing
    are opened, so that a core is made of calls of torch's alone, and others stay outside. In place, a core may write to
    what it made itself. All else of the module stays in its order: the core is computed at one moment, when all is
    there that goes in, and before anything needs what comes out.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx, nn

from revwire._capture.recording import HIDDEN, Event, Recording, Value
from revwire._errors import CaptureError
from revwire._programs.build import HostGraph, build_graph
from revwire._programs.compiled import Compiled
from revwire._search.dataflow import Flow
from revwire._splitting.core_function import Border, InParts, Parting
from revwire._splitting.core_relations import (
    _DROPS,
    _EXACT,
    _MOST_KNOWN,
    _MOST_WAYS,
    _SIZED,
    Known,
    Relation,
    _aligned,
    _constants,
    _is_integer,
    _random,
    _with_size,
)
from revwire._streams.samples import alike
from revwire._structures import refs
from revwire._surroundings.inventory import has_hooks
from revwire._surroundings.randomness import preserved_random_state
from revwire._torch import is_compiled

_MOST_SEEDS = 64


Sizes = tuple[int, ...]
"""Of the dimensions along which a core may be cut, best first."""


def which(sizes: Sizes, count: int) -> int:
    """The dimension along which to cut a core into so many parts: the first that has as many elements, or the one that
    has most.
    """
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


_Input = tuple[fx.Node, int | None]
"""What goes into a core, and the dimension along which it is cut."""


@dataclass
class _Core:
    """Nodes of a graph and the dimension along which each is cut, in the order of the graph."""

    dims: dict[fx.Node, int]
    size: int
    seed: fx.Node
    inputs: list[_Input] = field(default_factory=list)
    outs: list[fx.Node] = field(default_factory=list)


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
    return _searched(recording, known).program(path, parting)


def calls_with_cores(flow: Flow, host: int, region: Iterable[int], known: Known) -> dict[int, Sizes]:
    """The module calls inside of a host whose own code holds a core, with its sizes; the innermost, where several lie
    inside each other.

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
        if not _multiplies_activations(flow, recording.events[number]) or any(found.get(call) for call in around):
            continue
        for call in reversed(around):
            if call not in found:
                found[call] = _sizes(recording, call, known)
            if found[call]:
                break
    return {call: sizes for call, sizes in found.items() if sizes}


def _searched(recording: Recording, known: Known) -> _Search:
    """The search in the code of the root of a recording, with the modules opened that own nothing, if that can be."""
    inline = set[int]()
    for e in recording.events[1:]:
        if (
            e.is_module
            and (e.parent == 0 or e.parent in inline)
            and not e.hooked
            and _owns_nothing(e.target)
            and not _acts(recording, e)
        ):
            inline.add(e.number)
    try:
        return _Search(build_graph(recording, inline), known)
    except CaptureError:
        if not inline:
            raise
        return _Search(build_graph(recording, set()), known)


def _acts(recording: Recording, event: Event) -> bool:
    """Whether the own code of a module call does what a graph cannot hold."""
    return bool(event.changes) or any(read.parent == event.number and read.kind in HIDDEN for read in recording.reads)


def _sizes(recording: Recording, call: int, known: Known) -> Sizes:
    """The sizes of the dimensions along which the core of a module call may be cut; none where it has none."""
    if recording.events[call].hooked or any(
        is_compiled(recording.events[c].target) for c in (*recording.calls_around(call), call)
    ):
        return ()
    try:
        return tuple(core.size for core in _searched(recording.cut(call), known).found())
    except CaptureError:
        return ()


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
        self.maker: dict[fx.Node, Any] = {n: n.args[0] for n in self.nodes if self.is_result(n)}
        self.above: dict[fx.Node, int] = {}  # the places of all that a node comes from, as bits
        for node in self.nodes:
            bits = 0
            for i in node.all_input_nodes:
                bits |= self.above[i] | 1 << self.order[i]
            self.above[node] = bits
        self.belongs: dict[fx.Node, bool] = {}
        self.relations: dict[tuple[fx.Node, int], Relation | None] = {}

    def is_result(self, node: fx.Node) -> bool:
        """Whether a node is one of several results of a call."""
        made = (
            node.target is operator.getitem
            and node in self.value_of
            and node not in self.host.event_of
            and isinstance(node.args[1], int)
        )
        return made and node.args[0] in self.host.event_of and node.args[0] not in self.value_of

    def call(self, node: fx.Node) -> fx.Node:
        """The node of the call that a value comes from."""
        made: fx.Node = self.maker.get(node, node)
        return made

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        return self.call(node).all_input_nodes

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that need a value; instead of calls with several results, those results."""
        found: list[fx.Node] = []
        for user in node.users:
            results = [r for r in user.users if self.maker.get(r) is user]
            found += results if results and len(results) == len(user.users) else [user]
        return found

    # -- finding ---------------------------------------------------------------------------------------------------

    def found(self) -> list[_Core]:
        """The core that is largest compared with what goes in, along each dimension along which it may be cut, best
        first.

        Raises:
            CaptureError: there is none.
        """
        seeds = [n for n in self.nodes if n in self.host.event_of and n in self.value_of]
        seen: set[tuple[fx.Node, int]] = set()
        good: list[_Core] = []
        for seed in [n for n in seeds if _multiplies_activations(self.flow, self.event(n))][:_MOST_SEEDS]:
            for dim in self.dimensions(self.value_of[seed].shape):
                core = None if (seed, dim) in seen else self.grown(seed, dim)
                if core is not None:
                    seen.update(core.dims.items())
                    good += [core] if self.gain(core) > 1 else []
        if not good:
            raise CaptureError("holds no core that may run in parts")
        best = max(good, key=self.gain)
        order = self.dimensions(self.value_of[best.seed].shape)
        same = {
            core.dims[best.seed]: core
            for core in reversed(good)
            if best.seed in core.dims and core.dims[best.seed] in order
        }
        return [same[dim] for dim in order if dim in same]

    def dimensions(self, shape: tuple[int, ...]) -> list[int]:
        """Those along which a core may be cut, best first: heads, then queries, then samples. The last one is what is
        summed over.
        """
        return [*range(1, len(shape) - 1), 0] if len(shape) > 3 else [*range(len(shape) - 1)]

    def event(self, node: fx.Node) -> Event:
        return self.host.recording.events[self.host.event_of[self.call(node)]]

    def grown(self, seed: fx.Node, dim: int) -> _Core | None:
        """The core around a product, cut along one of its dimensions; None if it is none."""
        size = self.value_of[seed].shape[dim]
        if size < 2 or self.relation(seed, dim) is None:
            return None
        dims, todo = {seed: dim}, [seed]
        while todo:
            for node in todo:  # grows
                todo += [*self.grow_down(dims, node, size), *self.grow_up(dims, node, size)]
            todo = [
                new for node in list(dims) for new in self.grow_up(dims, node, size)
            ]  # what others had to come before
        core = _Core({n: dims[n] for n in self.nodes if n in dims}, size, seed)
        for node in core.dims:
            for i, d in zip(self.inputs(node), self.related(node, dims[node]).dims, strict=True):
                if i in dims and dims[i] != d:
                    return None
                if i not in dims and (i, d) not in core.inputs:
                    core.inputs.append((i, d))
        core.outs = [n for n in core.dims if any(u not in dims for u in self.users(n))]
        floats = all(self.value_of[n].dtype.is_floating_point for n in core.outs)
        return core if core.outs and floats and not self.writes_outside(core) and self.has_a_moment(core) else None

    def writes_outside(self, core: _Core) -> bool:
        """Whether anything writes to memory that is seen from inside of the core and from outside."""
        storages = self.host.storage_of
        touched = {storages[n] for n in (*core.dims, *(i for i, _ in core.inputs)) if n in storages} & self.written
        return any(storage in touched and n not in core.dims for n, storage in storages.items())

    def has_a_moment(self, core: _Core) -> bool:
        """Whether all that goes in is there before anything else needs what comes out."""
        return self.moment(core) < min(self.order[u] for n in core.outs for u in self.outside(n, core))

    def moment(self, core: _Core) -> int:
        """The place of the last node that the core needs."""
        return max(self.order[i] for i, _ in core.inputs)

    def outside(self, node: fx.Node, core: _Core) -> list[fx.Node]:
        """The calls outside of a core that need a value of it."""
        return [self.call(u) for u in self.users(node) if u not in core.dims]

    def grow_down(self, dims: dict[fx.Node, int], node: fx.Node, size: int) -> list[fx.Node]:
        """Take in the calls that go on from a node of the core, and need nothing that comes from it by a way
        outside.
        """
        new: list[fx.Node] = []
        if any(
            user in self.host.elided for user in node.users
        ):  # a module hands it on, and may act on it, or on its gradient
            return new
        for user in self.users(node):
            if user in dims or not self.may_belong(user) or self.comes_back(user, dims):
                continue
            for d, s in enumerate(self.value_of[user].shape):
                relation = self.relation(user, d) if s == size else None
                if relation is not None and all(
                    dims.get(i, at) == at for i, at in zip(self.inputs(user), relation.dims, strict=True)
                ):
                    dims[user] = d
                    new.append(user)
                    break
        return new

    def comes_back(self, node: fx.Node, dims: dict[fx.Node, int]) -> bool:
        mask = 0
        for inside in dims:
            mask |= 1 << self.order[inside]
        return any(i not in dims and self.above[i] & mask for i in self.inputs(node))

    def grow_up(self, dims: dict[fx.Node, int], node: fx.Node, size: int) -> list[fx.Node]:
        """Take in the calls that a node of the core needs, if only the core needs them, along one dimension."""
        new = []
        for i, d in zip(self.inputs(node), self.related(node, dims[node]).dims, strict=True):
            if i in dims or d is None or not self.may_belong(i) or self.value_of[i].shape[d] != size:
                continue
            if self.serves_only(dims, i, d) and self.relation(i, d) is not None and not self.is_cut_out(dims, i, d):
                dims[i] = d
                new.append(i)
        return new

    def serves_only(self, dims: dict[fx.Node, int], node: fx.Node, dim: int) -> bool:
        """Whether only the core needs a node, and only along this dimension."""
        return all(u in dims and self.wants(u, dims[u], node) == {dim} for u in self.users(node))

    def is_cut_out(self, dims: dict[fx.Node, int], node: fx.Node, dim: int) -> bool:
        """Whether a node is a view of a part of something whose other parts stay outside: the gradient of that would be
        larger.
        """
        larger = [i for i in self.inputs(node) if self.bytes_of(i) > self.bytes_of(node)] if self.is_view(node) else []
        return any(u not in dims and not self.serves_only(dims, u, dim) for i in larger for u in self.users(i))

    def wants(self, node: fx.Node, dim: int, i: fx.Node) -> set[int | None]:
        """Along which dimensions a node of the core needs its input ``i``."""
        return {d for other, d in zip(self.inputs(node), self.related(node, dim).dims, strict=True) if other is i}

    def may_belong(self, node: fx.Node) -> bool:
        """Whether a call may be computed again in parts: it is one of torch's, and does not multiply by weights; see
        `writes_outside`.
        """
        if node not in self.belongs:
            self.belongs[node] = self._may_belong(node)
        return self.belongs[node]

    def _may_belong(self, node: fx.Node) -> bool:
        call = self.call(node)
        if (
            call not in self.host.event_of
            or node not in self.value_of
            or any(i not in self.value_of for i in self.inputs(node))
        ):
            return False
        event = self.event(node)
        if event.is_module or event.opaque or (call in self.host.writes and not event.is_pointwise):
            return False
        return not event.is_product or _multiplies_activations(self.flow, event)

    def gain(self, core: _Core) -> float:
        """How much larger the largest that is made inside is than what goes in: that is kept instead of it.

        What is handed in, and enters by element-wise calls only (a bias, a mask), is there anyway. Where much comes out
        of what is made inside (maps of attention), little is gained; more where that is only returned, and may be
        dropped, than where it is used.
        """
        end = self.nodes[-1]
        inside = [self.bytes_of(n) for n in core.dims if n not in core.outs and not self.is_view(n)]
        hidden = [max(0, self.event(n).saved - sum(map(self.bytes_of, (n, *self.inputs(n))))) for n in core.outs]
        outside = [self.bytes_of(n) * (1 if self.outside(n, core) == [end] else 2) for n in core.outs]
        if sum(inside) + sum(hidden) <= sum(outside):
            return 0.0
        inputs, returned = {i for i, _ in core.inputs}, end.all_input_nodes
        there = [i for i in inputs if i.op in ("placeholder", "get_attr") or i in returned]
        light = {i for i in there if all(self.event(u).is_pointwise for u in self.users(i) if u in core.dims)}
        return max([*inside, *hidden]) / max(1, sum(map(self.bytes_of, inputs - light)))

    def is_view(self, node: fx.Node) -> bool:
        return any(self.value_of[i].storage == self.value_of[node].storage for i in self.inputs(node))

    def bytes_of(self, node: fx.Node) -> int:
        value = self.value_of[node]
        return torch.Size(value.shape).numel() * value.dtype.itemsize

    # -- relations -------------------------------------------------------------------------------------------------

    def related(self, node: fx.Node, dim: int) -> Relation:
        """That of a node of the core."""
        relation = self.relation(node, dim)
        assert relation is not None
        return relation

    def relation(self, node: fx.Node, dim: int) -> Relation | None:
        """What a part of a call's result along a dimension needs; None where that is not a part of its inputs."""
        if (node, dim) not in self.relations:
            self.relations[node, dim] = self.known_relation(node, dim) if self.may_belong(node) else None
        return self.relations[node, dim]

    def known_relation(self, node: fx.Node, dim: int) -> Relation | None:
        key = self.key(node), dim
        if key not in self.known:
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            self.known[key] = self.looked_up(node, dim)
        return self.known[key]

    def key(self, node: fx.Node) -> Any:
        call, inputs = self.call(node), self.inputs(node)
        values = [self.value_of[i] for i in inputs]
        constants = repr(fx.map_arg((call.args, call.kwargs), lambda n: f"<{inputs.index(n)}>"))
        return (
            self.event(node).target,
            self.index(node),
            tuple((v.shape, v.dtype) for v in values),
            constants,
            self.event(node).modes,
        )

    def index(self, node: fx.Node) -> int | None:
        """Which of several results of its call it is."""
        return node.args[1] if node in self.maker else None  # type: ignore[return-value]

    def looked_up(self, node: fx.Node, dim: int) -> Relation | None:
        event, shape = self.event(node), self.value_of[node].shape
        if event.is_pointwise or event.target in _DROPS:
            return Relation(tuple(_aligned(self.value_of[i].shape, shape, dim) for i in self.inputs(node)))
        with torch.no_grad(), preserved_random_state(() if self.device.type == "cpu" else (self.device,)):
            for most in self.largest_integers(node):
                try:
                    return self.tried(node, dim, most)
                except Exception:  # noqa: BLE001 - a call that knows its sizes, or is given no valid index, fails in any way
                    continue
        return None

    def largest_integers(self, node: fx.Node) -> list[int]:
        """Up to which to draw integers for a call: they may be any, or indices into its other inputs."""
        values = [self.value_of[i] for i in self.inputs(node)]
        sizes = [s for v in values if v.dtype.is_floating_point or v.dtype.is_complex for s in v.shape]
        return [100, min(sizes, default=1)] if any(_is_integer(v.dtype) for v in values) else [100]

    def tried(self, node: fx.Node, dim: int, most: int) -> Relation | None:
        """Run the call on random tensors, whole and in halves, and see which parts of them a half needs."""
        shape = self.value_of[node].shape
        wide = sum(torch.Size(self.value_of[n].shape).numel() for n in (node, *self.inputs(node))) <= _EXACT
        given = [_random(self.value_of[i], self.device, most, wide=wide) for i in self.inputs(node)]
        half = shape[dim] // 2
        whole = self.run(node, given)
        if (
            not isinstance(whole, Tensor)
            or whole.shape != shape
            or not whole.numel()
            or bool((whole == whole.flatten()[0]).all())
        ):
            return None  # the last: what is the same everywhere shows nothing
        for relation in self.ways(node, dim):
            if all(
                self.holds(node, given, relation, whole, dim, *part) for part in ((0, half), (half, shape[dim] - half))
            ):
                return relation
        return None

    def ways(self, node: fx.Node, dim: int) -> Iterator[Relation]:
        """The relations that may hold, the likely ones first."""
        shape = self.value_of[node].shape
        options: list[list[int | None]] = []
        for i in self.inputs(node):
            own = self.value_of[i].shape
            good = [d for d in range(len(own)) if own[d] == shape[dim]]
            good.sort(key=lambda d: (len(own) - d != len(shape) - dim, d != dim))
            options.append([*good, None])
        names = getattr(self.event(node).target, "__name__", "")
        numbers: list[int | None] = [None]
        if names in _SIZED:
            constants = _constants(self.call(node))
            numbers += [k for k, constant in enumerate(constants) if type(constant) is int and constant == shape[dim]]
        for count, dims in enumerate(product(*options)):
            if count < _MOST_WAYS and any(d is not None for d in dims):
                yield from (Relation(dims, number) for number in numbers)

    def holds(
        self, node: fx.Node, given: list[Tensor], relation: Relation, whole: Tensor, dim: int, start: int, length: int
    ) -> bool:
        part = [x if d is None else x.narrow(d, start, length) for x, d in zip(given, relation.dims, strict=True)]
        try:
            found = self.run(node, part, relation.size, length)
        except Exception:  # noqa: BLE001 - as in `looked_up`
            return False
        return isinstance(found, Tensor) and alike(found, whole.narrow(dim, start, length))

    def run(self, node: fx.Node, given: list[Tensor], number: int | None = None, size: int = 0) -> Any:
        """The call on these inputs, without dropout."""
        call: Any = self.call(node)
        tensors = dict(zip(call.all_input_nodes, given, strict=True))
        args, kwargs = fx.map_arg(_with_size(call, number, size), lambda n: tensors[n])
        if "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        out = call.target(*args, **kwargs)
        return out if node is call else out[self.index(node)]

    @property
    def device(self) -> torch.device:
        root = self.host.recording.root
        return next((t.device for t in (*root.parameters(), *root.buffers())), torch.device("cpu"))

    # -- putting together ------------------------------------------------------------------------------------------

    def program(self, path: str, parting: Parting) -> CoreProgram:
        """The module's graph with its core in parts."""
        cores = self.found()
        core = cores[which(tuple(core.size for core in cores), parting.count)]
        shapes = tuple(torch.Size(self.value_of[i].shape) for i, _ in core.inputs)
        border = Border(shapes, tuple(d for _, d in core.inputs), core.size, tuple(core.dims[n] for n in core.outs))
        call = InParts(Compiled(self.inner(core)).run, border, parting, path)
        return CoreProgram(Compiled(self.outer(core, call)), (*self.host.opened, *self.host.elided.values()))

    def inner(self, core: _Core) -> fx.Graph:
        """The graph of the core: ``f(module, size, *inputs)``."""
        graph = fx.Graph()
        size = graph.placeholder("size")
        given = {both: graph.placeholder(f"input_{i}") for i, both in enumerate(core.inputs)}
        env: dict[fx.Node, fx.Node] = {}
        made: dict[tuple[fx.Node, Relation], fx.Node] = {}
        for node, dim in core.dims.items():
            call, relation = self.call(node), self.related(node, dim)
            if (call, relation) not in made:
                needs = {
                    i: env[i] if i in env else given[i, d]
                    for i, d in zip(self.inputs(node), relation.dims, strict=True)
                }
                copied = graph.node_copy(call, needs.__getitem__)
                if relation.size is not None:
                    copied.args, copied.kwargs = _with_size(copied, relation.size, size)
                made[call, relation] = copied
            env[node] = made[call, relation]
            if node is not call:
                env[node] = graph.call_function(operator.getitem, (env[node], self.index(node)))
        graph.output(tuple(env[n] for n in core.outs))
        return graph

    def outer(self, core: _Core, call: InParts) -> fx.Graph:
        """The module's graph, in its order, with one call for its core."""
        graph, last = fx.Graph(), self.moment(core)
        module = graph.placeholder("module")
        env: dict[fx.Node, fx.Node] = {}
        within = {m for m in self.maker.values() if all(r in core.dims for r in m.users)}
        for node in self.nodes:
            if node not in core.dims and node not in within:
                env[node] = graph.node_copy(node, lambda n: env[n])
            if self.order[node] == last:
                both = graph.call_function(call, (module, *(env[i] for i, _ in core.inputs)))
                env.update({n: graph.call_function(operator.getitem, (both, i)) for i, n in enumerate(core.outs)})
        return graph


def _owns_nothing(module: nn.Module) -> bool:
    """Whether a module and those below it have neither weights nor buffers, nor hooks."""
    return not any(m._parameters or m._buffers or has_hooks(m) for m in module.modules())
