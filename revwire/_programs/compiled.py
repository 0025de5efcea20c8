"""A graph as a Python function, and what such functions call besides torch.

Note [Names are data]
    `torch.fx` writes names into the source as they are. A module may be called anything, and an argument that is passed
    by keyword too: with quotes, a line break, or a keyword of Python's in the name it would be broken code, or somebody
    else's. So only plain names are written; others are looked up in tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from keyword import iskeyword
from typing import Any

import torch
from torch import fx, nn

from revwire._capture.recording import Modes
from revwire._torch import rename_node

WHOLE_FORWARD = "forward.plain"
"""The attribute path of a rewired host's original forward."""


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def is_plain(name: str) -> bool:
    """Whether Python reads this as a name, and as this one (others than ASCII letters may be read as their like)."""
    return _PLAIN.fullmatch(name) is not None and not iskeyword(name)


class Spelled:
    """A callable for a graph: printable, whatever it wraps."""

    __module__ = "revwire"

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        self.call = call
        self.__name__ = self.__qualname__ = name if is_plain(name) else "call"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class ByKeyword:
    """``call``, whose last arguments are passed by these names; see Note [Names are data]."""

    __module__, __name__, __qualname__ = "revwire", "by_keyword", "by_keyword"

    def __init__(self, call: Callable[..., Any], names: Sequence[str]) -> None:
        self.call = call
        self.names = tuple(names)

    def __call__(self, *args: Any) -> Any:
        first = len(args) - len(self.names)
        return self.call(*args[:first], **dict(zip(self.names, args[first:], strict=True)))


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
        odd = _odd_paths(graph)
        aliases = {path: f"odd_name_{i}" for i, path in enumerate(dict.fromkeys(odd.values()))}
        for node, path in odd.items():
            node.target = aliases[path]
        code = graph.python_code("self")
        for node, path in odd.items():
            node.target = path
        scope = dict(code.globals)
        exec(compile(code.src, "<revwire graph>", "exec"), scope)  # the standard way of running an fx graph
        self.run: Callable[..., Any] = scope["forward"]
        if odd:
            self.run = partial(_run_by_aliases, self.run, {alias: path.split(".") for path, alias in aliases.items()})


def _odd_paths(graph: fx.Graph) -> dict[fx.Node, str]:
    """The nodes that stand for something in the host by a path that is not plain, and the path."""
    paths = {node: str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    return {
        node: path for node, path in paths.items() if not all(s.isdecimal() or is_plain(s) for s in path.split("."))
    }


def _run_by_aliases(run: Callable[..., Any], paths: dict[str, list[str]], host: nn.Module, *inputs: Any) -> Any:
    return run(_Aliased(host, paths), *inputs)


class _Aliased:
    """A host, some parts of which go by other names; see Note [Names are data]."""

    def __init__(self, host: nn.Module, paths: dict[str, list[str]]) -> None:
        self._host = host
        self._paths = paths

    def __getattr__(self, name: str) -> Any:
        path = self._paths.get(name)
        return getattr(self._host, name) if path is None else below(self._host, path)


def below(host: nn.Module, steps: Sequence[str]) -> Any:
    """What stands under a path in a host. (`nn.Module.get_submodule` is slow.)"""
    found: Any = host
    for step in steps:
        child = found._modules.get(step) if isinstance(found, nn.Module) else None
        found = getattr(found, step) if child is None else child
    return found
