"""The program of a module whose core runs in parts: its graph, in its order, with one call for the core."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from revwire._capture.recording import Recording
from revwire._programs.compiled import Compiled
from revwire._splitting.core_function import Border, InParts, Parting
from revwire._splitting.core_relations import Known, Relation, with_size
from revwire._splitting.core_search import Core, CoreSearch, searched, which


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
    search = searched(recording, known)
    cores = search.found()
    core = cores[which(tuple(core.size for core in cores), parting.count)]
    shapes = tuple(torch.Size(search.graph.value_of[i].shape) for i, _ in core.inputs)
    border = Border(shapes, tuple(d for _, d in core.inputs), core.size, tuple(core.dims[n] for n in core.outs))
    call = InParts(Compiled(_inner(search, core)).run, border, parting, path)
    host = search.graph.host
    return CoreProgram(Compiled(_outer(search, core, call)), (*host.opened, *host.elided.values()))


def _inner(search: CoreSearch, core: Core) -> fx.Graph:
    """The graph of the core: ``f(module, size, *inputs)``."""
    graph = fx.Graph()
    size = graph.placeholder("size")
    given = {both: graph.placeholder(f"input_{i}") for i, both in enumerate(core.inputs)}
    env: dict[fx.Node, fx.Node] = {}
    made: dict[tuple[fx.Node, Relation], fx.Node] = {}
    for node, dim in core.dims.items():
        call, relation = search.graph.call(node), search.relations.related(node, dim)
        if (call, relation) not in made:
            needs = {
                i: env[i] if i in env else given[i, d]
                for i, d in zip(search.graph.inputs(node), relation.dims, strict=True)
            }
            copied = graph.node_copy(call, needs.__getitem__)
            if relation.size is not None:
                copied.args, copied.kwargs = with_size(copied, relation.size, size)
            made[call, relation] = copied
        env[node] = made[call, relation]
        if node is not call:
            env[node] = graph.call_function(operator.getitem, (env[node], search.graph.index(node)))
    graph.output(tuple(env[n] for n in core.outs))
    return graph


def _outer(search: CoreSearch, core: Core, call: InParts) -> fx.Graph:
    """The module's graph, in its order, with one call for its core."""
    graph, last = fx.Graph(), search.moment(core)
    module = graph.placeholder("module")
    env: dict[fx.Node, fx.Node] = {}
    within = {m for m in search.graph.maker.values() if all(r in core.dims for r in m.users)}
    for node in search.graph.nodes:
        if node not in core.dims and node not in within:
            env[node] = graph.node_copy(node, lambda n: env[n])
        if search.graph.order[node] == last:
            both = graph.call_function(call, (module, *(env[i] for i, _ in core.inputs)))
            env.update({n: graph.call_function(operator.getitem, (both, i)) for i, n in enumerate(core.outs)})
    return graph
