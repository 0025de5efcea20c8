"""The graph of a host, beside the recording that it was made from, and what the host owns of what it uses."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from revwire._capture.recording import Recording
from revwire._errors import CaptureError


@dataclass
class HostGraph:
    """The graph of one host, and where the values and events of its recording are in it.

    ``storage_of``: the memory of a node's tensor. ``writes``: the memories that a node writes to. ``opened``: the
    modules whose code is in the graph; ``elided``: those that handed their input back, whose nodes have no users.
    ``shape_dependent``: Python looked
    at shapes or strides.
    """

    graph: fx.Graph
    recording: Recording
    inputs: list[fx.Node]
    node_of: dict[int, fx.Node] = field(default_factory=dict)
    event_of: dict[fx.Node, int] = field(default_factory=dict)
    storage_of: dict[fx.Node, int] = field(default_factory=dict)
    writes: dict[fx.Node, set[int]] = field(default_factory=dict)
    opened: list[nn.Module] = field(default_factory=list)
    elided: dict[fx.Node, nn.Module] = field(default_factory=dict)
    shape_dependent: bool = False

    def hold(self, value: int, node: fx.Node) -> None:
        """Let a node stand for a value of the recording."""
        self.node_of[value] = node
        self.storage_of[node] = self.recording.values[value].storage


class Owned:
    """The nodes of what is neither argument nor computed: weights, buffers, and objects that hang in the host.

    Args:
        host: the graph that they are put into.
    """

    def __init__(self, host: HostGraph) -> None:
        self.host = host
        self.nodes: dict[str, fx.Node] = {}

    def node_for(self, value: int) -> fx.Node:
        """The node of a value; one that was there before the run hangs in the host."""
        if value not in self.host.node_of:
            self.host.hold(value, self.held_item(value) or self.attribute(self.weight_path(value)))
        return self.host.node_of[value]

    def held_item(self, value: int) -> fx.Node | None:
        """A tensor that an opened module holds in a dict by name."""
        found = self.host.recording.values[value]
        for module in self.host.opened if found.existing is not None and not found.names else ():
            for name, table in vars(module).items():
                for key in (
                    [k for k, t in table.items() if t is found.existing and type(k) is str]
                    if type(table) is dict
                    else ()
                ):
                    path = ".".join(p for p in (self.path_of(module), name) if p)
                    return self.host.graph.call_function(operator.getitem, (self.attribute(path), key))
        return None

    def attribute(self, path: str) -> fx.Node:
        """The node of what stands under a path in the host."""
        if path not in self.nodes:
            with self.host.graph.inserting_after(self.host.inputs[-1] if self.host.inputs else None):
                self.nodes[path] = self.host.graph.create_node("get_attr", path)
        return self.nodes[path]

    def weight_path(self, value: int) -> str:
        """Where a tensor that was there before the run hangs."""
        found = self.host.recording.values[value]
        path = found.names[0] if found.names else self.attribute_path(found.existing)
        if path is None:
            origin = "was made by a call that cannot be seen" if found.event < 0 else "is internal to another module"
            raise CaptureError(
                f"uses a tensor of shape {tuple(found.shape)} that is neither its argument nor its own ({origin})"
            )
        return path

    def attribute_path(self, obj: Any) -> str | None:
        """Where an object hangs as an attribute of an opened module."""
        for module in self.host.opened:
            for name, attribute in vars(module).items():
                if attribute is obj and obj is not None:
                    return ".".join(p for p in (self.path_of(module), name) if p)
        return None

    def path_of(self, module: nn.Module) -> str:
        """The path of a submodule."""
        names = self.host.recording.module_names.get(id(module), ())
        if not names:
            raise CaptureError(f"calls a {type(module).__name__} that is not registered below it")
        return names[0]

    def object_path(self, obj: Any) -> str | None:
        """Where an object hangs in the host: a submodule, or an attribute of an opened module."""
        names = self.host.recording.module_names.get(id(obj), ())
        return names[0] if names else self.attribute_path(obj)
