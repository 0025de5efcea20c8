"""Graph + units -> a program that runs the host on two streams, installed on the host in place, and taken off again.

Note [Programs and signatures]
    A host keeps one program per *signature*: what Python could have decided on, apart from tensor values: the kinds of
    the arguments and the constants among them, training flags, plain attributes of the opened modules, autocast, whether
    gradients are enabled, and (only where the opened code looked at a shape) all shapes. A call with a new signature is
    captured anew and kept beside the others, so a program never runs on a decision it has not seen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from revwire._chains import Candidate, UnitKey, find_units
from revwire._errors import CaptureError, RevwireError
from revwire._graph import HostGraph, build_graph, input_leaves
from revwire._module import Chain, Unit
from revwire._snapshot import snapshot
from revwire._trace import CONSTANTS, Event, is_recording, record, refs

_MAX_PROGRAMS = 64
_FORWARD = "forward"
_REPLICATE = "_replicate_for_data_parallel"


@dataclass(frozen=True, eq=False)
class Slot:
    """A unit that a host holds: which one of its residual adds, and its place in a chain."""

    key: UnitKey
    posts: int
    chain: Chain
    index: int
    path: str


def pattern_of(c: Candidate, events: list[Event]) -> str:
    """The name of a unit's shape; see `PlannedUnit.pattern`."""
    if c.branch is not None and not c.post:
        return "residual"
    if c.branch is not None and all(events[e].is_pointwise for e in c.post):
        return "post-activation"
    return "block"


class _Compiled:
    """A graph as a Python function ``f(host, *inputs)``; submodules and weights are looked up on the host at each call."""

    def __init__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.name == "self":  # a submodule may be called so; the first argument of the function is
                node._rename("self_")
        graph.lint()
        code = graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<revwire graph>", "exec"), scope)  # the standard way of running an fx graph
        self.source = code.src
        self.run: Callable[..., Any] = scope[_FORWARD]


class _UnitCall:
    """What the program of a host calls for one unit."""

    __module__, __name__, __qualname__ = "revwire", "run_unit", "run_unit"

    def __init__(self, chain: Chain, unit: Unit) -> None:
        self.chain = chain
        self.unit = unit

    def __call__(self, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        return self.chain.apply(self.unit, host, x, extras)


class _ViewCall:
    """A view of the stream between two units, applied to both streams."""

    __module__, __name__, __qualname__ = "revwire", "view_streams", "view_streams"

    def __init__(self, chain: Chain, target: Callable[..., Tensor]) -> None:
        self.chain = chain
        self.target = target

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.chain.relayout(lambda t: self.target(t, *args, **kwargs), x)


@dataclass
class _Cut:
    """One unit in a host graph: its branch nodes, what it needs from outside, what it gives besides its output."""

    slot: Slot
    candidate: Candidate
    kind: str
    fork: fx.Node
    out: fx.Node
    nodes: list[fx.Node]
    dropped: list[fx.Node]
    extras: list[fx.Node]
    sides: list[fx.Node]
    unit: Unit | None = None


class Program:
    """A host's forward for one signature."""

    def __init__(self, host: HostGraph, units: list[Candidate], slots: list[Slot]) -> None:
        self.host = host
        nodes = list(host.graph.nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        self.cuts = [self._cut(c, s, nodes) for c, s in zip(units, slots, strict=True)]
        for cut in self.cuts:
            cut.unit = self._unit(cut)
        self.views = self._views(units, slots)
        outer = self._outer(nodes)
        self.compiled = _Compiled(outer)
        self.shape_dependent = host.shape_dependent
        self.guarded = [*host.opened, *host.elided]

    def __call__(self, host: nn.Module, leaves: list[Any]) -> Any:
        return self.compiled.run(host, host, *leaves)

    # -- cutting ---------------------------------------------------------------------------------------------------

    def _cut(self, c: Candidate, slot: Slot, nodes: list[fx.Node]) -> _Cut:
        events, node_of = self.host.recording.events, self.host.node_of
        result = next(r.value for r in refs(events[c.add].out))
        for value in (c.fork, c.out, result):
            if value not in node_of:
                raise CaptureError("keeps a part of a residual unit inside a module that is called for something else")
        fork, out, add = node_of[c.fork], node_of[c.out], node_of[result]
        pattern = pattern_of(c, events)
        residual = pattern == "residual" or (pattern == "post-activation" and slot.chain.coupling.drops_skip)
        branch = node_of.get(c.branch) if c.branch is not None else None
        inside = _between(fork, out)
        if residual and branch is not None:
            inside = _between(fork, branch) | (inside - {add} if c.post else set())
            dropped = [add]
        else:
            dropped = []
        ordered = [n for n in nodes if n in inside]
        self._check_writes(ordered, fork, add)
        taken = set(ordered) | set(dropped)
        extras = list(dict.fromkeys(i for n in ordered for i in n.all_input_nodes if i not in taken and i is not fork and i.op != "get_attr"))
        sides = [n for n in ordered if n is not out and any(u not in taken for u in n.users)]
        return _Cut(slot, c, "residual" if residual else "block", fork, out, ordered, dropped, extras, sides)

    def _check_writes(self, nodes: list[fx.Node], fork: fx.Node, add: fx.Node) -> None:
        """A branch may write to its own values only; the add itself is made out of place."""
        inside = set(nodes)
        for node in nodes:
            event = self.host.recording.events[self.host.event_of[node]] if node in self.host.event_of else None
            if event is None or node is add:
                continue
            inner = self.host.recording.events[event.number : event.end if event.is_module else event.number + 1]
            for before in (b for e in inner for b, _ in e.writes):
                owner = self.host.node_of.get(before)
                if owner is not None and owner not in inside:
                    raise CaptureError("writes in place to a tensor that is not its branch's own")

    def _unit(self, cut: _Cut) -> Unit:
        graph, env = fx.Graph(), {}
        env[cut.fork] = graph.placeholder("x")
        for i, extra in enumerate(cut.extras):
            env[extra] = graph.placeholder(f"extra_{i}")
        result = next(r.value for r in refs(self.host.recording.events[cut.candidate.add].out))
        add = self.host.node_of[result]
        branch = self.host.node_of[cut.candidate.branch] if cut.candidate.branch is not None else None
        for node in cut.nodes:
            for weight in (i for i in node.all_input_nodes if i.op == "get_attr" and i not in env):
                env[weight] = graph.node_copy(weight)
            if cut.dropped and branch is not None and add not in env and branch in env:
                env[add] = env[branch]
            copied = graph.node_copy(node, lambda n: env[n])
            if node is add and cut.fork in node.args[:1]:  # x += F(x) must not write to the stream
                copied.target = torch.add
            env[node] = copied
        value = env[cut.out] if cut.kind == "block" or cut.candidate.post else env[branch if branch is not None else cut.out]
        graph.output((value, tuple(env[s] for s in cut.sides)))
        compiled = _Compiled(graph)
        paths = [str(n.target) for n in cut.nodes if n.op == "call_module"]

        def modules(host: nn.Module) -> Iterable[nn.Module]:
            return [host.get_submodule(p) for p in paths]

        return Unit(cut.slot.path, cut.slot.index, "residual" if cut.kind == "residual" else "block", compiled.run, modules)

    def _views(self, units: list[Candidate], slots: list[Slot]) -> dict[fx.Node, Chain]:
        numbers = {n: s.chain for c, s in zip(units, slots, strict=True) for n in (*c.views, *c.lead)}
        return {node: numbers[event] for node, event in self.host.event_of.items() if event in numbers and node.op == "call_function"}

    # -- putting together ------------------------------------------------------------------------------------------

    def _outer(self, nodes: list[fx.Node]) -> fx.Graph:
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        host = graph.placeholder("host")
        taken = {n for cut in self.cuts for n in (*cut.nodes, *cut.dropped)}
        at_end = {max((*cut.nodes, *cut.dropped), key=self.order.__getitem__): cut for cut in self.cuts}
        waiting: list[fx.Node | _Cut] = []
        for node in nodes:
            waiting += [at_end[node]] if node in at_end else [] if node in taken else [node]
            progress = True
            while progress:
                ready = [w for w in waiting if all(i in env for i in _inputs(w))]
                for item in ready:
                    self._emit(graph, env, host, item)
                waiting = [w for w in waiting if w not in ready]
                progress = bool(ready)
        if waiting:
            raise CaptureError("interleaves its residual units so that they cannot be separated")
        return graph

    def _emit(self, graph: fx.Graph, env: dict[fx.Node, fx.Node], host: fx.Node, item: fx.Node | _Cut) -> None:
        if isinstance(item, _Cut):
            assert item.unit is not None
            call = _UnitCall(item.slot.chain, item.unit)
            both = graph.call_function(call, (host, env[item.fork], tuple(env[e] for e in item.extras)))
            env[item.out] = graph.call_function(operator.getitem, (both, 0))
            if item.dropped and not item.candidate.post:
                env[item.dropped[0]] = env[item.out]
            if item.sides:
                sides = graph.call_function(operator.getitem, (both, 1))
                for i, side in enumerate(item.sides):
                    env[side] = graph.call_function(operator.getitem, (sides, i))
        elif item in self.views:
            args, kwargs = fx.map_arg((item.args, item.kwargs), lambda n: env[n])
            env[item] = graph.call_function(_ViewCall(self.views[item], _function(item.target)), args, kwargs)
        else:
            env[item] = graph.node_copy(item, lambda n: env[n])


def _function(target: Any) -> Callable[..., Tensor]:
    return target  # type: ignore[no-any-return]


def _inputs(item: fx.Node | _Cut) -> list[fx.Node]:
    return [item.fork, *item.extras] if isinstance(item, _Cut) else item.all_input_nodes


def _between(fork: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on a path from ``fork`` (excluded) to ``end`` (included)."""
    above, todo = {end}, [end]
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in above and node is not fork:
                above.add(node)
                todo.append(node)
    below: set[fx.Node] = set()
    for node in fork.graph.nodes:
        if node in above and any(i is fork or i in below for i in node.all_input_nodes):
            below.add(node)
    return below


class RewiredForward:
    """The forward of a rewired host: an attribute of the instance, so that its class stays as it is.

    Args:
        host: the module.
        path: its qualified name in the model, for errors.
        slots: the units it holds.
        original: an instance attribute ``forward`` that was there before, or None.
    """

    def __init__(self, host: nn.Module, path: str, slots: list[Slot], original: Any = None) -> None:
        self.host = host
        self.path = path
        self.slots = slots
        self.original = original
        self.programs: dict[Any, Program] = {}
        self.by_shape: set[Any] = set()
        self.guarded: dict[int, nn.Module] = {id(host): host}

    def __getstate__(self) -> dict[str, Any]:
        """Programs are compiled code for this host: a copy captures its own."""
        return {**self.__dict__, "programs": {}, "by_shape": set(), "guarded": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.guarded = {id(self.host): self.host}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            return self.plain(*args, **kwargs)
        leaves = input_leaves((args, kwargs))
        key = self.signature(args, kwargs, leaves)
        if key in self.by_shape:
            key = (key, _shapes(leaves))
        program = self.programs.get(key)
        if program is None:
            program = self.capture(args, kwargs)
            self.keep(program, args, kwargs, leaves)
        return program(self.host, leaves)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The forward as it was before conversion."""
        forward = self.original if self.original is not None else type(self.host).forward.__get__(self.host)
        return forward(*args, **kwargs)

    def capture(self, args: Any, kwargs: Any) -> Program:
        """Observe the original forward on detached arguments, and build the program of this signature.

        Raises:
            CaptureError: it cannot be captured, or does not have the units it had at conversion.
        """
        args, kwargs = _detached((args, kwargs))
        try:
            recording = record(self.host, args, kwargs, forward=self.plain)
            units, inline = find_units(recording, [(s.key, s.posts) for s in self.slots])
            return Program(build_graph(recording, inline), units, self.slots)
        except RevwireError as error:
            raise CaptureError(
                f"{self.path or type(self.host).__name__}: called as it was not at conversion, and {error}; call it as in the "
                f"example, give convert() an example of this call, or exclude it: convert(..., exclude=[{self.path + '*'!r}])"
            ) from error

    def keep(self, program: Program, args: Any, kwargs: Any, leaves: list[Any]) -> None:
        """Store a program under its signature."""
        new = {id(m): m for m in program.guarded if id(m) not in self.guarded}
        if new:  # from now on signatures hold these modules' attributes too, so no older one can be met again
            self.guarded.update(new)
            self.programs.clear()
            self.by_shape.clear()
        if len(self.programs) >= _MAX_PROGRAMS:
            self.programs.pop(next(iter(self.programs)))
        key = self.signature(args, kwargs, leaves)
        if program.shape_dependent:
            self.by_shape.add(key)
            key = (key, _shapes(leaves))
        self.programs[key] = program

    def signature(self, args: Any, kwargs: Any, leaves: list[Any]) -> Any:
        """What Python may have decided on; see Note [Programs and signatures]."""
        first = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
        kinds = tuple(_kind(leaf) for leaf in leaves)
        flags = tuple(m.training for m in self.host.modules())
        attributes = tuple(_plain_attributes(m) for m in self.guarded.values())
        modes = (torch.is_grad_enabled(), *((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in _types(leaves)))
        return (_skeleton((args, kwargs)), kinds, tuple(first[id(leaf)] for leaf in leaves), flags, attributes, modes)


def _types(leaves: list[Any]) -> list[str]:
    return sorted({"cpu", *(leaf.device.type for leaf in leaves if isinstance(leaf, Tensor))})


def _kind(leaf: Any) -> Any:
    return (leaf.dtype, leaf.device, leaf.dim(), leaf.requires_grad) if isinstance(leaf, Tensor) else type(leaf)


def _shapes(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _skeleton(structure: Any) -> Any:
    """The arguments of a call with tensors and objects blanked: hashable."""
    if isinstance(structure, (list, tuple)):
        return type(structure).__name__, tuple(_skeleton(s) for s in structure)
    if isinstance(structure, dict):
        return tuple((k, _skeleton(v)) for k, v in structure.items())
    if isinstance(structure, slice):
        return "slice", structure.start, structure.stop, structure.step
    if isinstance(structure, (bool, int, float, complex, str, bytes)):
        return type(structure), structure
    return structure if isinstance(structure, (torch.dtype, torch.device, torch.layout, torch.memory_format)) else structure is None


def _plain_attributes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None))))


def _detached(structure: Any) -> Any:
    """Arguments for a capture: the same tensors cut from their graphs, and copies of objects that a call may write to."""
    if isinstance(structure, Tensor):
        return structure.detach().requires_grad_(structure.requires_grad)
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_detached(s) for s in structure))
    if isinstance(structure, (list, tuple)):
        return type(structure)(_detached(s) for s in structure)
    if isinstance(structure, dict):
        return {k: _detached(v) for k, v in structure.items()}
    return structure if isinstance(structure, (slice, *CONSTANTS)) else snapshot(structure)


def install(host: nn.Module, path: str, slots: list[Slot]) -> RewiredForward:
    """Put the rewired forward on a host."""
    rewired = RewiredForward(host, path, slots, vars(host).get(_FORWARD))
    vars(host)[_FORWARD] = rewired
    vars(host)[_REPLICATE] = _Replicate(host)
    return rewired


def uninstall(host: nn.Module) -> None:
    """Take it off again: the host's own forward, or the instance attribute that was there, serves."""
    rewired = vars(host).pop(_FORWARD)
    vars(host).pop(_REPLICATE, None)
    if rewired.original is not None:
        vars(host)[_FORWARD] = rewired.original


def rewired_of(module: nn.Module) -> RewiredForward | None:
    """The rewired forward of a module, if it has one."""
    forward = vars(module).get(_FORWARD)
    return forward if isinstance(forward, RewiredForward) else None


class _Replicate:
    """`nn.DataParallel` copies a module's attributes; the copy's forward must run on the copy's weights."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host

    def __call__(self) -> nn.Module:
        replica = type(self.host)._replicate_for_data_parallel(self.host)
        rewired = rewired_of(self.host)
        if rewired is not None:
            vars(replica)[_FORWARD] = RewiredForward(replica, rewired.path, rewired.slots, None)
            vars(replica).pop(_REPLICATE, None)
        return replica
