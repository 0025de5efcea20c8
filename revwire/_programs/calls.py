"""What the program of a host calls: units and views of streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from revwire._runtime.chain import Chain
from revwire._runtime.run import relayout, run
from revwire._runtime.unit import Unit
from revwire._search.units import UnitKey
from revwire._torch import saves_result


@dataclass(frozen=True, eq=False)
class Slot:
    """A unit that a host holds: which one of its residual adds, and its place in a chain."""

    key: UnitKey
    posts: int
    chain: Chain
    index: int
    path: str
    later: tuple[int, ...] = ()

    @property
    def drops_skip(self) -> bool:
        """Whether its coupling drops the skip of a post-activation unit."""
        return self.chain.couplings[self.index].drops_skip


class UnitCall:
    """What the program of a host calls for one unit."""

    __module__, __name__, __qualname__ = "revwire", "run_unit", "run_unit"

    def __init__(self, chain: Chain, unit: Unit) -> None:
        self.chain = chain
        self.unit = unit

    def __call__(self, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        return run(self.chain, self.unit, host, x, extras)


class ViewCall:
    """A view of the stream between two units, applied to both streams."""

    __module__, __name__, __qualname__ = "revwire", "view_streams", "view_streams"

    def __init__(self, chain: Chain, target: Callable[..., Tensor]) -> None:
        self.chain = chain
        self.target = target

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return relayout(self.chain, lambda t: self.target(t, *args, **kwargs), x)


def writable(x: Tensor) -> Tensor:
    """``x``, or a copy of it if what computed it may need its value for a gradient (a ReLU does, a norm does not)."""
    safe = not x.requires_grad or (x.grad_fn is not None and x._base is None and not saves_result(x.grad_fn))
    return x if safe else x.clone()
