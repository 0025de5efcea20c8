"""Hosts whose code is a straight line: there a program of one call is all calls, and costs less than following each.

Note [Straight lines]
    Code that only calls modules below it, a few torch functions without effects, and adds, multiplies and returns what
    they give, reads nothing that may change, does nothing outside, and decides on nothing. Its arguments are told by
    the signature of the call. Any other statement, name or attribute, and code whose source is not what runs, is
    followed (`following`).
"""

from __future__ import annotations

import ast
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from revwire._capture.sources import source_of

_CALLS = frozenset(["relu", "gelu", "silu", "tanh", "sigmoid", "softmax", "mul", "permute", "transpose", "flatten"])
"""Torch functions, and methods of tensors, that give a tensor, and do nothing else."""

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def is_straight(host: nn.Module) -> bool:
    """Whether the code of a host is a straight line, as far as its source tells."""
    forward = type(host).forward
    function = source_of(forward) if isinstance(forward, FunctionType) else None
    if (
        not isinstance(function, ast.FunctionDef)
        or function.args.vararg
        or function.args.kwarg
        or function.decorator_list
    ):
        return False
    if forward.__code__.co_freevars:
        return False
    names = [a.arg for a in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    line = _Line(host, forward.__globals__, names[0], set(names[1:]))
    return all(map(line.follows, function.body))


class _Line:
    """The statements of a function, one after the other; ``local``: the names that it has bound so far."""

    def __init__(self, host: nn.Module, names: dict[str, Any], own: str, local: set[str]) -> None:
        self.host, self.names, self.own, self.local = host, names, own, local

    def follows(self, statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Return):
            return statement.value is not None and self.gives(statement.value)
        if isinstance(statement, ast.Assign):
            target = statement.targets[0]
            if len(statement.targets) > 1 or not isinstance(target, ast.Name) or not self.gives(statement.value):
                return False
            self.local.add(target.id)
            return True
        return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)

    def gives(self, value: ast.expr) -> bool:
        """Whether an expression is a tensor, a constant, or an argument. (A sum is laid out as its first operand,
        which must be one that is known.)
        """
        if isinstance(value, ast.Constant):
            return True
        if isinstance(value, ast.Name):
            return value.id in self.local
        if isinstance(value, ast.BinOp):
            laid_out = isinstance(value.left, (ast.Name, ast.Constant)) or not isinstance(value.op, (ast.Add, ast.Sub))
            return isinstance(value.op, _OPERATORS) and laid_out and self.gives(value.left) and self.gives(value.right)
        if isinstance(value, ast.UnaryOp):
            return isinstance(value.op, ast.USub) and self.gives(value.operand)
        if isinstance(value, ast.Attribute):
            return self.is_own(value, "_parameters")
        if isinstance(value, ast.Call):
            given = [*value.args, *(k.value for k in value.keywords if k.arg is not None)]
            named = all(k.arg is not None for k in value.keywords)
            return named and all(map(self.gives, given)) and self.is_known(value.func)
        return False

    def is_own(self, value: ast.expr, table: str) -> bool:
        """Whether it stands in a table of the host."""
        if not isinstance(value, ast.Attribute) or not isinstance(value.value, ast.Name) or value.value.id != self.own:
            return False
        return getattr(self.host, table).get(value.attr) is not None

    def is_known(self, function: ast.expr) -> bool:
        """Whether it is a module of the host, or one of `_CALLS`."""
        if isinstance(function, ast.Attribute) and self.is_own(function, "_modules"):
            return type(self.host._modules[function.attr]).__call__ is nn.Module.__call__
        if not isinstance(function, ast.Attribute) or function.attr not in _CALLS:
            return False
        owner = function.value
        if isinstance(owner, ast.Name) and owner.id not in self.local:
            found = self.names.get(owner.id)
            return isinstance(found, ModuleType) and found in (torch, nn.functional)
        return self.gives(owner)
