"""What may look on while a chain runs. It is told of moments, and handed what there is to know of each: it never sees a
tape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from revwire._runtime.unit import Unit
from revwire._streams.base import Streams
from revwire.couplings.base import Coupling, Move

Key = tuple[int, int]
"""Tells a run of a unit, or of its chunk, from all others that wait for their backward pass."""


class Inputs(NamedTuple):
    """What a unit is about to run on.

    Attributes:
        chain: to which it belongs, to be told from others.
        x: the stream tensor that its host was given.
    """

    chain: object
    unit: Unit
    host: nn.Module
    x: Tensor
    extras: tuple[Any, ...]


class Outcome(NamedTuple):
    """What a unit gave.

    Attributes:
        chain: to which it belongs, to be told from others.
        place: at which it ran; a unit may have several.
        coupling, streams: by which its step was made.
        out: the stream tensor that it hands on.
    """

    chain: object
    place: int
    coupling: Coupling
    streams: Streams
    out: Tensor


class Rebuilt(NamedTuple):
    """What a backward pass has rebuilt of a unit, or of its chunk.

    Attributes:
        key: as in forward.
        path: the unit's.
        streams: by which the state is read.
        state: x_{k-1}.
        saved: what the recompute of the branch has saved.
        standing: weights, buffers and extra inputs, which are there whether it runs or not.
        result_bytes: of what the branch gave, where that may be kept in place of a state; else 0.
    """

    key: Key
    path: str
    streams: Streams
    state: Tensor
    saved: Sequence[Tensor]
    standing: Sequence[Tensor]
    result_bytes: int


class Observer:
    """Looks on while a chain runs. Here no method does anything: an observer has those for which it cares."""

    def wants_branch(self, chain: object, place: int) -> bool:
        """Whether it calls the branch of the unit at a place before that runs, so that this must be known then."""
        return False

    def passes(self, chain: object, place: int) -> bool:
        """Whether it has no need of that unit: where it needs none of a host, that runs as it was written."""
        return False

    def on_enter(self, chain: object, unit: Unit) -> None:
        """A unit is called; its streams may have to be made first."""

    def on_inputs(self, inputs: Inputs) -> None:
        """Its streams are there, and it is about to run."""

    def on_branch(self, x: Tensor, standing: Sequence[Tensor]) -> Callable[[Tensor], None] | None:
        """Its branch is about to run on ``x`` and what is `standing <Rebuilt>`, with placeholders for what it saves.

        Returns:
            What is to see each tensor that it saves, if anything. Autograd keeps that as long as the placeholders: it
            must own no graph.
        """

    def on_step(self) -> None:
        """Its branch has run, or a chunk of it, and the step to the next state begins."""

    def on_drop(self, key: Key, state: Tensor) -> None:
        """It has run, or a chunk of it, and its state x_{k-1} is dropped."""

    def on_move(self, chain: object, place: int, y: Tensor, z: Tensor) -> Move | None:
        """The state ``y`` has come of the unit at this place, whose branch saw ``z``.

        Returns:
            What is to move the point of the next branch; None: what the coupling says.
        """
        return None

    def on_leave(self, outcome: Outcome) -> None:
        """It hands on what it gave."""

    def on_complete(self, key: Key) -> None:
        """In backward: a recompute has saved all that its gradient needs."""

    def on_rebuild(self, rebuilt: Rebuilt) -> None:
        """In backward: its state is there again."""

    def on_undo(self, key: Key) -> None:
        """In backward: nothing is left of that but what its gradient needs."""
