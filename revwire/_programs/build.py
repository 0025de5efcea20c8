"""Recording -> `torch.fx.Graph` of its root module: leaf modules, functions, and the root's own weights.

Module calls in ``inline`` are opened, all others are leaves. Values of the recording are kept beside the nodes, so that
the units found in the recording can be found in the graph.

Note [What a graph cannot hold]
    Python in the opened code may look at values, draw its own random numbers, assign attributes, fill lists, look into
    objects. None of it is in the graph, so a host that does it is refused, with that reason. Shapes and strides it may
    look at: they become a part of the signature under which the graph is used.
"""

from __future__ import annotations

import operator
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx

from revwire._capture.recording import Event, Recording
from revwire._errors import CaptureError
from revwire._programs.compiled import WHOLE_FORWARD, ByKeyword, Spelled, after, called, in_modes, is_plain
from revwire._programs.host_graph import HostGraph, Owned
from revwire._search.units import CLOSED
from revwire._structures import Opaque, Ref, is_constant, is_mapping, is_named_tuple, is_sequence, leaves_of, refs


class _Builder:
    """The work of `build_graph`."""

    def __init__(self, recording: Recording, inline: set[int]) -> None:
        self.recording = recording
        self.inline = inline
        self.host = HostGraph(fx.Graph(), recording, [])
        self.graph = self.host.graph
        self.opaque: dict[int, fx.Node] = {}
        self.owned = Owned(self.host)
        self.top = recording.events[0]

    def build(self) -> HostGraph:
        self.host.opened = [self.recording.root, *(self.recording.events[n].target for n in sorted(self.inline))]
        self.refuse_what_no_graph_holds()
        self.hold_inputs()
        at = 1
        while at < self.top.end:
            event, opened = self.recording.events[at], at in self.inline
            if not opened:
                self.emit(event)
            at = event.end if event.is_module and not opened else at + 1
        return self.finished()

    def build_closed(self) -> HostGraph:
        """One call of the whole forward."""
        self.host.opened = [self.recording.root]
        self.hold_inputs()
        forward = self.owned.attribute(WHOLE_FORWARD)
        args, kwargs = self.argument(self.top.args), self.argument(self.top.kwargs)
        node = self.call(Spelled(called, "whole"), (forward, *args), kwargs)
        self.bind_results(self.top, self.top.out, node)
        return self.finished()

    def finished(self) -> HostGraph:
        self.graph.output(self.output(self.top.out))
        self.drop_unused_edges()
        return self.host

    def hold_inputs(self) -> None:
        for number, leaf in enumerate(_input_leaves((self.top.args, self.top.kwargs))):
            node = self.graph.placeholder(f"input_{number}")
            self.host.inputs.append(node)
            if isinstance(leaf, Ref):
                if leaf.value not in self.host.node_of:
                    self.host.hold(leaf.value, node)
            else:
                self.opaque.setdefault(id(leaf.obj), node)

    def refuse_what_no_graph_holds(self) -> None:
        """See Note [What a graph cannot hold]."""
        visible = {0, *self.inline}
        hidden = self.recording.hidden(visible)
        if hidden is not None:
            raise CaptureError(hidden)
        self.host.shape_dependent = any(read.parent in visible for read in self.recording.reads)

    # -- calls -----------------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        if not event.is_module and not event.writes and not self.makes_something(event):
            return
        if not event.is_module and any(self.recording.values[r.value].custom for r in refs(event.out)):
            raise CaptureError(
                f"calls a custom autograd function by a name bound to its apply{event.at}; call Function.apply itself"
            )
        args, kwargs = self.argument(event.args), self.argument(event.kwargs or {})
        node = self.module_node(event, args, kwargs) if event.is_module else self.function_node(event, args, kwargs)
        if event.is_module and not self.makes_something(event):
            self.host.elided[node] = event.target
        self.host.event_of[node] = event.number
        self.bind(event, node)

    def module_node(self, event: Event, args: Any, kwargs: Any) -> fx.Node:
        path = self.owned.path_of(event.target)
        if event.modes == self.top.modes and all(map(is_plain, kwargs)):
            return self.graph.call_module(path, args, kwargs)
        module = self.owned.attribute(path)
        return self.call(self.moded(event, called, "call_module"), (module, *args), kwargs)

    def function_node(self, event: Event, args: Any, kwargs: Any) -> fx.Node:
        target, name = event.target, getattr(event.target, "__name__", "")
        if name == "__get__":
            target, args = getattr, (args[0], event.target.__self__.__name__)
        elif isinstance(target, (torch.jit.ScriptFunction, MethodType)) or not _is_found(
            target
        ):  # fx would look in a module of torch's
            target = Spelled(target, str(name or "scripted"))
        if event.modes != self.top.modes:
            target = self.moded(event, target, name or "call")
        return self.call(target, args, kwargs)

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A call of a function, whatever its keywords are; see Note [Names are data] in `compiled`."""
        if all(map(is_plain, kwargs)):
            return self.graph.call_function(target, args, kwargs)
        return self.graph.call_function(ByKeyword(target, tuple(kwargs)), (*args, *kwargs.values()))

    def moded(self, event: Event, call: Callable[..., Any], name: str) -> Spelled:
        if event.modes[1] != self.top.modes[1]:
            raise CaptureError(f"enters or leaves inference_mode{event.at}; use torch.no_grad()")
        return Spelled(in_modes(event.modes, self.top.modes, call), name)

    def makes_something(self, event: Event) -> bool:
        """Whether a result of the event is a new value, or a new object (else it handed its input back)."""
        last = event.end if event.is_module else event.number + 1
        if any(isinstance(leaf, Opaque) for leaf in leaves_of(event.out)):
            return True
        return any(event.number <= self.recording.values[r.value].event < last for r in refs(event.out))

    def bind(self, event: Event, node: fx.Node) -> None:
        inner = self.recording.events[event.number : event.end] if event.is_module else [event]
        for before, written in (pair for e in inner for pair in e.writes):
            if before in self.host.node_of or self.recording.values[before].names:
                self.host.writes.setdefault(node, set()).add(self.recording.values[before].storage)
            if before in self.host.node_of:
                self.host.hold(written, self.graph.call_function(after, (self.host.node_of[before], node)))
        self.bind_results(event, event.out, node)

    def bind_results(self, event: Event, out: Any, node: fx.Node) -> None:
        if isinstance(out, Ref):
            last = event.end if event.is_module else event.number + 1
            made = event.number <= self.recording.values[out.value].event < last
            if made or out.value not in self.host.node_of:
                self.host.hold(out.value, node)
        elif isinstance(out, Opaque):
            self.opaque.setdefault(id(out.obj), node)
            for name, item in (out.fields or {}).items():
                self.bind_item(event, item, getattr, name, node)
        elif is_sequence(out):
            for i, item in enumerate(out):
                self.bind_item(event, item, operator.getitem, i, node)
        elif is_mapping(out):
            for key, item in out.items():
                self.bind_item(event, item, operator.getitem, key, node)

    def bind_item(self, event: Event, item: Any, get: Callable[..., Any], key: Any, node: fx.Node) -> None:
        if any(isinstance(leaf, (Ref, Opaque)) for leaf in leaves_of(item)):
            self.bind_results(event, item, self.graph.call_function(get, (node, key)))

    def drop_unused_edges(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node.target is after and not node.users:
                self.graph.erase_node(node)
                self.host.node_of = {v: n for v, n in self.host.node_of.items() if n is not node}
                self.host.storage_of.pop(node)

    # -- arguments -------------------------------------------------------------------------------------------------

    def argument(self, structure: Any) -> Any:
        if isinstance(structure, Ref):
            return self.owned.node_for(structure.value)
        if isinstance(structure, Opaque):
            return self.object_node(structure)
        if is_named_tuple(structure):
            return self.graph.call_function(
                Spelled(type(structure), type(structure).__name__), tuple(map(self.argument, structure))
            )
        if type(structure) in (list, tuple, torch.Size):
            items = [self.argument(s) for s in structure]
            return (
                type(structure)(items)
                if not any(isinstance(i, fx.Node) for i in items) or type(structure) is not torch.Size
                else tuple(items)
            )
        if is_sequence(structure):  # the result type of a torch function
            return self.graph.call_function(
                Spelled(type(structure), type(structure).__name__), ([self.argument(s) for s in structure],)
            )
        if is_mapping(structure):
            table = {_key(k): self.argument(v) for k, v in structure.items()}
            return (
                table
                if type(structure) is dict
                else self.graph.call_function(Spelled(OrderedDict, "OrderedDict"), (table,))
            )
        if isinstance(structure, slice):
            return slice(*(self.argument(s) for s in (structure.start, structure.stop, structure.step)))
        return structure

    def object_node(self, opaque: Opaque) -> fx.Node:
        key = id(opaque.obj)
        if key not in self.opaque:
            path = self.owned.object_path(opaque.obj)
            if path is not None:
                self.opaque[key] = self.owned.attribute(path)
            elif opaque.fields is not None:
                make = Spelled(type(opaque.obj), type(opaque.obj).__name__)
                return self.call(make, (), self.argument(opaque.fields))
            else:
                raise CaptureError(f"passes on a {type(opaque.obj).__name__} that is not one of its arguments")
        return self.opaque[key]

    def output(self, structure: Any) -> Any:
        lost = [leaf for leaf in leaves_of(structure) if isinstance(leaf, Opaque) and id(leaf.obj) not in self.opaque]
        if any(self.owned.object_path(leaf.obj) is None for leaf in lost):
            raise CaptureError(
                f"returns an object of its own: {', '.join(sorted({type(leaf.obj).__name__ for leaf in lost}))}"
            )
        return self.argument(structure)


def _is_found(target: Any) -> bool:
    """Whether a Python function is what stands under its name in its module, where fx will look for it."""
    if not isinstance(target, FunctionType) or not target.__module__.startswith("torch"):
        return True
    found: Any = sys.modules.get(target.__module__)
    for name in target.__name__.split("."):
        found = getattr(found, name, None)
    return found is target


def _key(key: Any) -> Any:
    if type(key) not in (str, int, float, bool, type(None)):
        raise CaptureError(f"makes a dict with a key of type {type(key).__name__}")
    return key


def build_graph(recording: Recording, inline: set[int]) -> HostGraph:
    """The graph of the root of a recording, in which the module calls ``inline`` are opened (`CLOSED`: not even the
    root).

    Raises:
        CaptureError: the root does what a graph cannot repeat; the message is a short reason.
    """
    builder = _Builder(recording, inline)
    return builder.build_closed() if inline == CLOSED else builder.build()


def _input_leaves(structure: Any) -> list[Any]:
    """What must be passed to a graph from the arguments of a call: `Ref`s and `Opaque`s, in order."""
    if isinstance(structure, (Ref, Opaque)):
        return [structure]
    if is_sequence(structure):
        return [leaf for s in structure for leaf in _input_leaves(s)]
    if is_mapping(structure):
        return [leaf for s in structure.values() for leaf in _input_leaves(s)]
    return _input_leaves((structure.start, structure.stop, structure.step)) if isinstance(structure, slice) else []


def input_leaves(structure: Any) -> list[Any]:
    """The run-time counterpart: tensors and objects that are no plain constants, in the same order."""
    if isinstance(structure, Tensor):
        return [structure]
    if is_sequence(structure):
        return [leaf for s in structure for leaf in input_leaves(s)]
    if is_mapping(structure):
        return [leaf for s in structure.values() for leaf in input_leaves(s)]
    if isinstance(structure, slice):
        return input_leaves((structure.start, structure.stop, structure.step))
    return [] if is_constant(structure) else [structure]
