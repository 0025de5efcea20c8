"""The core of a module: calls whose results are larger than what goes into them, and which treat parts of it alone.

Note [Cores]
    Where two activations are multiplied (each query with each key), the product may be much larger than both. Around
    such a product, a core is grown call by call, along one of its dimensions (the heads, or the queries): a call
    belongs to it as long as a part of its result, along a dimension, needs the same part of its inputs alone, or what
    all parts share. For element-wise calls that is known from their declaration; of others it is found out by running
    them on random tensors of the recorded shapes, whole and in two halves (of another size each, so that statistics of
    the whole cannot pass for those of a half). Modules that own nothing are opened, and those of torch's that own
    weights alone, so that a core is made of calls of torch's alone; others stay outside. In place, a core may write to
    what it made itself. All else of the module stays in its order: the core is computed at one moment, when all is
    there that goes in, and before anything needs what comes out.

Note [Cores by windows]
    Calls that multiply by weights stay outside of a core, as they would be computed once more. Where windows were
    folded into a dimension (shifted ones too, whatever rolled and padded them before, and with a mask for each), a core
    along it shares no activation among its parts; then it may reach from the windows that go in to those that come out,
    with all products between. That is preferred where it gains more: one copy of the state is kept, instead of queries,
    keys and values, and there may be nothing else to gain where windows are small.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from torch import fx, nn

from revwire._capture.recording import HIDDEN, Event, Recording
from revwire._errors import CaptureError
from revwire._programs.build import build_graph
from revwire._programs.host_graph import HostGraph
from revwire._search.dataflow import Flow
from revwire._splitting.core_graph import CallGraph, multiplies_activations
from revwire._splitting.core_relations import Known, Relations
from revwire._surroundings.code import is_of_torch
from revwire._surroundings.inventory import has_hooks
from revwire._torch import is_compiled

_MOST_SEEDS = 64


Sizes = tuple[int, ...]
"""Of the dimensions along which a core may be cut, best first."""


def which(sizes: Sizes, count: int) -> int:
    """The dimension along which to cut a core into so many parts: the first that has as many elements, or the one that
    has most.
    """
    return next((i for i, size in enumerate(sizes) if size >= count), sizes.index(max(sizes)))


_Input = tuple[fx.Node, int | None]
"""What goes into a core, and the dimension along which it is cut."""


@dataclass
class Core:
    """Nodes of a graph and the dimension along which each is cut, in the order of the graph."""

    dims: dict[fx.Node, int]
    size: int
    seed: fx.Node
    inputs: list[_Input] = field(default_factory=list)
    outs: list[fx.Node] = field(default_factory=list)


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
        if not multiplies_activations(flow, recording.events[number]) or any(found.get(call) for call in around):
            continue
        for call in reversed(around):
            if call not in found:
                found[call] = _sizes(recording, call, known)
            if found[call]:
                break
    return {call: sizes for call, sizes in found.items() if sizes}


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
        return tuple(core.size for core in searched(recording.of_call(call), known).found())
    except CaptureError:
        return ()


def _owns_nothing(module: nn.Module) -> bool:
    """Whether a module and those below it have neither weights nor buffers, nor hooks."""
    return not any(m._parameters or m._buffers or has_hooks(m) for m in module.modules())


def _owns_weights_alone(module: nn.Module) -> bool:
    """Whether a module is one of torch's that holds weights and nothing else, without hooks."""
    return is_of_torch(type(module)) and not (module._buffers or module._modules or has_hooks(module))


def searched(recording: Recording, known: Known) -> CoreSearch:
    """The search in the code of the root of a recording, with as many modules opened as can be: those that own nothing,
    and torch's that own weights alone.
    """
    for may_open in (lambda m: _owns_nothing(m) or _owns_weights_alone(m), _owns_nothing):
        inline = set[int]()
        for e in recording.events[1:]:
            if (
                e.is_module
                and (e.parent == 0 or e.parent in inline)
                and not e.hooked
                and may_open(e.target)
                and not _acts(recording, e)
            ):
                inline.add(e.number)
        with suppress(CaptureError):
            return CoreSearch(build_graph(recording, inline), known)
    return CoreSearch(build_graph(recording, set()), known)


class CoreSearch:
    """Finds the core in the graph of a module."""

    def __init__(self, host: HostGraph, known: Known) -> None:
        self.graph = CallGraph(host)
        self.relations = Relations(self.graph, known)
        self.written = {s for storages in host.writes.values() for s in storages}

    def found(self) -> list[Core]:
        """The core that is largest compared with what goes in, along each dimension along which it may be cut, best
        first.

        Raises:
            CaptureError: there is none.
        """
        seeds = [n for n in self.graph.nodes if n in self.graph.host.event_of and n in self.graph.value_of]
        seen: set[tuple[fx.Node, int]] = set()
        good: list[Core] = []
        for seed in [n for n in seeds if multiplies_activations(self.graph.flow, self.graph.event(n))][:_MOST_SEEDS]:
            for dim in self.dimensions(self.graph.value_of[seed].shape):
                core = None if (seed, dim) in seen else self.grown(seed, dim)
                if core is not None:
                    seen.update(core.dims.items())
                    good += [c for c in (core, self.with_weights(core)) if c is not None and self.gain(c) > 1]
        if not good:
            raise CaptureError("holds no core that may run in parts")
        best = max(good, key=self.gain)
        order = self.dimensions(self.graph.value_of[best.seed].shape)
        same = {
            core.dims[best.seed]: core
            for core in reversed(good)
            if best.seed in core.dims and core.dims[best.seed] in order
        }
        if self.has_weights(best):
            same, order = {**same, best.dims[best.seed]: best}, [best.dims[best.seed], *order]
        return [same[dim] for dim in dict.fromkeys(order) if dim in same]

    def dimensions(self, shape: tuple[int, ...]) -> list[int]:
        """Those along which a core may be cut, best first: heads, then queries, then samples. The last one is what is
        summed over.
        """
        return [*range(1, len(shape) - 1), 0] if len(shape) > 3 else [*range(len(shape) - 1)]

    def grown(self, seed: fx.Node, dim: int) -> Core | None:
        """The core around a product, cut along one of its dimensions; None if it is none."""
        size = self.graph.value_of[seed].shape[dim]
        if size < 2 or self.relations.of(seed, dim) is None:
            return None
        return self.closed(self.taken_in({seed: dim}, size), size, seed)

    def with_weights(self, core: Core) -> Core | None:
        """A core with the products by weights around it, where its parts share no activation; see Note [Cores by
        windows].
        """
        if self.shares_activations(core):
            return None
        larger = self.closed(self.taken_in(dict(core.dims), core.size, weights=True), core.size, core.seed)
        return None if larger is None or self.shares_activations(larger) or not self.has_weights(larger) else larger

    def has_weights(self, core: Core) -> bool:
        """Whether a core multiplies by weights."""
        return any(self.graph.multiplies_by_weights(n) for n in core.dims)

    def shares_activations(self, core: Core) -> bool:
        """Whether something that comes from the module's input goes whole into each part."""
        return any(dim is None and self.graph.is_active(i) for i, dim in core.inputs)

    def closed(self, dims: dict[fx.Node, int], size: int, seed: fx.Node) -> Core | None:
        """The core of these nodes, with what goes in and comes out; None if it is none."""
        core = Core({n: dims[n] for n in self.graph.nodes if n in dims}, size, seed)
        if not self.takes_inputs(core):
            return None
        core.outs = [n for n in core.dims if any(u not in dims for u in self.graph.users(n))]
        floats = all(self.graph.value_of[n].dtype.is_floating_point for n in core.outs)
        return core if core.outs and floats and not self.writes_outside(core) and self.has_a_moment(core) else None

    def taken_in(self, dims: dict[fx.Node, int], size: int, *, weights: bool = False) -> dict[fx.Node, int]:
        """Calls, and those around them that can be computed in parts with them, each with its dimension."""
        todo = [*dims]
        while todo:
            for node in todo:  # grows
                todo += [*self.grow_down(dims, node, size, weights), *self.grow_up(dims, node, size, weights)]
            # those above may serve the core alone only now, after others have come
            todo = [new for node in list(dims) for new in self.grow_up(dims, node, size, weights)]
        return dims

    def may_join(self, node: fx.Node, weights: bool) -> bool:
        """Whether a call may belong to a core, that may, or may not, multiply by weights."""
        return self.graph.may_belong(node) and (weights or not self.graph.multiplies_by_weights(node))

    def takes_inputs(self, core: Core) -> bool:
        """Note what goes into a core; False where a call of it needs another along another dimension than it is cut."""
        for node in core.dims:
            for i, d in zip(self.graph.inputs(node), self.relations.related(node, core.dims[node]).dims, strict=True):
                if i in core.dims and core.dims[i] != d:
                    return False
                if i not in core.dims and (i, d) not in core.inputs:
                    core.inputs.append((i, d))
        return True

    def writes_outside(self, core: Core) -> bool:
        """Whether anything writes to memory that is seen from inside of the core and from outside."""
        storages = self.graph.host.storage_of
        touched = {storages[n] for n in (*core.dims, *(i for i, _ in core.inputs)) if n in storages} & self.written
        return any(storage in touched and n not in core.dims for n, storage in storages.items())

    def has_a_moment(self, core: Core) -> bool:
        """Whether all that goes in is there before anything else needs what comes out."""
        return self.moment(core) < min(self.graph.order[u] for n in core.outs for u in self.outside(n, core))

    def moment(self, core: Core) -> int:
        """The place of the last node that the core needs."""
        return max(self.graph.order[i] for i, _ in core.inputs)

    def outside(self, node: fx.Node, core: Core) -> list[fx.Node]:
        """The calls outside of a core that need a value of it."""
        return [self.graph.call(u) for u in self.graph.users(node) if u not in core.dims]

    def grow_down(self, dims: dict[fx.Node, int], node: fx.Node, size: int, weights: bool) -> list[fx.Node]:
        """Take in the calls that go on from a node of the core, and need nothing that comes from it by a way
        outside.
        """
        new: list[fx.Node] = []
        if any(user in self.graph.host.elided for user in node.users):
            return new  # a module hands it on, and may act on it, or on its gradient
        for user in self.graph.users(node):
            if user in dims or not self.may_join(user, weights) or self.comes_back(user, dims):
                continue
            for d, s in enumerate(self.graph.value_of[user].shape):
                relation = self.relations.of(user, d) if s == size else None
                if relation is not None and all(
                    dims.get(i, at) == at for i, at in zip(self.graph.inputs(user), relation.dims, strict=True)
                ):
                    dims[user] = d
                    new.append(user)
                    break
        return new

    def comes_back(self, node: fx.Node, dims: dict[fx.Node, int]) -> bool:
        """Whether a call needs something outside that needs the core itself."""
        mask = 0
        for inside in dims:
            mask |= 1 << self.graph.order[inside]
        return any(i not in dims and self.graph.above[i] & mask for i in self.graph.inputs(node))

    def grow_up(self, dims: dict[fx.Node, int], node: fx.Node, size: int, weights: bool) -> list[fx.Node]:
        """Take in the calls that a node of the core needs, if only the core needs them, along one dimension."""
        new = []
        for i, d in zip(self.graph.inputs(node), self.relations.related(node, dims[node]).dims, strict=True):
            if i in dims or d is None or not self.may_join(i, weights) or self.graph.value_of[i].shape[d] != size:
                continue
            if self.serves_only(dims, i, d) and self.relations.of(i, d) is not None and not self.is_cut_out(dims, i, d):
                dims[i] = d
                new.append(i)
        return new

    def serves_only(self, dims: dict[fx.Node, int], node: fx.Node, dim: int) -> bool:
        """Whether only the core needs a node, and only along this dimension."""
        return all(u in dims and self.wants(u, dims[u], node) == {dim} for u in self.graph.users(node))

    def is_cut_out(self, dims: dict[fx.Node, int], node: fx.Node, dim: int) -> bool:
        """Whether a node is a view of a part of something whose other parts stay outside: the gradient of that would be
        larger.
        """
        if not self.graph.is_view(node):
            return False
        larger = [i for i in self.graph.inputs(node) if self.graph.bytes_of(i) > self.graph.bytes_of(node)]
        return any(u not in dims and not self.serves_only(dims, u, dim) for i in larger for u in self.graph.users(i))

    def wants(self, node: fx.Node, dim: int, i: fx.Node) -> set[int | None]:
        """Along which dimensions a node of the core needs its input ``i``."""
        return {
            d
            for other, d in zip(self.graph.inputs(node), self.relations.related(node, dim).dims, strict=True)
            if other is i
        }

    def gain(self, core: Core) -> float:
        """How much larger the largest that is made inside is than what goes in: that is kept instead of it.

        What is handed in, and enters by element-wise calls only (a bias, a mask), is there anyway. Where much comes out
        of what is made inside (maps of attention), little is gained; more where that is only returned, and may be
        dropped, than where it is used.
        """
        end = self.graph.nodes[-1]
        inside = [self.graph.bytes_of(n) for n in core.dims if n not in core.outs and not self.graph.is_view(n)]
        hidden = [
            max(0, self.graph.event(n).saved - sum(map(self.graph.bytes_of, (n, *self.graph.inputs(n)))))
            for n in core.outs
        ]
        outside = [self.graph.bytes_of(n) * (1 if self.outside(n, core) == [end] else 2) for n in core.outs]
        if sum(inside) + sum(hidden) <= sum(outside):
            return 0.0
        inputs, returned = {i for i, _ in core.inputs}, end.all_input_nodes
        there = [i for i in inputs if i.op in ("placeholder", "get_attr") or i in returned]
        light = {i for i in there if self.graph.enters_lightly(i, core.dims)}
        return max([*inside, *hidden]) / max(1, sum(map(self.graph.bytes_of, inputs - light)))
