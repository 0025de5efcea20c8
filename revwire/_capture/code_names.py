"""The names of a function, and where they lead."""

from __future__ import annotations

import ast
import builtins
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from revwire._capture.pure_calls import is_pure
from revwire._capture.recording import at
from revwire._capture.sources import source_of
from revwire._errors import CaptureError
from revwire._structures import CONSTANTS

Read = tuple[Any, tuple[tuple[str, Any], ...]]
"""Where a chain begins, and its links: ("attr", name) or ("item", key)."""

Given = tuple[Sequence["Read | bool | None"], Mapping[str, "Read | bool"]]
"""Of arguments, by position and by name: where each leads, if it leads outside, or whether it was made by the
caller.
"""

DEEPEST = 16
"""How many functions may call each other."""

MISSING = object()


def follow_chain(root: Any, links: Iterable[tuple[str, Any]]) -> Any:
    for kind, name in links:
        try:
            root = getattr(root, name) if kind == "attr" else root[name]
        except (AttributeError, KeyError, IndexError, TypeError):
            return MISSING
    return root


def identity(read: Read) -> Any:
    """By which a read is known."""
    root, links = read
    if isinstance(root, super):  # each is a new one
        return *(id(getattr(root, name)) for name in ("__thisclass__", "__self__")), links
    return id(root), links


def leads_to_object(read: Read) -> bool:
    """Whether a chain leads to what is no constant and no tensor, and may have reads of its own."""
    return not isinstance(follow_chain(*read), (*CONSTANTS, Tensor, tuple))


class Names(ABC):
    """The names of one function; what it reads by them goes to ``found``."""

    @abstractmethod
    def value(self, value: ast.AST | None) -> None:
        """Go through an expression.

        Raises:
            CaptureError: it is of a form whose reads are not known.
        """

    def __init__(
        self, function: Any, module: nn.Module | None, found: dict[Any, Read], depth: int, given: Given | None = None
    ) -> None:
        tree = source_of(function) if isinstance(function, FunctionType) and depth < DEEPEST else None
        if tree is None:
            name = getattr(function, "__qualname__", type(function).__name__)
            raise CaptureError(f"runs {name}, of which the source is not at hand")
        self.tree, self.function, self.module, self.found, self.depth = tree, function, module, found, depth
        args = tree.args
        first = [a.arg for a in (*args.posonlyargs, *args.args)]
        more = [a.arg for a in (args.vararg, args.kwarg) if a]
        self.own = first[0] if module is not None and first else None  # the module's name
        self.carrier = more[0] if module is not None and not first and args.vararg else None  # where it comes first
        self.local = {*first, *(a.arg for a in args.kwonlyargs), *more} - {self.own}
        self.modules: set[str] = set()  # names of locals that are modules of one's own
        self.imported: dict[str, Read] = {}  # names of locals that lead outside
        self.is_sure = True  # that the statement is run
        self.made = set(more)  # names of locals that this code, or the call itself, made
        positional, named = given or ((), {})
        for name, what in {**dict(zip(first, positional, strict=False)), **named}.items():
            if isinstance(what, tuple) and name in self.local:
                self.local.discard(name)
                self.imported[name] = what
            elif what is True:
                self.made.add(name)

    def refused(self, node: ast.AST, what: str) -> CaptureError:
        line = getattr(node, "lineno", self.tree.lineno)
        return CaptureError(f"{what}{at((self.function.__code__, line, self.function.__module__))}")

    def bind(self, target: ast.expr, value: ast.expr | None) -> None:
        """An assignment: to names, and to what this code made itself."""
        match target:
            case ast.Name(name) if name != self.own:
                if name in self.imported and not self.is_sure and leads_to_object(self.imported[name]):
                    raise self.refused(target, f"assigns to {name} in some calls")
                self.local.add(name)
                self.modules.discard(name)
                self.imported.pop(name, None)
                if isinstance(value, (ast.List, ast.Dict)) or (isinstance(value, ast.Call) and self.gives_new(value)):
                    self.made.add(name)
                elif value is not None:
                    self.made.discard(name)
            case ast.Tuple(targets) | ast.List(targets):
                spelled = value.elts if isinstance(value, ast.Tuple) else []
                for i, t in enumerate(targets):
                    self.bind(t, spelled[i] if len(spelled) == len(targets) else ast.Constant(None))
            case ast.Starred(inner):
                self.bind(inner, ast.Constant(None))
            case ast.Subscript(ast.Name(name), index) if name in self.made:
                self.value(index)
            case _:
                raise self.refused(target, f"assigns to {ast.unparse(target)}")

    def gives_new(self, call: ast.Call) -> bool:
        """Whether what a call gives is no one else's: code that is looked through may give what it has read."""
        chain = self.chain(call.func)
        if isinstance(call.func, ast.Attribute) and (chain is None or call.func.attr == "copy"):
            return True
        return chain is not None and is_pure(follow_chain(*chain))

    def free(self, name: str) -> CellType:
        """The cell of a name of the code around."""
        cell: CellType = self.function.__closure__[self.function.__code__.co_freevars.index(name)]
        return cell

    def chain(self, value: ast.expr) -> Read | None:
        """Where a name, an attribute or an item leads, if it begins outside: at one's own module, a global, a
        builtin.
        """
        match value:
            case ast.Name(name):
                if name == self.own:
                    return self.module, ()
                if name in self.local:
                    return None
                if name in self.imported:
                    return self.imported[name]
                if name in self.function.__code__.co_freevars:
                    return self.free(name), (("attr", "cell_contents"),)
                scope = self.function.__globals__
                return (scope, (("item", name),)) if name in scope else (builtins, (("attr", name),))
            case ast.Call(ast.Name("type"), [ast.Name(name)], []) if name == self.own:
                return type(self.module), ()
            case ast.Attribute(inner, name) | ast.Call(
                ast.Name("getattr" | "hasattr"), [inner, ast.Constant(str(name)), *_], []
            ):
                chain = self.chain(inner)
                return chain and (chain[0], (*chain[1], ("attr", name)))
            case ast.Call(ast.Name("super"), [], []) if self.own and "__class__" in self.function.__code__.co_freevars:
                return super(self.free("__class__").cell_contents, self.module), ()
            case ast.Subscript(inner, ast.Constant(key)):
                chain = self.chain(inner)
                if chain is not None and isinstance(follow_chain(*chain), Tensor):
                    return None
                return chain and (chain[0], (*chain[1], ("item", key)))
        return None

    def read(self, node: ast.expr, chain: Read) -> Any:
        """Note what a chain reads; what it leads to must be a constant, a list of them, a function, a class, or a
        tensor of a module.
        """
        owner, value = follow_chain(chain[0], chain[1][:-1]), follow_chain(*chain)
        plain = isinstance(value, (*CONSTANTS, Enum, type, FunctionType, BuiltinFunctionType, MethodType, nn.Module))
        if value is MISSING:  # an error, or code that is not run; if it comes to be, the key is another one
            self.note(chain)
            return value
        several = type(value) in (list, tuple, torch.Size) and all(isinstance(v, CONSTANTS) for v in value)
        if not (plain or several or _is_table_entry(owner, chain) or is_pure(value)):
            raise self.refused(node, f"reads {ast.unparse(node)}, a {type(value).__name__}")
        if any(isinstance(inspect.getattr_static(type(o), n, None), property) for o, n in _owners(chain)):
            raise self.refused(node, f"reads {ast.unparse(node)}, which is a property")
        if not isinstance(value, Tensor):
            self.note(chain)
        return value

    def note(self, chain: Read) -> None:
        self.found.setdefault(identity(chain), chain)


def _is_table_entry(owner: Any, chain: Read) -> bool:
    """Whether it is a parameter or a buffer of a module, which a graph takes from there in each call."""
    name = chain[1][-1][1] if chain[1] else None
    return isinstance(owner, nn.Module) and (name in owner._parameters or name in owner._buffers)


def _owners(chain: Read) -> Iterator[tuple[Any, str]]:
    """Each object of a chain of which an attribute is read."""
    owner, links = chain
    for kind, name in links:
        if kind == "attr":
            yield owner, name
        owner = follow_chain(owner, ((kind, name),))
