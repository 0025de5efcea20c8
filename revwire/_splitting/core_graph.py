"""The graph of a module as calls and the values that they give: what the search for a core asks about it."""

from __future__ import annotations

import operator
from collections.abc import Container
from typing import Any

import torch
from torch import fx

from revwire._capture.recording import Event, Value
from revwire._programs.host_graph import HostGraph
from revwire._search.dataflow import Flow, flow_of
from revwire._structures import refs


def multiplies_activations(flow: Flow, event: Event) -> bool:
    """Whether a call multiplies two tensors that both come from the input (each query with each key, say)."""
    active = {r.value for r in refs((event.args, event.kwargs)) if flow.active[r.value]}
    return not event.is_module and event.is_product and len(active) > 1


class CallGraph:
    """Calls, values, and what each comes from.

    Attributes:
        host: the graph, and what was recorded of it.
        flow: what comes from the input.
        nodes: in the order of the graph.
        order: the place of each.
        value_of: what was recorded of the tensor that a node stands for.
        maker: of each of several results of a call, the call.
        above: the places of all that a node comes from, as bits.
    """

    def __init__(self, host: HostGraph) -> None:
        self.host = host
        self.flow = flow_of(host.recording)
        self.nodes = list(host.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.value_of: dict[fx.Node, Value] = {n: host.recording.values[v] for v, n in host.node_of.items()}
        self.maker: dict[fx.Node, Any] = {n: n.args[0] for n in self.nodes if self.is_result(n)}
        self.above: dict[fx.Node, int] = {}
        for node in self.nodes:
            bits = 0
            for i in node.all_input_nodes:
                bits |= self.above[i] | 1 << self.order[i]
            self.above[node] = bits
        self._belongs: dict[fx.Node, bool] = {}

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

    def index(self, node: fx.Node) -> int | None:
        """Which of several results of its call it is."""
        return node.args[1] if node in self.maker else None  # type: ignore[return-value]

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that the call behind a value needs."""
        return self.call(node).all_input_nodes

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that need a value; instead of calls with several results, those results."""
        found: list[fx.Node] = []
        for user in node.users:
            results = [r for r in user.users if self.maker.get(r) is user]
            found += results if results and len(results) == len(user.users) else [user]
        return found

    def event(self, node: fx.Node) -> Event:
        """What was recorded of the call behind a value."""
        return self.host.recording.events[self.host.event_of[self.call(node)]]

    def is_view(self, node: fx.Node) -> bool:
        """Whether a value lies in the memory of an input of its call."""
        return any(self.value_of[i].storage == self.value_of[node].storage for i in self.inputs(node))

    def bytes_of(self, node: fx.Node) -> int:
        """The size of a value."""
        value = self.value_of[node]
        return torch.Size(value.shape).numel() * value.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """The device of the module's weights, or the CPU."""
        root = self.host.recording.root
        return next((t.device for t in (*root.parameters(), *root.buffers())), torch.device("cpu"))

    def may_belong(self, node: fx.Node) -> bool:
        """Whether a call may be computed again in parts: it is one of torch's."""
        if node not in self._belongs:
            self._belongs[node] = self._may_belong(node)
        return self._belongs[node]

    def _may_belong(self, node: fx.Node) -> bool:
        call = self.call(node)
        if (
            call not in self.host.event_of
            or node not in self.value_of
            or any(i not in self.value_of for i in self.inputs(node))
        ):
            return False
        event = self.event(node)
        return not (event.is_module or event.opaque or (call in self.host.writes and not event.is_pointwise))

    def multiplies_by_weights(self, node: fx.Node) -> bool:
        """Whether a call is a product, and not one of activations."""
        event = self.event(node)
        return event.is_product and not multiplies_activations(self.flow, event)

    def enters_lightly(self, node: fx.Node, calls: Container[fx.Node]) -> bool:
        """Whether these calls need a value, or views of it, for element-wise calls only."""
        return all(
            self.event(u).is_pointwise or (self.is_view(u) and self.enters_lightly(u, calls))
            for u in self.users(node)
            if u in calls
        )

    def is_active(self, node: fx.Node) -> bool:
        """Whether a value comes from the module's input."""
        return self.flow.active[self.value_of[node].number]
