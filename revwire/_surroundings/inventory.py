"""What modules own as a forward finds it: weights with their versions, buffers that are written, hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor, nn

from revwire._torch import HOOKS, hooks_of, hooks_on_all_modules


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the forward of a module, its own or global ones."""
    return any(hooks_of(module)[: len(HOOKS)]) or hooks_on_all_modules()


COPIED = -2
"""Stands for the version of a weight that may be written to."""

Table = dict[str, Any]
"""The parameters of one module, or its buffers, by name."""


Place = tuple[Table, str, Tensor, bool]
"""Where a module holds a tensor: (its table, the name, the tensor, whether it is a parameter)."""


_VERSION, REQUIRES_GRAD = attrgetter("_version"), attrgetter("requires_grad")

_is_there: Callable[[Any], bool] = partial(is_not, None)


@dataclass(slots=True)
class Inventory:
    """What the modules of a branch own.

    Attributes:
        weights: their parameters.
        versions: the version counter of each at the time; `COPIED`: who runs the branch again has a copy.
        writers: those that a forward may write buffers of; ``writing``: those of them that were in train mode.
        trained: which of them wanted a gradient.
        tables: where their parameters and buffers stand: (the table, what stood in it, whether it is of parameters).
        modules: they and all below them, by identity, in order.
        attributes: what each of them had: (its attributes, a copy).
        below: where modules stood in them: (the table, a copy).
        inner: their tables of buffers, and of modules below them; ``size``: how much is in these.
    """

    weights: list[Tensor]
    versions: list[int]
    writers: list[nn.Module]
    writing: list[nn.Module]
    tables: list[tuple[Table, Table, bool]]
    modules: dict[int, nn.Module]
    trained: list[bool]
    attributes: list[tuple[Table, Table]]
    below: list[tuple[Table, Table]]
    inner: list[Table]
    size: int

    @classmethod
    def of(cls, roots: Iterable[nn.Module]) -> Inventory:
        """The inventory of these modules and all below them (a plain walk: `nn.Module.modules` is slow)."""
        weights, writers, tables = list[Tensor](), list[nn.Module](), list[tuple[Table, Table, bool]]()
        attributes, standing, inner = list[tuple[Table, Table]](), list[tuple[Table, Table]](), list[Table]()
        todo: list[nn.Module | None] = list(roots)
        seen = dict[int, nn.Module]()
        for module in todo:  # grows
            if module is None or id(module) in seen:
                continue
            seen[id(module)] = module
            own, table, buffers, below = module.__dict__, module._parameters, module._buffers, module._modules
            attributes.append((own, own.copy()))
            inner += buffers, below
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
                if isinstance(below, dict):
                    standing.append((below, below.copy()))
                todo += below.values()
        trained, writing = [*map(REQUIRES_GRAD, weights)], [m for m in writers if m.training] if writers else []
        versions, size = versions_of(weights), sum(map(len, inner))
        return cls(weights, versions, writers, writing, tables, seen, trained, attributes, standing, inner, size)

    def take_up(self, other: Inventory) -> None:
        """Let what other modules own be in it, too; ``modules``, ``inner`` and ``size`` are still those of its own."""
        self.weights += other.weights
        self.versions += other.versions
        self.trained += other.trained
        if other.writing:
            self.writing += [m for m in other.writing if m not in self.writing]
        self.tables += other.tables

    def copied(self, weight: Tensor) -> None:
        """There is a copy of a weight, so that it may be written to."""
        self.versions = [
            COPIED if w is weight else version for w, version in zip(self.weights, self.versions, strict=True)
        ]

    def moved(self) -> list[Tensor]:
        """The weights that were written to since, and of which there is no copy."""
        now = versions_of(self.weights)
        if now == self.versions:
            return []
        pairs = zip(self.weights, self.versions, now, strict=True)
        return [weight for weight, a, b in pairs if a != b and a != COPIED]

    def note(self, weight: Tensor) -> None:
        """Take up one that the branch uses, which no module of it owns."""
        self.weights.append(weight)
        self.versions.append(version_of(weight))
        self.trained.append(weight.requires_grad)


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
