"""What a tape keeps of each unit: no activation, only what a recompute needs, and what tells whether it came out
right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import ReferenceType

import torch
from torch import Tensor, nn

from revwire._errors import ReconstructionError
from revwire._runtime.chain import Chain
from revwire._runtime.chunks import Chunk
from revwire._runtime.faults import fault
from revwire._runtime.kinds import Kind
from revwire._runtime.replay import Replay
from revwire._runtime.selective import Products
from revwire._runtime.unit import Unit
from revwire._streams.base import Streams
from revwire._streams.samples import Fingerprint, Sample
from revwire._surroundings.buffers import Copies
from revwire._surroundings.copies import Versions
from revwire._surroundings.holdings import Held
from revwire._surroundings.inventory import Inventory, version_of
from revwire._surroundings.surroundings import Surroundings
from revwire.couplings.base import Move, Rule

TensorMeta = tuple[torch.Size, torch.dtype, torch.device]

meta_of: Callable[[Tensor], TensorMeta] = attrgetter("shape", "dtype", "device")


class Anchor(NamedTuple):
    """The true states (x_{k-1}, x_k) before a unit, with their version counters."""

    states: tuple[Tensor, Tensor]
    versions: tuple[int, int]


class Before(NamedTuple):
    """The true state x_{k-1} before a unit, with its version counter."""

    state: Tensor
    version: int


class Result(NamedTuple):
    """What the branch of a unit gave, with its version counter."""

    value: Tensor
    version: int

    @classmethod
    def of(cls, f: Tensor) -> Result:
        """It keeps no more memory than ``f`` has elements."""
        value = f.detach()
        if value.untyped_storage().nbytes() > value.numel() * value.element_size():
            value = value.clone()
        return cls(value, version_of(value))


@dataclass(slots=True)
class Stop:
    """What tells that a recompute which stops early went as the forward; see Note [What need not be rebuilt] in
    `recompute`.

    Attributes:
        looked: the numbers of those among the saved tensors that were looked at.
        looks: what was seen: glances.
        constants: leaves among them, with their version counters.
    """

    looked: list[int] = field(default_factory=list)
    looks: list[Tensor] = field(default_factory=list)
    constants: list[tuple[ReferenceType[Tensor], int]] = field(default_factory=list)


@dataclass(slots=True)
class UnitRecord:
    """What is kept of one unit's forward: no activation, only what a recompute needs."""

    unit: Unit
    host: nn.Module
    rule: Rule
    dtype: torch.dtype
    input_requires_grad: bool
    extras: tuple[Any, ...]
    inputs: Versions
    owned: Inventory
    surroundings: Surroundings
    held: Held  # what its modules hold besides, as it found it
    buffers: Copies | None = None  # that the branch reads and writes, as it found them
    saved: list[TensorMeta] = field(default_factory=list)
    witnesses: Sequence[int] = ()
    sample: Sample | None = None  # until the unit's step completes the fingerprint
    fingerprint: Fingerprint | None = None
    bits: Tensor | None = None
    begins: bool = False  # the tape began with this unit, so x_{k-1} is x_k
    anchor: Anchor | None = None
    before: Before | None = None  # x_{k-1} alone, where x_k is rebuilt to the bit anyway
    narrow: bool = False  # what its branch gave has fewer bits than a state
    by_result: bool = False  # so that is kept, and not x_{k-1}
    result: Result | None = None  # until it has served
    products: Products | None = None  # what need not be computed again, where it is selective
    stop: Stop | None = None  # its recompute stops when all is there that its gradient needs
    chunk: Chunk | None = None  # of the state, that it was evaluated on; None: on all of it
    kind: Kind | None = None  # the class of the tensor that it was given, where that is no plain one
    replay: Replay | None = None  # its branch, where the host's own code ran it

    @property
    def standing(self) -> list[Tensor]:
        """The weights, buffers and extra inputs that it uses: they are there whether it runs or not."""
        owned = [t for _, then, _ in self.owned.tables for t in then.values() if t is not None]
        return [*owned, *self.owned.weights, *(t for t, _ in self.inputs)]

    def result_bytes(self, state: Tensor) -> int:
        """Bytes of what the branch gave, where that may be kept in place of this state; else 0."""
        if not self.narrow:
            return 0
        assert self.fingerprint is not None
        return state.numel() * self.fingerprint.dtype.itemsize

    def intact_result(self, chain: Chain) -> Tensor:
        """What the branch gave, where that is kept.

        Raises:
            ReconstructionError: it was written to.
        """
        assert self.result is not None
        value, version = self.result
        if version_of(value) != version:
            got = "the result of its branch was modified in place"
            raise self.fault(chain, got, "no in-place write before backward")
        return value

    def fault(self, chain: Chain, got: str, expected: str) -> ReconstructionError:
        """The error that says what a recompute of this unit found changed."""
        return fault(self.unit, chain, got, expected)


@dataclass(slots=True)
class MoveRecord:
    """A step between two units (`revwire.couplings.base.Move`): (z_k, y_{k+1}) became (y_{k+1}, z_{k+1})."""

    move: Move
    bits: Tensor | None

    def undo(self, streams: Streams, previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        """The states before it, from those after it."""
        y = streams.read(previous)
        return streams.unstep(current, y, self.move.value(y), self.move.rule, self.bits).state, previous


@dataclass(slots=True)
class ViewRecord:
    """A relayout of the stream between two units (a reshape or a permutation): undone without arithmetic.

    One that must copy (a reshape after a permutation) keeps the order of the elements; see `aliasing.is_view`.
    """

    view: Callable[[Tensor], Tensor]
    before: Tensor  # a meta tensor with the layout before the view

    def undo(self, _: Streams, previous: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        """The states before the view, from those behind it."""
        return self._undone(previous), self._undone(current)

    def _undone(self, state: Tensor) -> Tensor:
        shape, strides = self.before.shape, self.before.stride()
        out = torch.empty_strided(
            shape, strides, dtype=state.dtype, device=state.device
        )  # `empty_like` knows no stride of a size of 1
        moved = self.view(out)
        if is_whole_view(moved, out):
            moved.copy_(state)
        else:
            out.copy_(state.reshape(out.shape))
        return out


def is_whole_view(moved: Tensor, x: Tensor) -> bool:
    """Whether ``moved`` is all of ``x``, in the same memory."""
    return moved.numel() == x.numel() and moved.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
