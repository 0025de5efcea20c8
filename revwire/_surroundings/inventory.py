"""What modules own as a forward finds it: weights with their versions, buffers that are written, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor, nn

from revwire._torch import has_own_hooks, hooks_on_all_modules


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the forward of a module, its own or global ones."""
    return has_own_hooks(module) or hooks_on_all_modules()


Table = dict[str, Any]
"""The parameters of one module, or its buffers, by name."""


Place = tuple[Table, str, Tensor, bool]
"""Where a module holds a tensor: (its table, the name, the tensor, whether it is a parameter)."""


_VERSION = attrgetter("_version")

_is_there: Callable[[Any], bool] = partial(is_not, None)


@dataclass(slots=True)
class Inventory:
    """What the modules of a branch own.

    Attributes:
        weights: their parameters.
        versions: the version counter of each at the time.
        writers: those that a forward may write buffers of.
        tables: where their parameters and buffers stand: (the table, what stood in it, whether it is of parameters).
        modules: they and all below them, by identity, in order.
        size: their `size_of`.
    """

    weights: list[Tensor]
    versions: list[int]
    writers: list[nn.Module]
    tables: list[tuple[Table, Table, bool]]
    modules: dict[int, nn.Module]
    size: int

    @classmethod
    def of(cls, roots: Iterable[nn.Module]) -> Inventory:
        """The inventory of these modules and all below them (a plain walk: `nn.Module.modules` is slow)."""
        weights, writers, tables = list[Tensor](), list[nn.Module](), list[tuple[Table, Table, bool]]()
        todo: list[nn.Module | None] = list(roots)
        seen = dict[int, nn.Module]()
        size = 0
        for module in todo:  # grows
            if module is None or id(module) in seen:
                continue
            seen[id(module)] = module
            table, buffers, below = module._parameters, module._buffers, module._modules
            size += len(module.__dict__) + len(buffers)
            if table:
                if isinstance(table, dict):  # else it is that of a scripted module, whose weights nobody lends
                    tables.append((table, table.copy(), True))
                weights.extend(filter(_is_there, table.values()))  # type: ignore[arg-type]
            if buffers:
                if any(map(is_written, buffers.values())):
                    writers.append(module)
                if isinstance(buffers, dict):
                    tables.append((buffers, buffers.copy(), False))
            if below:
                todo += below.values()
        return cls(weights, versions_of(weights), writers, tables, seen, size)

    def take_up(self, other: Inventory) -> None:
        """Let what other modules own be in it, too; ``modules`` and ``size`` are still those of its own."""
        self.weights += other.weights
        self.versions += other.versions
        if other.writers:
            self.writers += [m for m in other.writers if m not in self.writers]
        self.tables += other.tables

    def note(self, weight: Tensor) -> None:
        """Take up one that the branch uses, which no module of it owns."""
        self.weights.append(weight)
        self.versions.append(version_of(weight))


def size_of(modules: Iterable[nn.Module]) -> int:
    """How many attributes and buffers these modules have."""
    size = 0
    for m in modules:
        size += len(m.__dict__) + len(m._buffers)
    return size


def version_of(x: Tensor) -> int:
    """The count of in-place writes to ``x``; inference tensors have none."""
    try:
        return x._version
    except RuntimeError:
        return -1


def versions_of(tensors: list[Tensor]) -> list[int]:
    """`version_of` each of them."""
    try:
        return [*map(_VERSION, tensors)]
    except RuntimeError:  # inference tensors
        return [*map(version_of, tensors)]


def is_written(buffer: Tensor | None) -> bool:
    """Whether a forward may write this buffer: statistics are floats, counters have one element."""
    return buffer is not None and (buffer.is_floating_point() or buffer.numel() == 1)
