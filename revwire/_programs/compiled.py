"""A graph as a Python function, and what such functions call besides torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx

from revwire._capture.recording import Modes
from revwire._torch import rename_node

WHOLE_FORWARD = "forward.plain"
"""The attribute path of a rewired host's original forward."""


class Spelled:
    """A callable for a graph: printable, whatever it wraps."""

    __module__ = "revwire"

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self.call = call
        self.__name__ = self.__qualname__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def after(tensor: Any, _: Any) -> Any:
    """``tensor``, which a call has written to: in a graph, an edge from that call."""
    return tensor


def in_modes(modes: Modes, outside: Modes, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` under the gradient and autocast modes that the original code had set around it, where they differ."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            if modes[0] != outside[0]:
                stack.enter_context(torch.set_grad_enabled(modes[0]))
            for kind, enabled, dtype in set(modes[2]) - set(outside[2]):
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            return call(*args, **kwargs)

    return wrapped


class Compiled:
    """A graph as a Python function ``f(host, *inputs)``; submodules and weights are looked up on the host at each
    call.
    """

    def __init__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.name == "self":  # a submodule may be called so; the first argument of the function is
                rename_node(node, "self_")
        graph.lint()
        code = graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<revwire graph>", "exec"), scope)  # the standard way of running an fx graph
        self.run: Callable[..., Any] = scope["forward"]
