"""Graph of a host + units -> a program that runs the host on two streams."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from revwire._capture.lines import shown
from revwire._capture.recording import Event, Recording
from revwire._errors import CaptureError
from revwire._programs.calls import Slot, UnitCall, ViewCall, writable
from revwire._programs.compiled import WHOLE_FORWARD, Compiled, below
from revwire._programs.host_graph import HostGraph
from revwire._programs.writes import Excerpt, check_order_of_writes, check_own_memory
from revwire._runtime.chain import Chain
from revwire._runtime.unit import Unit
from revwire._search.places import INSIDE_A_MODULE
from revwire._search.residuals import Candidate
from revwire._streams.base import canonical, is_dense


def pattern_of(c: Candidate, events: list[Event]) -> str:
    """The name of a unit's shape; see `PlannedUnit.pattern`."""
    if c.branch is not None and not c.post:
        return "residual"
    if c.branch is not None and all(events[e].is_pointwise for e in c.post):
        return "post-activation"
    return "block"


@dataclass(frozen=True)
class Program:
    """A host's forward for one signature. It refers to no recording: that would keep the example's tensors alive.

    Attributes:
        compiled: the host's graph on two streams.
        shape_dependent: whether it holds for the shapes of its capture only.
        guarded: the modules whose attributes its code depends on.
    """

    compiled: Compiled
    shape_dependent: bool
    guarded: tuple[nn.Module, ...]

    @classmethod
    def of(cls, host: HostGraph, units: list[Candidate], slots: list[Slot]) -> Program:
        """Take the units out of a host's graph and put it together again.

        Raises:
            CaptureError: the units cannot be separated from the rest; the message is a short reason.
        """
        compiled = _Assembly(host, units, slots).compiled
        return cls(compiled, host.shape_dependent, (*host.opened, *host.elided.values()))

    def __call__(self, host: nn.Module, leaves: list[Any]) -> Any:
        return self.compiled.run(host, host, *leaves)


class _Assembly:
    """The work of `Program.of`."""

    def __init__(self, host: HostGraph, units: list[Candidate], slots: list[Slot]) -> None:
        self.host = host
        nodes = list(host.graph.nodes)
        self.order = {node: i for i, node in enumerate(nodes)}
        self.executed: list[fx.Node] = []
        self.excerpts = [self._excerpt(c, s, nodes) for c, s in zip(units, slots, strict=True)]
        self.views = self._views(units, slots)
        outer = self._outer(nodes)
        if outer is None:
            self._let_go_of_what_others_need()
            outer = self._outer(nodes)
        if outer is None:
            raise CaptureError("interleaves its residual units so that they cannot be separated")
        self.compiled = Compiled(outer)
        check_order_of_writes(self.host, self.order, self.executed, self.excerpts)

    # -- taking units out ------------------------------------------------------------------------------------------

    def _excerpt(self, c: Candidate, slot: Slot, nodes: list[fx.Node]) -> Excerpt:
        events, node_of = self.host.recording.events, self.host.node_of
        if any(value not in node_of for value in (c.fork, c.out, c.result)):
            raise CaptureError(INSIDE_A_MODULE.format(events[c.add].at))
        _refuse_another_layout(self.host.recording, c)
        fork, out, add = node_of[c.fork], node_of[c.out], node_of[c.result]
        branch = node_of.get(c.branch) if c.branch is not None else None
        pattern = pattern_of(c, events)
        residual = branch is not None and (
            pattern == "residual" or (pattern == "post-activation" and slot.chain.couplings[slot.index].drops_skip)
        )
        inside = _between(fork, out)
        if residual and branch is not None:
            inside = _between(fork, branch) | (inside - {add} if c.post else set())
        inside |= self._left_over(inside, nodes if c.whole else [])
        ordered = [n for n in nodes if n in inside]
        excerpt = Excerpt(
            slot, c, "residual" if residual else "block", fork, out, add, branch, ordered, [add] if residual else []
        )
        self._close(excerpt)
        return excerpt

    def _left_over(self, inside: set[fx.Node], nodes: list[fx.Node]) -> set[fx.Node]:
        """What comes from the nodes inside of a unit and serves nothing outside: modules that hand their input back,
        and, of a whole module, the parts of its results.
        """
        elided = {n for n in self.host.elided if not inside.isdisjoint(n.all_input_nodes)}
        inside = inside | elided
        for n in nodes:
            if n.target in (operator.getitem, getattr) and n.args[0] in inside:
                inside.add(n)
        return inside

    def _close(self, excerpt: Excerpt) -> None:
        """What the nodes of an excerpt need from outside of it, and what they give."""
        taken = set(excerpt.all_nodes)
        excerpt.extras = list(
            dict.fromkeys(
                i
                for n in excerpt.nodes
                for i in n.all_input_nodes
                if i not in taken and i is not excerpt.fork and i.op != "get_attr"
            )
        )
        excerpt.sides = [n for n in excerpt.nodes if n is not excerpt.out and any(u not in taken for u in n.users)]
        check_own_memory(self.host, self.order, excerpt)
        excerpt.unit = self._unit(excerpt)

    def _let_go_of_what_others_need(self) -> None:
        """Where parallel units need each other's inner values: the parts that make those run outside of the units, as
        they did.

        Their activations are then stored; the units keep the rest of their branches, and their places in their chains.
        """
        for excerpt in self.excerpts:
            others = {n for c in self.excerpts if c is not excerpt for n in c.all_nodes}
            mine = set(excerpt.nodes)
            shared = [s for s in excerpt.sides if s is not excerpt.branch and others & _below(s, mine)]
            freed = mine & {a for s in shared for a in (s, *_above(s))}
            if freed and excerpt.branch not in freed and excerpt.out not in freed:
                excerpt.nodes = [n for n in excerpt.nodes if n not in freed]
                self._close(excerpt)

    def _unit(self, excerpt: Excerpt) -> Unit:
        graph, env = fx.Graph(), {}
        env[excerpt.fork] = graph.placeholder("x")
        for i, extra in enumerate(excerpt.extras):
            env[extra] = graph.placeholder(f"extra_{i}")
        for node in excerpt.nodes:
            for weight in (i for i in node.all_input_nodes if i.op == "get_attr" and i not in env):
                env[weight] = graph.node_copy(weight)
            if excerpt.dropped and excerpt.branch in env and excerpt.branch is not None and excerpt.add not in env:
                env[excerpt.add] = self._instead_of_sum(graph, excerpt, env[excerpt.branch])
            env[node] = graph.node_copy(node, lambda n: env[n])
        value = (
            env[excerpt.out]
            if excerpt.kind == "block" or excerpt.candidate.post
            else env[excerpt.branch or excerpt.out]
        )
        graph.output((value, tuple(env[s] for s in excerpt.sides)))
        compiled = Compiled(graph)
        paths = _owners([n for n in graph.nodes if n.op in ("call_module", "get_attr")])

        names = [path.split(".") if path else [] for path in paths]

        def modules(host: nn.Module) -> Iterable[nn.Module]:
            return [below(host, steps) for steps in names]

        kind: Literal["residual", "block"] = "residual" if excerpt.kind == "residual" else "block"
        return Unit(
            excerpt.slot.path,
            excerpt.slot.index,
            kind,
            compiled.run,
            modules,
            excerpt.slot.later,
            line=shown(self.host.recording.events[excerpt.candidate.add].line),
        )

    def _instead_of_sum(self, graph: fx.Graph, excerpt: Excerpt, branch: fx.Node) -> fx.Node:
        """What an activation is applied to where the skip is dropped: the branch's value, or, to write in place, what
        it may write to.
        """
        storage = self.host.storage_of.get(excerpt.add)
        written = any(storage in self.host.writes.get(n, ()) for n in excerpt.nodes)
        return graph.call_function(writable, (branch,)) if written else branch

    def _views(self, units: list[Candidate], slots: list[Slot]) -> dict[fx.Node, Chain]:
        """The calls that are views of a stream: between two units of this host, and on the way to a unit of a host
        inside it.
        """
        numbers = {n: s.chain for c, s in zip(units, slots, strict=True) for n in (*c.views, *c.lead)}
        calls = {node: event for node, event in self.host.event_of.items() if node.op == "call_function"}
        views = {node: numbers[event] for node, event in calls.items() if event in numbers}
        for excerpt in self.excerpts:
            node = excerpt.out
            while len(node.users) == 1:
                node = next(iter(node.users))
                if node not in calls or not self.host.recording.events[calls[node]].view:
                    break
                views.setdefault(node, excerpt.slot.chain)
        return views

    # -- putting together ------------------------------------------------------------------------------------------

    def _outer(self, nodes: list[fx.Node]) -> fx.Graph | None:
        """The host's graph with a call for each unit; None if there is no order in which the calls can run."""
        self.executed = []
        graph = fx.Graph()
        env: dict[fx.Node, fx.Node] = {}
        host = graph.placeholder("host")
        taken = {n for excerpt in self.excerpts for n in excerpt.all_nodes}
        at_end = {max(excerpt.all_nodes, key=self.order.__getitem__): excerpt for excerpt in self.excerpts}
        waiting: list[fx.Node | Excerpt] = []
        for node in nodes:
            waiting += [at_end[node]] if node in at_end else [] if node in taken else [node]
            progress = True
            while progress:
                ready = [w for w in waiting if all(i in env for i in _inputs(w))]
                for item in ready:
                    self._emit(graph, env, host, item)
                waiting = [w for w in waiting if w not in ready]
                progress = bool(ready)
        return None if waiting else graph

    def _emit(self, graph: fx.Graph, env: dict[fx.Node, fx.Node], host: fx.Node, item: fx.Node | Excerpt) -> None:
        if isinstance(item, Excerpt):
            self.executed += sorted(item.all_nodes, key=self.order.__getitem__)
            self._emit_unit(graph, env, host, item)
            return
        self.executed.append(item)
        if item in self.views:
            args, kwargs = fx.map_arg((item.args, item.kwargs), lambda n: env[n])
            env[item] = graph.call_function(ViewCall(self.views[item], _function(item.target)), args, kwargs)
        else:
            env[item] = graph.node_copy(item, lambda n: env[n])

    def _emit_unit(self, graph: fx.Graph, env: dict[fx.Node, fx.Node], host: fx.Node, excerpt: Excerpt) -> None:
        assert excerpt.unit is not None
        call = UnitCall(excerpt.slot.chain, excerpt.unit)
        both = graph.call_function(call, (host, env[excerpt.fork], tuple(env[e] for e in excerpt.extras)))
        env[excerpt.out] = graph.call_function(operator.getitem, (both, 0))
        if excerpt.dropped and not excerpt.candidate.post:
            env[excerpt.dropped[0]] = env[excerpt.out]
        if excerpt.sides:
            sides = graph.call_function(operator.getitem, (both, 1))
            for i, side in enumerate(excerpt.sides):
                env[side] = graph.call_function(operator.getitem, (sides, i))


def _refuse_another_layout(recording: Recording, c: Candidate) -> None:
    """The next state lies in memory as the stream does, or contiguous, where that has gaps; a sum may lie otherwise."""
    stream, result = recording.values[c.fork], recording.values[c.result]
    if stream.shape != result.shape or not (stream.strides and result.strides):
        return
    found, wanted = (torch.empty_strided(v.shape, v.strides, device="meta") for v in (result, stream))
    wanted = canonical(wanted)
    if is_dense(found) and any(found.stride(d) != wanted.stride(d) for d, size in enumerate(found.shape) if size > 1):
        line = recording.events[c.add].at
        raise CaptureError(f"gives a sum that lies in memory in another order than its stream{line}")


def _owners(nodes: list[fx.Node]) -> list[str]:
    """Paths of the modules whose weights these nodes use."""
    paths = [_owner(n) for n in nodes]
    return list(dict.fromkeys(paths))


def _owner(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return "" if node.target == WHOLE_FORWARD else str(node.target).rpartition(".")[0]


def _function(target: Any) -> Callable[..., Tensor]:
    return target  # type: ignore[no-any-return]


def _inputs(item: fx.Node | Excerpt) -> list[fx.Node]:
    return [item.fork, *item.extras] if isinstance(item, Excerpt) else item.all_input_nodes


def _above(node: fx.Node) -> set[fx.Node]:
    """All that a node depends on."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        new = [i for i in todo.pop().all_input_nodes if i not in found]
        found.update(new)
        todo += new
    return found


def _below(node: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
    """All that depends on a node by a way that does not lead through ``stop``."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        new = [u for u in todo.pop().users if u not in found and u not in stop]
        found.update(new)
        todo += new
    return found


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
