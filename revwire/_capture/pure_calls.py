"""Which calls read nothing but what they are given, and do nothing outside."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import warnings
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor

_TORCH = PurePath(torch.__file__).parent


def is_torchs(function: Any) -> bool:
    """Whether it is PyTorch's own code, which reads nothing but what it is given, its module and the modes. (A wrapper
    around it has its name, and is not.)
    """
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code is not None:
        return PurePath(code.co_filename).is_relative_to(_TORCH)
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "torch"


def is_pure(value: Any) -> bool:
    """Whether a function reads nothing but what it is given, its modes and its type, and does nothing outside."""
    if isinstance(value, (FunctionType, BuiltinFunctionType)) and is_torchs(value):
        name = value.__name__.strip("_")
        if name.startswith("is_") or name in ("assert", "log_api_usage_once"):
            return True
    return _hashable(value) and value in _pure()


@functools.cache
def _pure() -> frozenset[Any]:
    """Functions that read nothing but what they are given, and do nothing outside."""
    overridable = torch.overrides.get_overridable_functions()
    of_tensors = {f for namespace, several in overridable.items() if namespace is not Tensor for f in several}
    makers = "zeros ones full empty arange eye linspace rand randn randint is_tensor finfo iinfo Size"
    plain = "abs all any bool enumerate float int isinstance len list max min range reversed round set slice str sum"
    maths = [f for f in vars(math).values() if isinstance(f, BuiltinFunctionType)]
    arithmetic = [operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.getitem]
    return frozenset([
        *(f for f in of_tensors if _hashable(f)),
        *(getattr(torch, name) for name in makers.split()),
        *(getattr(builtins, name) for name in plain.split()), tuple, type, zip,
        *maths, *arithmetic, inspect.signature, warnings.warn,
    ])  # fmt: skip


def is_context(value: Any) -> bool:
    """Whether it makes one of PyTorch's contexts that a recorded call tells of."""
    return is_torchs(value) and getattr(value, "__name__", "") in ("no_grad", "enable_grad", "autocast")


@functools.cache
def methods() -> frozenset[str]:
    """Methods of tensors but for those that do something outside; and of shapes, lists and text."""
    found = {n for n in dir(Tensor) if not n.startswith("_") and callable(getattr(Tensor, n))}
    return frozenset({n for n in found if "hook" not in n} - _EFFECTS | _OF_VALUES)


_EFFECTS = frozenset(
    ["apply_", "backward", "detach_", "map_", "map2_", "requires_grad_", "retain_grad", "set_", "share_memory_"]
)


_LAYOUT = (
    "shape",
    "ndim",
    "dtype",
    "device",
    "layout",
    "T",
    "mT",
    "H",
    "mH",
    "real",
    "imag",
    "is_cuda",
    "requires_grad",
)


OF_TENSORS = frozenset(
    [*_LAYOUT, "values", "indices", "min", "max", "parameters", "__class__", "__module__", "__name__"]
)
"""Attributes of what an expression gives; others may be a user's own."""


OF_MODULES = frozenset(["buffers", "children", "get_buffer", "get_parameter", "get_submodule", "modules", "parameters"])
"""Methods of all modules that change nothing."""


_OF_VALUES = frozenset(["numel", "copy", "index", "count", "startswith", "endswith"])
"""Methods of shapes, lists and text that leave them as they are."""


OF_CONTAINERS = frozenset(["append", "extend", "get", "items", "keys", "pop", "setdefault", "update", "values"])


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
