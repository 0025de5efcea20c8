"""The tape: what one forward pass through a chain keeps, so that a backward pass can rebuild the rest.

Note [Who owns what]
    Graph nodes own the tape; the tape owns states, kept bits and *detached* extra inputs, and never a tensor with a
    ``grad_fn``: a cycle through autograd's C++ nodes would never be collected. The float tensors that carry gradients
    from unit to unit hang on the unit's output (`revwire._runtime.links.Link`), and die with it.

Note [The last unit]
    A backward pass begins with the last unit. Where that chain is the last of its model (``Chain.keeps_last``),
    rebuilding the unit's activations first thing saves no memory at the peak, so autograd keeps them, and the tape ends
    before it, with the states (x_{K-2}, x_{K-1}). One forward at a time does so: those that wait for their backward
    meanwhile (the clips of a long video) keep two streams only. So do those inside of other saved-tensor hooks, whose
    owners (activation checkpointing) expect the same tensors in every run.

Note [Stored units]
    Any other unit may keep its activations too (``Chain.stores``, by a memory budget), in every forward. A backward
    pass goes past a run of such units by the true states before it, which stand among the records; where the chain ends
    in one, the tape ends before it.

Note [Results in 16 bits]
    Under autocast, and in networks of 16-bit weights, a branch gives half as many bits as a state has. There a
    checkpointed unit keeps that result instead of x_{k-1}, and its few bits: from both x_{k-1} is made again to the
    bit, before the recompute, which stops early just as well. It costs half of what checkpointing keeps for a stream in
    32 bits, and one step of the streams.

Note [Chunks]
    A unit whose branch treats the samples (or the tokens) each by itself may run in chunks (``Chain.cuts``): each has a
    record, a branch and a step of its own, so that a backward pass rebuilds, and holds, the activations of one chunk at
    a time. The states change for all of them at once: in forward when the last chunk is there (`Tape.join`), in
    backward when the first one is (`Rewind`). Autograd runs the nodes that were made last first, so it goes through the
    chunks from the last to the first, and finishes each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from revwire._errors import ReconstructionError
from revwire._runtime.chain import Kept
from revwire._runtime.chunks import SharedDraws, joined, parts_of
from revwire._runtime.entries import Anchor, Before, Result, UnitRecord, ViewRecord
from revwire._runtime.observer import Key
from revwire._runtime.range import RangeCheck, magnitude
from revwire._runtime.saving import Evaluation, evaluated_as_is, recorded
from revwire._runtime.unit import evaluate
from revwire._streams.base import Stepped, Streams
from revwire._streams.floats import FloatStreams
from revwire._streams.samples import Fingerprint
from revwire._surroundings.inventory import version_of
from revwire._surroundings.modes import saved_tensors_hooked, stalls
from revwire.couplings.base import PLAIN, Rule

if TYPE_CHECKING:
    from revwire._runtime.chain import Chain
    from revwire._runtime.chunks import Chunk, Cut
    from revwire._runtime.unit import Unit


Unpacker = Callable[["Tape", int], Callable[[int], Tensor]]
"""Makes the hook that gives back what the branch of an entry saved."""


class Tape:
    """One forward pass through one chain, and what a backward pass needs of it.

    Args:
        chain: the chain: what is wanted of this pass.
        streams: the arithmetic, scaled for this forward.
        state: the states (x_{k-1}, x_k) with which it begins.
        position: index of the unit at which this pass enters the chain.
        keep: whether gradients are recorded (else, ``no_grad``, it is the plain loop and nothing is kept).
        plain: whether the units run as in the original network, with ordinary autograd (`Coupling.plain_in_eval`).
    """

    def __init__(
        self,
        chain: Chain,
        streams: Streams,
        state: tuple[Tensor, Tensor],
        *,
        position: int,
        keep: bool,
        unpacker: Unpacker,
        plain: bool = False,
    ) -> None:
        self.chain = chain
        self.streams = streams
        self.state: tuple[Tensor, Tensor] | None = state
        self.versions = _versions(state)
        self.position = position
        self.progress = 0  # units and views so far: tells the newest output from older ones
        self.keep = keep
        self.plain = plain
        self.rewinds = keep and not chain.stored and not plain
        self.couplings = chain.couplings  # those of this forward, whatever is set later
        self.now = PLAIN["residual"]  # the rule of the unit that runs now
        self.records: list[UnitRecord | ViewRecord | Anchor | None] = []
        self.start: int | None = None  # the first record that a backward pass can reach
        self.passes: dict[int, Any] = {}  # backward passes, which know this tape; it does not know them
        self.unpacker = unpacker
        self.deferred = stalls(state[0].device)  # see Note [Synchronisation] in `range`
        self.range = RangeCheck(chain.name, chain.reach, streams.bound, deferred=self.deferred)
        self.kept: Kept | None = None  # the activations of the unit that runs now stay; see Note [The last unit]
        self.left = False  # it ends where a value left the range; see Note [Out of range] in `range`
        self._open: UnitRecord | None = None
        self._chunk: Chunk | None = None  # that runs now; see Note [Chunks]
        self._parts: list[Tensor] = []  # of the state x_{k+1}, from the chunks so far
        self._whole = self.now  # the rule of all chunks

    def _rule(self, unit: Unit, place: int, x: Tensor) -> Rule:
        """The coefficients by which the unit's own value enters the step."""
        return PLAIN[unit.kind] if self.plain else self.couplings[place].rule(unit.kind, x)

    def shares(self, unit: Unit) -> bool:
        """Whether the gradient that the next step gives x_{k-1} is made of that of its branch."""
        place = unit.place(self.position)
        return not self.plain and place is not None and self.couplings[place].shares

    def key(self, position: int) -> Key:
        """By which observers know the record at ``position`` again."""
        return id(self), position

    # -- forward ---------------------------------------------------------------------------------------------------

    def branch(
        self, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], chunks: tuple[Chunk, ...] = ()
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Evaluate F_k(x_k); if the tape can be rewound, with placeholders for what autograd saves."""
        _, current = self.intact_state()
        place = unit.place(self.position)
        assert place is not None  # else the unit had begun a tape of its own
        self.now = self._rule(unit, place, current)
        if not self.rewinds:
            return self._evaluate(unit, host, x, extras, chunks)
        self.kept = None
        if self._keeps(place):
            return evaluated_as_is(self.chain, unit, host, x, extras)
        return self._recorded(unit, place, host, x, extras)

    def _recorded(
        self, unit: Unit, place: int, host: nn.Module, x: Tensor, extras: tuple[Any, ...]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Evaluate the branch with placeholders for what autograd saves."""
        call = Evaluation(self.chain, self.streams, unit, place, host, self.now, self._chunk, x, extras)
        record, f, sides = recorded(call, self.unpacker(self, len(self.records)))
        if self.chain.modes is not None or self.chain.observer:
            record.narrow = self._is_narrow(f, sides)
        if self.start is None and (x.requires_grad or f.requires_grad or record.saved):
            self.start = len(self.records)
        self._open = record
        return f, sides

    def _is_narrow(self, f: Tensor, sides: tuple[Any, ...]) -> bool:
        """Whether what a branch gave may be kept instead of a state, and takes less; side outputs may share its
        memory.
        """
        state = self.intact_state()[0]
        return (
            bool(self.streams.witnesses) and not sides and type(f) is Tensor and f.element_size() < state.element_size()
        )

    def _keeps(self, place: int) -> bool:
        """Whether autograd keeps what the unit at this place saves; see Note [The last unit] and Note [Stored
        units].
        """
        chain = self.chain
        if chain.stores(place):
            self.kept = Kept()
            return True
        if not chain.keeps_last or place != chain.length - 1 or chain.observer or saved_tensors_hooked():
            return False
        if chain.waiting is not None and chain.waiting() is not None:
            return False
        self.kept = Kept()
        chain.waiting = ref(self.kept)
        return True

    def step(self, x: Tensor, f: Tensor, unit: Unit) -> Tensor:
        """Advance both streams by one unit; returns the float value of x_{k+1}."""
        if self._chunk is not None:
            return self._step_chunk(self._chunk, x, f, unit)
        previous, current = self.intact_state()
        place = unit.place(self.position)
        assert place is not None
        anchored = self._anchored(place)
        undone = (
            self.rewinds and self.kept is None and previous is not current and (not anchored or self._by_result(place))
        )
        stepped = self.streams.step(previous, x, f, self.now, undone=undone)
        if not self.range.holds(stepped):
            stepped, anchored = self._beyond(previous, current, x, f, unit), True
            if self._open is not None:
                self._open.by_result = False
        following, out, bits, summary = stepped[:4]
        self.range.note(unit, out)
        if self.chain.observer and self.rewinds and self.kept is None:
            self.chain.observer.on_drop(self.key(len(self.records)), previous)
        if self.kept is not None:
            self.kept = None
            self._pass_over((current, following), ends=self.left or place == self.chain.length - 1)
        else:
            if self.rewinds:
                self._keep_record(bits, self._summary(previous, summary), f, previous is current, anchored)
            self._advance((current, following))
        self.position = place + 1
        return out

    # -- in chunks; see Note [Chunks] ------------------------------------------------------------------------------

    @contextmanager
    def in_chunks(self, unit: Unit) -> Iterator[None]:
        """Run one unit chunk by chunk, by `branch_on` and `step` for each, and `join`; if it fails, nothing of it
        stays.
        """
        _, current = self.intact_state()
        place = unit.place(self.position)
        assert place is not None
        records, start = len(self.records), self.start
        self.kept, self._whole = (
            Kept() if self.rewinds and self.chain.stores(place) else None,
            self._rule(unit, place, current),
        )
        try:
            yield
        except BaseException:
            del self.records[records:]
            self.start = start
            raise
        finally:
            self._chunk, self._open = None, None
            self._parts.clear()

    def branch_on(
        self, chunk: Chunk, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """As `branch`, on one chunk of x_k."""
        _, current = self.intact_state()
        place = unit.place(self.position)
        assert place is not None
        self._chunk, self.now = chunk, chunk.rule(self._whole)
        extras = self._cut(unit).extras(extras, chunk, current.shape[chunk.dim])
        if not self.rewinds or self.kept is not None:
            return evaluate(unit, host, x, extras)
        return self._recorded(unit, place, host, x, extras)

    def _step_chunk(self, chunk: Chunk, x: Tensor, f: Tensor, unit: Unit) -> Tensor:
        whole = self.intact_state()
        previous = chunk.of(whole[0])
        place = unit.place(self.position)
        assert place is not None
        anchored, begins = self._anchored(place), whole[0] is whole[1]
        rebuilt = self.rewinds and self.kept is None
        undone = rebuilt and not begins and (not anchored or self._by_result(place))
        stepped = self.streams.step(previous, x, f, self.now, undone=undone)
        if not self.range.holds(stepped):
            stepped = self._beyond(previous, chunk.of(whole[1]), x, f, unit)
        following, out, bits, summary = stepped[:4]
        self.range.note(unit, out)
        if rebuilt:
            if self.chain.observer:
                self.chain.observer.on_drop(self.key(len(self.records)), previous)
            self._keep_record(bits, self._summary(previous, summary), f, begins, anchored)
        self._parts.append(following)
        return out

    def join(self, out: Tensor, unit: Unit) -> None:
        """All chunks have been stepped, and give ``out``, the float value of x_{k+1}."""
        _, current = self.intact_state()
        place = unit.place(self.position)
        assert place is not None
        assert self._chunk is not None
        floats = isinstance(self.streams, FloatStreams)
        if self.left:
            self._keep_whole()
            state = current, current
        else:
            state = current, out.detach() if floats else joined(self._parts, self._chunk.dim, current)
        if self.kept is not None:
            self.kept = None
            self._pass_over(state, ends=self.left or place == self.chain.length - 1)
        else:
            self._advance(state)
        self.position = place + 1

    def _evaluate(
        self, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], chunks: tuple[Chunk, ...]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """F_k(x_k), whole, or without gradients chunk by chunk, where nothing will be rebuilt."""
        if not chunks:
            return evaluate(unit, host, x, extras)
        cut, found, draws = self._cut(unit), [], SharedDraws(x)
        for chunk, part in zip(chunks, parts_of(x, chunks), strict=True):
            draws.before(chunk)
            f, sides = evaluate(unit, host, part, cut.extras(extras, chunk, x.shape[chunk.dim]))
            found.append(f)
        return torch.cat(found, chunks[0].dim), sides

    def _cut(self, unit: Unit) -> Cut:
        place, cuts = unit.place(self.position), self.chain.cuts
        assert place is not None
        assert cuts is not None
        cut = cuts[place]
        assert cut is not None
        return cut

    def _pass_over(self, state: tuple[Tensor, Tensor], *, ends: bool) -> None:
        """Go on past a unit that is never rebuilt; see Note [Stored units]."""
        if self.start is not None and not self._passing:
            self.records.append(Anchor(self.intact_state(), self.versions))
        self._advance(state)
        if ends and self._passing:
            self.state, self.versions = self.records.pop()  # type: ignore[misc]
        elif ends:  # the whole chain is stored: a spent link must not keep its last states alive
            self.state = None

    @property
    def _passing(self) -> bool:
        """Whether the newest record stands for a run of units that are never rebuilt."""
        return bool(self.records) and isinstance(self.records[-1], Anchor)

    def _by_result(self, place: int) -> bool:
        """Whether the unit that has just run keeps what its branch gave; see Note [Results in 16 bits]."""
        record = self._open
        if record is None or not record.narrow or not self.chain.checkpoints(place):
            return False
        record.by_result = True
        return True

    def _summary(self, previous: Tensor, known: Tensor | None) -> Tensor | None:
        """That of the state of x_{k-1}, where the record of the unit that has just run will be kept; empty where it is
        known anyway.
        """
        if self.start is None or self._open is None:
            return known
        if self._open.stop and not self._open.by_result:
            return previous.new_empty(0)
        return self.streams.summary(previous) if known is None else known

    def _keep_record(
        self, bits: Tensor | None, summary: Tensor | None, f: Tensor, begins: bool, anchored: bool
    ) -> None:
        record, self._open = self._open, None
        if self.start is not None and record is not None:
            assert summary is not None
            assert record.sample is not None
            record.fingerprint, record.sample = Fingerprint(summary, *record.sample), None
            record.bits, record.begins = bits, begins
            if record.by_result:
                record.result = Result.of(f)
            elif anchored and not begins:
                states = self.intact_state()
                if self.streams.witnesses:  # x_k will be rebuilt to the bit
                    record.before = Before(states[0], self.versions[0])
                else:
                    record.anchor = Anchor(states, self.versions)
            self.records.append(record)
        else:
            self.records.append(None)

    def relayout(self, view: Callable[[Tensor], Tensor]) -> bool:
        """Apply a view, or a copy to another layout, to both streams; False (and nothing done) if it shows only a
        part.
        """
        previous, current = self.intact_state()
        moved = view(previous), view(current)
        if moved[0].numel() != previous.numel() or moved[1].numel() != current.numel():
            return False
        if self.rewinds and not self._passing:
            self.records.append(
                ViewRecord(view, torch.empty_like(current, device="meta")) if self.start is not None else None
            )
        self._advance(moved)
        return True

    def _advance(self, state: tuple[Tensor, Tensor]) -> None:
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
            raise self.written()
        return self.state

    def written(self) -> ReconstructionError:
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

    def _anchored(self, place: int) -> bool:
        return not self.streams.rebuilds or self.chain.anchored(place)

    def _beyond(self, previous: Tensor, current: Tensor, x: Tensor, f: Tensor, unit: Unit) -> Stepped:
        """A step whose values leave the range: no state, but the float value; the tape ends with it."""
        out = FloatStreams().step(self.streams.read(previous), x, f, self.now).value
        self.range.leave(unit, magnitude(out))
        self.left = True
        return Stepped(current, out, None)

    def _keep_whole(self) -> None:
        """Nothing of the unit that has run in chunks can come back from its result: each keeps x_{k-1}."""
        states = self.intact_state()
        for record in self.records[len(self.records) - len(self._parts) :]:
            if isinstance(record, UnitRecord):
                record.by_result, record.result, record.bits = False, None, None
                record.before = None if record.begins else Before(states[0], self.versions[0])


def _versions(state: tuple[Tensor, Tensor]) -> tuple[int, int]:
    a, b = state
    try:
        return a._version, b._version
    except RuntimeError:  # inference tensors
        return version_of(a), version_of(b)
