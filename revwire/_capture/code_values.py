"""The expressions of a function: whether all are of forms whose reads are known."""

from __future__ import annotations

import ast
import itertools
import operator
from abc import abstractmethod
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from revwire._capture.code_names import MISSING, Given, Names, Read, follow_chain
from revwire._capture.pure_calls import OF_CONTAINERS, OF_MODULES, OF_TENSORS, is_pure, is_torchs, methods

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Is: operator.is_, ast.IsNot: operator.is_not, ast.Eq: operator.eq, ast.NotEq: operator.ne,
    ast.Lt: operator.lt, ast.Gt: operator.gt,
}  # fmt: skip


class Values(Names):
    """The expressions of one function."""

    @abstractmethod
    def check(self) -> None:
        """Go through the function.

        Raises:
            CaptureError: it is not known what it reads, or it does something outside.
        """

    def value(self, value: ast.AST | None) -> None:
        match value:
            case None | ast.Constant():
                pass
            case ast.Name(name) if name in self.local:
                pass
            case ast.Name() | ast.Attribute() | ast.Subscript() if (chain := self.chain(value)) is not None:
                self.read(value, chain)
            case ast.Call(ast.Name("getattr" | "hasattr")) if self.chain(value) is not None:
                self.settled(value)
            case ast.Attribute(inner, name) if name in OF_TENSORS and getattr(inner, "id", None) not in self.modules:
                self.value(inner)
            case ast.Call(function, given, named):
                self.called(value, function)
                for part in (*given, *(k.value for k in named)):
                    self.value(part)
            case ast.ListComp() | ast.GeneratorExp():
                self.comprehended(value)
            case ast.IfExp(test, body, other):
                known = self.settled(test)
                for part in (body, other) if known is MISSING else (body if known else other,):
                    self.value(part)
            case ast.BoolOp():
                self.settled(value)
            case ast.BinOp() | ast.UnaryOp() | ast.Compare() | ast.Subscript() | ast.Slice():
                self.parts(value)
            case ast.Tuple() | ast.List() | ast.Dict() | ast.Starred() | ast.JoinedStr() | ast.FormattedValue():
                self.parts(value)
            case ast.operator() | ast.unaryop() | ast.boolop() | ast.cmpop() | ast.expr_context():
                pass
            case _:
                raise self.refused(value, f"holds {ast.unparse(value)!r}, of which it is not known what it reads")

    def parts(self, value: ast.AST) -> None:
        for part in ast.iter_child_nodes(value):
            self.value(part)

    def settled(self, test: ast.expr) -> Any:
        """What a condition is, where reads alone decide it, which are noted; `MISSING` where it may be either."""
        match test:
            case ast.Constant(value):
                return value
            case ast.UnaryOp(ast.Not(), inner):
                known = self.settled(inner)
                return known if known is MISSING else not known
            case ast.BoolOp(op, parts):
                unknown = False
                for part in parts:
                    known = self.settled(part)
                    if known is not MISSING and bool(known) is isinstance(op, ast.Or):
                        return known
                    unknown |= known is MISSING
                return MISSING if unknown else isinstance(op, ast.And)
            case ast.Compare(left, [op], [right]) if type(op) in _COMPARISONS:
                both = self.settled(left), self.settled(right)
                return MISSING if MISSING in both else _COMPARISONS[type(op)](*both)
            case ast.Call(ast.Name("getattr"), [_, _, *default]) if (chain := self.chain(test)) is not None:
                return self.read_or(test, chain, *default)
            case ast.Call(ast.Name("hasattr")) if (chain := self.chain(test)) is not None:
                self.read_or(test, chain, ast.Constant(None))
                return follow_chain(*chain) is not MISSING
            case ast.Name() | ast.Attribute() | ast.Subscript() if (chain := self.chain(test)) is not None:
                value = self.read(test, chain)
                return MISSING if isinstance(value, Tensor) else value
        self.value(test)
        return MISSING

    def read_or(self, node: ast.expr, chain: Read, default: ast.expr | None = None) -> Any:
        """As `read`; where nothing is there, what stands in its place: `getattr` with a default."""
        if default is None or follow_chain(*chain) is not MISSING:
            return self.read(node, chain)
        self.note(chain)
        return self.settled(default)

    def comprehended(self, value: ast.ListComp | ast.GeneratorExp) -> None:
        names = self.local, self.modules, self.imported, self.made
        self.local, self.modules, self.imported, self.made = ({*names[0]}, {*names[1]}, {**names[2]}, {*names[3]})
        for loop in value.generators:
            self.value(loop.iter)
            self.bind(loop.target, None)
            for test in loop.ifs:
                self.value(test)
        self.value(value.elt)
        self.local, self.modules, self.imported, self.made = names  # what it binds is its own

    def called(self, call: ast.Call, function: ast.expr) -> None:
        """What is called: a module, a function without effects, code that is looked through, a method of a tensor."""
        chain = self.chain(function)
        if chain is None:
            if isinstance(function, ast.Name) and function.id in self.modules:
                return None
            if isinstance(function, ast.Attribute) and self.is_method(function):
                return self.value(function.value)
            raise self.refused(call, f"calls {ast.unparse(function)}")
        target, owner = follow_chain(*chain), follow_chain(chain[0], chain[1][:-1])
        if isinstance(owner, (Tensor, list, tuple, str)) and chain[1][-1][1] in methods():  # self.weight.t()
            assert isinstance(function, ast.Attribute)
            return self.value(function.value)
        self.read(function, chain)
        if target is MISSING:
            return None
        if isinstance(target, nn.Module) or is_pure(target):
            return None
        if isinstance(target, MethodType) and isinstance(target.__self__, nn.Module):
            return self.called_method(call, target.__func__, target.__self__)
        if isinstance(target, FunctionType) and not is_torchs(target):
            module = self.module if self.hands_on(call) else None
            return type(self)(target, module, self.found, self.depth + 1, self.given(call)).check()
        raise self.refused(call, f"calls {ast.unparse(function)}")

    def called_method(self, call: ast.Call, target: Callable[..., Any], module: nn.Module) -> None:
        name = getattr(target, "__name__", "")
        if vars(nn.Module).get(name) is target:  # train(), apply(), register_forward_hook() ...
            if name not in OF_MODULES:
                raise self.refused(call, f"calls {name}() of a module")
        elif not (is_torchs(target) and is_torchs(type(module))):
            type(self)(target, module, self.found, self.depth + 1, self.given(call, None)).check()

    def is_method(self, function: ast.Attribute) -> bool:
        """Whether it is a method of a tensor, or one that changes what this code made."""
        made = isinstance(function.value, ast.Name) and function.value.id in self.made
        return function.attr in methods() or (made and function.attr in OF_CONTAINERS)

    def given(self, call: ast.Call, *before: None) -> Given:
        """What is known of the arguments of a call; ``before`` stand in front of those that are spelled."""
        spelled = itertools.takewhile(lambda a: not isinstance(a, ast.Starred), call.args)
        return [*before, *map(self.about, spelled)], {k.arg: self.about(k.value) for k in call.keywords if k.arg}

    def about(self, argument: ast.expr) -> Read | bool:
        """Where an argument leads, or whether this code made it."""
        chain = self.chain(argument)
        return (isinstance(argument, ast.Name) and argument.id in self.made) if chain is None else chain

    def hands_on(self, call: ast.Call) -> bool:
        """Whether the module itself is the first that a function is given."""
        match call.args[:1]:
            case [ast.Name(name)]:
                return name == self.own
            case [ast.Starred(ast.Name(name))]:
                return name == self.carrier
        return False
