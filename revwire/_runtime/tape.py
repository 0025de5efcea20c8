"""The tape: what one forward pass through a chain keeps, so that a backward pass can rebuild the rest.

Note [Who owns what]
    Graph nodes own the tape; the tape owns states, kept bits and *detached* extra inputs, and never a tensor with a
    ``grad_fn``: a cycle through autograd's C++ nodes would never be collected. The float tensors that carry gradients
    from unit to unit hang on the unit's output (`revwire._runtime.links.Link`), and die with it.

Note [Stored units]
    Any other unit may keep its activations too (``Chain.stores``, by a memory budget), in every forward. A backward
    pass goes past a run of such units by the true states before it, which stand among the records; where the chain ends
    in one, the tape ends before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from revwire._errors import ReconstructionError
from revwire._runtime.autograd_graph import running_pass
from revwire._runtime.cells import Source
from revwire._runtime.chain import Chain
from revwire._runtime.entries import Anchor, Before, MoveRecord, UnitRecord, ViewRecord
from revwire._runtime.observer import Key
from revwire._runtime.range import RangeCheck
from revwire._runtime.regions import HERE
from revwire._streams.base import Streams
from revwire._surroundings.inventory import version_of
from revwire._surroundings.modes import stalls

SourceOf = Callable[["Tape", int], Source]
"""Makes what gives back what the branch of an entry saved."""


class Tape:
    """One forward pass through one chain, and what a backward pass needs of it.

    Args:
        chain: the chain: what is wanted of this pass.
        streams: the arithmetic, scaled for this forward.
        state: the states (x_{k-1}, x_k) with which it begins.
        position: index of the unit at which this pass enters the chain.
        keep: whether gradients are recorded (else, ``no_grad``, it is the plain loop and nothing is kept).
        plain: whether the units run as in the original network, with ordinary autograd (`Coupling.plain_in_eval`).
        late: whether the range is read in the backward pass; see Note [Synchronisation] in `range`.
        training: the mode of the host at which this pass enters the chain.
    """

    def __init__(
        self,
        chain: Chain,
        streams: Streams,
        state: tuple[Tensor, Tensor],
        *,
        position: int,
        keep: bool,
        source: SourceOf,
        plain: bool = False,
        late: bool = False,
        training: bool = True,
    ) -> None:
        self.chain = chain
        self.streams = streams
        self.state: tuple[Tensor, Tensor] | None = state
        self.versions = _versions(state)
        self.position = position
        self.region = HERE.region
        self.born = chain, running_pass()
        self.progress = 0  # units and views so far: tells the newest output from older ones
        self.keep = keep
        self.plain = plain
        self.rewinds = keep and not chain.stored and not plain
        self.couplings = chain.couplings  # those of this forward, whatever is set later
        self.moves = not plain and self.couplings[0].move is not None  # so all of them do
        self.records: list[UnitRecord | ViewRecord | MoveRecord | Anchor | None] = []
        self.start: int | None = None  # the first record that a backward pass can reach
        self.passes: dict[int, Any] = {}  # backward passes, which know this tape; it does not know them
        self.source = source
        self.deferred = stalls(state[0].device)  # see Note [Synchronisation] in `range`
        self.range = RangeCheck(
            *(chain.name, chain.reach, streams.bound),
            keep=keep,
            deferred=self.deferred,
            late=late and streams.bound is not None,
            training=training,
        )
        self.left = False  # it ends where a value left the range; see Note [Out of range] in `range`

    def key(self, position: int) -> Key:
        """By which observers know the record at ``position`` again."""
        return id(self), position

    def pass_over(self, state: tuple[Tensor, Tensor], *, ends: bool) -> None:
        """Go on past a unit that is never rebuilt; see Note [Stored units]."""
        if self.start is not None and not self._passing:
            self.records.append(Anchor(self.intact_state(), self.versions))
        self.advance(state)
        if ends and self._passing:
            self.state, self.versions = self.records.pop()  # type: ignore[misc]
        elif ends:  # the whole chain is stored: a spent link must not keep its last states alive
            self.state = None

    @property
    def _passing(self) -> bool:
        """Whether the newest record stands for a run of units that are never rebuilt."""
        return bool(self.records) and isinstance(self.records[-1], Anchor)

    def relayout(self, view: Callable[[Tensor], Tensor]) -> bool:
        """Apply a view, or a copy to another layout, to both streams; False (and nothing done) if it shows only a
        part.
        """
        previous, current = self.intact_state()
        moved = view(previous), view(current)
        if moved[0].numel() != previous.numel() or moved[1].numel() != current.numel():
            return False
        if self.records_more:
            self.records.append(ViewRecord(view, torch.empty_like(current, device="meta")))
        self.advance(moved)
        return True

    @property
    def records_more(self) -> bool:
        """Whether a backward pass may have to undo what comes between two units now."""
        return self.rewinds and not self._passing and self.start is not None

    def advance(self, state: tuple[Tensor, Tensor]) -> None:
        """Go on to these states."""
        self.state = state
        self.versions = _versions(state)
        self.progress += 1

    def intact_state(self) -> tuple[Tensor, Tensor]:
        """The states (x_{k-1}, x_k) at the end of the tape.

        Raises:
            ReconstructionError: they were written to, or a backward pass took them.
        """
        if self.state is None:
            raise ReconstructionError(
                f"{self.chain.name}: got a second backward through a chain whose state was freed by the first (or lost "
                "by one that failed); pass retain_graph=True to the first one"
            )
        if _versions(self.state) != self.versions:
            raise self._written()
        return self.state

    def anchored(self, anchor: Anchor) -> tuple[Tensor, Tensor]:
        """The states of an anchor.

        Raises:
            ReconstructionError: they were written to.
        """
        if tuple(map(version_of, anchor.states)) != anchor.versions:
            raise self._written()
        return anchor.states

    def kept_state(self, before: Before | None) -> Tensor | None:
        """The state x_{k-1} before a unit, where that is kept.

        Raises:
            ReconstructionError: it was written to.
        """
        if before is not None and version_of(before.state) != before.version:
            raise self._written()
        return None if before is None else before.state

    def _written(self) -> ReconstructionError:
        """The error that says that somebody wrote to a state."""
        return ReconstructionError(
            f"{self.chain.name}: got a stream that was written in place after the chain gave it out; expected it "
            "unchanged; write to a clone of the chain's output, or convert with exact=True"
        )

    def shorten(self, position: int, state: tuple[Tensor, Tensor]) -> None:
        """After a backward pass that does not retain the graph: what it walked over is gone, what lies before may be
        asked for.
        """
        if self.start is not None and position > self.start:
            del self.records[position:]
            self.state, self.versions = state, _versions(state)
        else:
            self.records.clear()


def _versions(state: tuple[Tensor, Tensor]) -> tuple[int, int]:
    a, b = state
    try:
        return a._version, b._version
    except RuntimeError:  # inference tensors
        return version_of(a), version_of(b)
