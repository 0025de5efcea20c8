"""Recording -> `torch.fx.Graph` of its root module: leaf modules, functions, and the root's own weights.

Module calls in ``inline`` are opened, all others are leaves. Values of the recording are kept beside the nodes, so that
the units found in the recording can be found in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from revwire._errors import CaptureError
from revwire._trace import CONSTANTS, Event, Opaque, Recording, Ref, refs


@dataclass
class HostGraph:
    """The graph of one host, and where the values and events of its recording are in it."""

    graph: fx.Graph
    recording: Recording
    inputs: list[fx.Node]
    node_of: dict[int, fx.Node] = field(default_factory=dict)
    event_of: dict[fx.Node, int] = field(default_factory=dict)
    opened: list[nn.Module] = field(default_factory=list)
    elided: list[nn.Module] = field(default_factory=list)
    shape_dependent: bool = False


def leaves(structure: Any) -> Iterable[Any]:
    """What must be passed to a graph from the arguments of a call: tensors and opaque objects, in order."""
    if isinstance(structure, (Ref, Opaque)):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from leaves(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from leaves(item)


class _Builder:
    def __init__(self, recording: Recording, inline: set[int]) -> None:
        self.recording = recording
        self.inline = inline
        self.host = HostGraph(fx.Graph(), recording, [])
        self.opaque: dict[int, fx.Node] = {}
        self.weights: dict[str, fx.Node] = {}

    def build(self) -> HostGraph:
        top = self.recording.events[0]
        self.host.opened = [self.recording.root, *(self.recording.events[n].target for n in sorted(self.inline))]
        for number, leaf in enumerate(leaves((top.args, top.kwargs))):
            node = self.host.graph.placeholder(f"input_{number}")
            self.host.inputs.append(node)
            if isinstance(leaf, Ref):
                self.host.node_of.setdefault(leaf.value, node)
            else:
                self.opaque.setdefault(id(leaf.obj), node)
        at = 1
        while at < top.end:
            event = self.recording.events[at]
            if event.is_module and at in self.inline:
                at += 1
                continue
            self.emit(event)
            at = event.end if event.is_module else at + 1
        self.host.graph.output(self.output(top.out))
        self.check_reads()
        return self.host

    def emit(self, event: Event) -> None:
        if not event.is_module and not event.writes and not self.makes_something(event):
            return
        args, kwargs = self.argument(event.args), self.argument(event.kwargs or {})
        if event.is_module:
            node = self.host.graph.call_module(self.path_of(event.target), args, kwargs)
            if not self.makes_something(event):
                self.host.elided.append(event.target)
        elif getattr(event.target, "__name__", "") == "__get__":
            node = self.host.graph.call_function(getattr, (args[0], event.target.__self__.__name__))
        elif getattr(event.target, "__name__", "") == "__set__":
            raise CaptureError(f"assigns to {event.target.__self__.__name__!r} of a tensor")
        else:
            node = self.host.graph.call_function(event.target, args, kwargs)
        self.host.event_of[node] = event.number
        self.bind(event, node)

    def makes_something(self, event: Event) -> bool:
        """Whether a result of the event is a new value (else it handed its input back)."""
        last = event.end if event.is_module else event.number + 1
        return any(event.number <= self.recording.values[r.value].event < last for r in refs(event.out))

    def bind(self, event: Event, node: fx.Node) -> None:
        for before, after in event.writes:
            self.host.node_of[after] = self.node_for(before)
        if event.is_module:  # what calls inside of it wrote in place is the same tensor still
            for inner in self.recording.events[event.number + 1 : event.end]:
                for before, after in inner.writes:
                    if before in self.host.node_of:
                        self.host.node_of[after] = self.host.node_of[before]
        self.bind_results(event, event.out, node)

    def bind_results(self, event: Event, out: Any, node: fx.Node) -> None:
        if isinstance(out, Ref):
            written = any(out.value == after for _, after in event.writes)
            producer = self.recording.values[out.value].event
            inside = event.is_module and event.number < producer < event.end
            if written or producer == event.number or inside or out.value not in self.host.node_of:
                self.host.node_of[out.value] = node
        elif isinstance(out, (list, tuple, dict)):
            for key, item in out.items() if isinstance(out, dict) else enumerate(out):
                if next(refs(item), None) is not None:
                    self.bind_results(event, item, self.host.graph.call_function(operator.getitem, (node, key)))

    # -- arguments -------------------------------------------------------------------------------------------------

    def argument(self, structure: Any) -> Any:
        if isinstance(structure, Ref):
            return self.node_for(structure.value)
        if isinstance(structure, Opaque):
            if id(structure.obj) not in self.opaque:
                raise CaptureError(f"passes on a {type(structure.obj).__name__} that is not one of its arguments")
            return self.opaque[id(structure.obj)]
        if isinstance(structure, tuple) and hasattr(structure, "_fields"):
            return type(structure)(*(self.argument(s) for s in structure))
        if isinstance(structure, (list, tuple)):
            return type(structure)(self.argument(s) for s in structure)
        if isinstance(structure, dict):
            return {k: self.argument(v) for k, v in structure.items()}
        if isinstance(structure, slice):
            return slice(*(self.argument(s) for s in (structure.start, structure.stop, structure.step)))
        return structure

    def output(self, structure: Any) -> Any:
        if any(isinstance(leaf, Opaque) and id(leaf.obj) not in self.opaque for leaf in leaves(structure)):
            kinds = {type(leaf.obj).__name__ for leaf in leaves(structure) if isinstance(leaf, Opaque)}
            raise CaptureError(f"returns an object of its own: {', '.join(sorted(kinds))}")
        return self.argument(structure)

    def node_for(self, value: int) -> fx.Node:
        if value not in self.host.node_of:
            self.host.node_of[value] = self.weight(value)
        return self.host.node_of[value]

    def weight(self, value: int) -> fx.Node:
        path = self.weight_path(value)
        if path not in self.weights:
            with self.host.graph.inserting_after(self.host.inputs[-1] if self.host.inputs else None):
                self.weights[path] = self.host.graph.create_node("get_attr", path)
        return self.weights[path]

    def weight_path(self, value: int) -> str:
        found = self.recording.values[value]
        if found.names:
            return found.names[0]
        for module in self.host.opened:
            for name, attribute in vars(module).items():
                if attribute is found.existing and attribute is not None:
                    return ".".join(p for p in (self.path_of(module), name) if p)
        origin = "was made by a call that cannot be seen" if found.event < 0 else "is internal to another module"
        raise CaptureError(f"uses a tensor of shape {tuple(found.shape)} that is neither its argument nor its own ({origin})")

    def path_of(self, module: nn.Module) -> str:
        names = self.recording.module_names.get(id(module), ())
        if not names:
            raise CaptureError(f"calls a {type(module).__name__} that is not registered below it")
        return names[0]

    def check_reads(self) -> None:
        visible = {0, *self.inline}
        for read in self.recording.reads:
            if read.parent in visible:
                if read.kind == "data":
                    raise CaptureError(f"decides on the values of a tensor in Python ({read.name})")
                self.host.shape_dependent = True


def build_graph(recording: Recording, inline: set[int]) -> HostGraph:
    """The graph of the root of a recording, in which the module calls ``inline`` are opened.

    Raises:
        CaptureError: the root does what a graph cannot repeat; the message is a short reason.
    """
    return _Builder(recording, inline).build()


def input_leaves(structure: Any) -> list[Any]:
    """The run-time counterpart of `leaves`: tensors and objects that are no plain constants."""
    out: list[Any] = []
    _collect(structure, out)
    return out


def _collect(structure: Any, out: list[Any]) -> None:
    if isinstance(structure, torch.Tensor):
        out.append(structure)
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            _collect(item, out)
    elif isinstance(structure, dict):
        for item in structure.values():
            _collect(item, out)
    elif not isinstance(structure, (slice, *CONSTANTS)):
        out.append(structure)
