"""A unit of a chain: its branch, its place, its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from revwire._surroundings.holdings import Known

Branch = Callable[..., tuple[Tensor, tuple[Any, ...]]]


@dataclass(frozen=True, eq=False)
class Unit:
    """One residual unit, ready to run.

    Attributes:
        path: qualified name under which reports and errors name it.
        index: its place in its chain, from 0.
        kind: ``"residual"``: the branch returns F(x); ``"block"``: it returns B(x), and F = B − x.
        branch: ``branch(host, x, *extras) -> (F(x) or B(x), side outputs)``.
        modules: ``modules(host)`` gives the modules whose parameters and buffers the branch uses.
        later: its further places in the chain, ascending, where the chain runs through the same unit again (shared
            weights).
        known: what its modules were found to hold.
        line: of the code that makes its residual add, where that is known.
        has_branch: its branch can be called by itself; not so where the code of its host is followed.
    """

    path: str
    index: int
    kind: Literal["residual", "block"]
    branch: Branch
    modules: Callable[[nn.Module], Iterable[nn.Module]]
    later: tuple[int, ...] = ()
    known: Known = field(default_factory=Known)
    line: str = ""
    has_branch: bool = True

    def where(self, chain: str = "") -> str:
        """Its path, its chain and its line, for warnings: ``blocks.1.mlp (chain 0, model.py:12)``."""
        more = ", ".join(filter(None, (chain, self.line)))
        return f"{self.path} ({more})" if more else self.path

    def place(self, position: int) -> int | None:
        """The first of its places in the chain that a tape at ``position`` can still go to."""
        if self.index >= position:
            return self.index
        return next((i for i in self.later if i >= position), None)


Mode = Literal["stored", "selective", "checkpointed", "reversible"]
"""How a unit's activations come back: kept by autograd, recomputed (but for products) from a kept input, or all, or
from a rebuilt one.
"""


def evaluate(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """(F_k(x) in the shape of x, side outputs)."""
    f, sides = unit.branch(host, x, *extras)
    return (f if f.shape == x.shape else f.expand_as(x)), sides
