"""What the code of a module reads from outside of its arguments and tensors: told from its source, or refused.

Note [Reads]
    A graph holds what Python read as it was when the graph was made. It serves a later call only while all of that is
    the same, so what is read must be known. It is told from the source: every expression must be of a form whose reads
    are known (`_Code`), and a name or a chain of attributes that leads outside (``self.mlp.scale``,
    ``CONFIG["width"]``, ``Block.alpha``) must end in a constant, a function, a class or a module. Such a chain is a
    *read*, and its present value belongs to the key under which a graph is found. Where reads alone decide a
    condition, the other way is not looked at. What does something outside (appends to a list, draws random numbers,
    asks the environment), and what cannot be read, is refused, never guessed. A warning may be lost.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from revwire._capture.code_names import MISSING, Read, follow_chain, identity, leads_to_object
from revwire._capture.code_values import Values
from revwire._capture.pure_calls import is_context, is_torchs
from revwire._errors import CaptureError
from revwire._structures import CONSTANTS, ByIdentity


def reads_of(modules: Iterable[nn.Module], forwards: Callable[[nn.Module], Any]) -> tuple[Read, ...]:
    """All that the code of these modules reads.

    Args:
        modules: whose code a graph holds.
        forwards: gives the forward of one as it was before conversion: a function, or a method.

    Raises:
        CaptureError: it cannot be told; the message is a short reason with the line of the code.
    """
    found: dict[Any, Read] = {}
    for module in modules:
        forward = forwards(module)
        function = getattr(forward, "__func__", forward)
        own = type(module), (("attr", "forward"),)
        found[identity(own)] = own
        if not (is_torchs(function) and is_torchs(type(module))):  # a class of one's own may have other parts
            _Code(function, module, found, 0).check()
    return tuple(found.values())


def tells_its_reads(module: nn.Module) -> bool:
    """Whether all is known that the code of a module reads, which has no forward of ours."""
    try:
        reads_of((module,), lambda m: m.forward)
    except CaptureError:
        return False
    return True


def values_of(reads: Iterable[Read]) -> tuple[Any, ...]:
    """What stands there now; of a method, its function."""
    return tuple(_told(follow_chain(root, links)) for root, links in reads)


def _told(value: Any) -> Any:
    """What is compared: constants by type and value, plain lists and tuples of them; the rest by identity."""
    if isinstance(value, CONSTANTS):
        return type(value), value
    if type(value) in (list, tuple, torch.Size):
        return type(value), tuple(map(_told, value))
    return ByIdentity(getattr(value, "__func__", value))


class _Code(Values):
    """The statements of one function."""

    def check(self) -> None:
        defaults = (*(self.function.__defaults__ or ()), *(self.function.__kwdefaults__ or {}).values())
        if not all(isinstance(d, (*CONSTANTS, tuple)) for d in defaults):
            raise self.refused(self.tree, "has a default value that may change")
        if isinstance(self.tree, ast.Lambda):
            self.value(self.tree.body)
        else:
            self.block(self.tree.body)

    def follow(self, statement: ast.stmt) -> None:
        match statement:
            case ast.Pass() | ast.Break() | ast.Continue() | ast.Raise():
                pass
            case ast.Return(value) | ast.Expr(value):
                self.value(value)
            case ast.Assign([ast.Name(name)], value) if (chain := self.chain(value)) and leads_to_object(chain):
                if not self.is_sure:
                    raise self.refused(statement, f"assigns {ast.unparse(value)} in some calls")
                self.imported[name] = chain
                self.local.discard(name)
            case ast.Assign(targets, value):
                self.value(value)
                for target in targets:
                    self.bind(target, value)
            case ast.AnnAssign(target, _, value):
                self.value(value)
                self.bind(target, value)
            case ast.AugAssign(target, _, value) if getattr(target, "id", None) not in self.imported:
                self.value(value)
                self.bind(target, None)
            case ast.Assert(test, message):
                self.value(test)
                self.value(message)
            case ast.Delete(targets) if all(isinstance(t, ast.Name) for t in targets):
                pass
            case _:
                self.compound(statement)

    def compound(self, statement: ast.stmt) -> None:
        """A statement that holds others, or an import."""
        match statement:
            case ast.If(test, body, others):
                known = self.settled(test)
                ways = [*body, *others] if known is MISSING else body if known else others
                self.block(ways, sure=known is not MISSING)
            case ast.Try(body, handlers, others, last):
                self.block([*body, *(s for h in handlers for s in h.body), *others, *last], sure=False)
            case ast.With(items, body) if all(i.optional_vars is None for i in items):
                for item in items:
                    self.enter(item.context_expr)
                self.block(body)
            case ast.Import(names):
                for alias in names:
                    name = alias.asname or alias.name.partition(".")[0]
                    self.bring(statement, name, (("item", alias.name if alias.asname else name),))
            case ast.ImportFrom(str(package), names, 0):
                for alias in names:
                    self.bring(statement, alias.asname or alias.name, (("item", package), ("attr", alias.name)))
            case ast.For(target, over, body, others):
                self.iterated(target, over)
                self.block([*body, *others], sure=False)
            case _:
                raise self.refused(statement, f"holds the statement {ast.unparse(statement).splitlines()[0]!r}")

    def enter(self, context: ast.expr) -> None:
        chain = self.chain(context.func) if isinstance(context, ast.Call) else None
        if not isinstance(context, ast.Call) or chain is None or not is_context(follow_chain(*chain)):
            raise self.refused(context, f"enters {ast.unparse(context)}")
        for part in (*context.args, *(k.value for k in context.keywords)):
            self.value(part)

    def bring(self, statement: ast.stmt, name: str, links: tuple[tuple[str, Any], ...]) -> None:
        """An import; two of one name, or of what is not there yet, might lead elsewhere."""
        if follow_chain(sys.modules, links) is MISSING or self.imported.get(name, (None, links))[1] != links:
            raise self.refused(statement, f"imports {name}")
        self.imported[name] = sys.modules, links

    def block(self, statements: Iterable[ast.stmt], *, sure: bool = True) -> None:
        """Statements; not ``sure`` where they may not be run."""
        before, self.is_sure = self.is_sure, self.is_sure and sure
        for statement in statements:
            self.follow(statement)
        self.is_sure = before

    def iterated(self, target: ast.expr, over: ast.expr) -> None:
        """A loop: over modules of one's own, or over what an expression gives."""
        self.value(over)
        self.bind(target, None)
        chain = self.chain(over)
        if chain is not None and isinstance(target, ast.Name) and isinstance(follow_chain(*chain), nn.Module):
            self.modules.add(target.id)
