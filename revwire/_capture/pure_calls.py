"""Which calls read nothing but what they are given, and do nothing outside."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import warnings
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor


def is_torchs(function: Any) -> bool:
    """Whether it is PyTorch's own code, which reads nothing but what it is given, its module and the modes."""
    name = getattr(function, "__module__", None) or ""
    return name == "torch" or name.startswith("torch.")


def is_pure(value: Any) -> bool:
    asks = isinstance(value, FunctionType) and is_torchs(value) and value.__name__.startswith("is_")
    return asks or (_hashable(value) and value in _pure())


@functools.cache
def _pure() -> frozenset[Any]:
    """Functions that read nothing but what they are given, and do nothing outside."""
    overridable = torch.overrides.get_overridable_functions()
    of_tensors = {f for namespace, several in overridable.items() if namespace is not Tensor for f in several}
    makers = "zeros ones full empty arange eye linspace is_tensor is_grad_enabled is_autocast_enabled finfo iinfo Size"
    plain = "abs all any bool enumerate float int isinstance len list max min range reversed round set slice str sum"
    maths = [f for f in vars(math).values() if isinstance(f, BuiltinFunctionType)]
    arithmetic = [f for f in vars(operator).values() if isinstance(f, BuiltinFunctionType)]
    return frozenset([
        *(f for f in of_tensors if _hashable(f)),
        *(getattr(torch, name) for name in makers.split()),
        *(getattr(builtins, name) for name in plain.split()), tuple, type, zip,
        *maths, *arithmetic, math, inspect.signature, warnings.warn, torch._assert, torch._C._log_api_usage_once,
    ])  # fmt: skip


@functools.cache
def methods() -> frozenset[str]:
    """Methods of tensors that PyTorch lets be overridden, and of constants and shapes."""
    found = {getattr(f, "__name__", "") for f in torch.overrides.get_overridable_functions()[Tensor]}
    return frozenset({n for n in found if "hook" not in n and n != "backward"} | _OF_VALUES | _MAKERS)


_LAYOUT = ("shape", "ndim", "dtype", "device", "layout", "T", "mT", "H", "mH", "real", "imag", "is_cuda")


OF_TENSORS = frozenset([*_LAYOUT, "min", "max", "eps", "parameters", "__class__", "__module__", "__name__"])
"""Attributes of what an expression gives; others may be a user's own."""


_MAKERS = frozenset(["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"])


_OF_VALUES = frozenset(["numel", "copy", "index", "count", "startswith", "endswith"])
"""Methods of shapes, lists and text that leave them as they are."""


OF_CONTAINERS = frozenset(["append", "extend", "get", "items", "keys", "pop", "setdefault", "update", "values"])


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
