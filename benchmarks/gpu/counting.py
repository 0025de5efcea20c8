"""What a device would be given to do, counted on the CPU: each operation of PyTorch's, and each kernel of Triton's,
with the bytes that it reads and writes and its floating-point operations.

The environment of `INTERPRETED` must be there when Python starts: the library then uses its kernels on the CPU, and
defers checks as on a device. Kernels write zeros while they are counted, as Triton's interpreter takes seconds for
each: then all states, and what is rebuilt of them, are zero, and equal. So do the dear operations of PyTorch's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

INTERPRETED = {"REVWIRE_KERNELS": "interpreted", "TRITON_INTERPRET": "1"}

_NOTHING_TO_DO = ("empty", "new_empty", "_unsafe_view", "detach", "view", "lift_fresh", "promote_types")
"""Beginnings of the names of operations that give a device nothing to do, beside views."""

_ONLY_WRITTEN = ("copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_")
"""Operations that write to their first argument, and do not read it."""

_DEAR = (
    *("mm.", "addmm.", "bmm.", "convolution", "_scaled_dot_product"),
    *("native_layer_norm", "gelu", "_softmax", "softmax"),
)
"""Beginnings of the names of operations that give zeros: which launches there are does not depend on values."""

_WRITTEN = {"advance": range(3, 8), "retreat": (4, 5), "read": (1,), "summed": (1,), "sample": (0,)}
"""The places of what a kernel writes among its arguments; `scale` says so in its options."""

_WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
"""Operations whose result the host waits for."""


class Work(NamedTuple):
    """One launch: its name, the bytes that it reads and writes, and its floating-point operations."""

    name: str
    bytes: int
    flops: int

    @property
    def waits(self) -> bool:
        """Whether the host waits for it."""
        return self.name.startswith(_WAITS)


class Counted(TorchDispatchMode):
    """A mode that writes down the work of what runs in it."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []
        self.inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        out = (_zeros if name.startswith(_DEAR) else _itself)(function, args, kwargs)
        if not (self.inside or function.is_view or name.startswith(_NOTHING_TO_DO) or _of_random_states(name, args)):
            given = (
                (args[1:] if name.startswith(_ONLY_WRITTEN) else args),
                {k: v for k, v in kwargs.items() if k != "out"},
            )
            self.work.append(Work(name, _bytes(given) + _bytes(out), _flops(function, args, kwargs, out)))
        return out

    def kernel(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Write a kernel of Triton's down, and zeros in its stead."""
        tensors = [t for t in args if isinstance(t, Tensor)]
        places = _WRITTEN.get(name) or [i + 1 for i, on in enumerate(("FIRST", "SECOND", "THIRD")) if options[on]]
        self.inside = True
        for place in places:
            args[place].zero_()
        self.inside = False
        if options.get("ADDS") is False:  # what would be added is not read
            del tensors[1]
        size = sum({t.data_ptr(): _bytes(t) for t in tensors}.values())
        self.work.append(Work(f"kernel {name}", 2 * args[0].nbytes if name == "sample" else size, 0))


@contextmanager
def counted() -> Iterator[Counted]:
    """Count what runs in this context, backward passes on the CPU included.

    Raises:
        RuntimeError: Python was started without the environment of `INTERPRETED`.
    """
    if any(os.environ.get(name) != value for name, value in INTERPRETED.items()):
        raise RuntimeError("kernels are not interpreted here; start Python with REVWIRE_KERNELS and TRITON_INTERPRET")
    from triton.runtime.interpreter import GridExecutor

    mode, launch = Counted(), GridExecutor.__call__
    GridExecutor.__call__ = lambda self, *args, **kwargs: mode.kernel(self.fn.__name__, args, kwargs)
    try:
        with mode:
            yield mode
    finally:
        GridExecutor.__call__ = launch


def work_of(step: Callable[[], object]) -> list[Work]:
    """The work of a step, after one that is not counted, which makes what stays."""
    with counted() as mode:
        step()
        mode.work.clear()
        step()
    return mode.work


def _itself(function: Any, args: Any, kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _zeros(function: Any, args: Any, kwargs: Any) -> Any:
    """Zeros where an operation would give numbers."""

    def shape(t: Any) -> Any:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t

    def zero(t: Any) -> Any:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_() if isinstance(t, Tensor) else t

    return tree_map(zero, function(*tree_map(shape, args), **tree_map(shape, kwargs)))


def _of_random_states(name: str, args: tuple[Any, ...]) -> bool:
    """Random states are compared on the host."""
    return name.startswith("equal") and args[0].nbytes == torch.get_rng_state().nbytes


def _bytes(values: Any) -> int:
    """Of the elements of all tensors in some values; those of an expanded one are there once."""
    return sum(
        t.itemsize * prod(size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or size == 0)
        for t in tree_leaves(values)
        if isinstance(t, Tensor)
    )


def _flops(function: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = function.__name__
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        back = "backward" in name
        q, k = args[1:3] if back else args[:2]
        return int(4 * q.numel() * k.shape[-2] * (2.5 if back else 1))
    formula = flop_registry.get(function.overloadpacket)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
