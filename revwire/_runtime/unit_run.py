"""A unit that runs in a forward pass: its branch and its step, and what the tape keeps of them.

Note [The last unit]
    A backward pass begins with the last unit. Where that chain is the last of its model (``Chain.keeps_last``),
    rebuilding the unit's activations first thing saves no memory at the peak, so autograd keeps them, and the tape ends
    before it, with the states (x_{K-2}, x_{K-1}). One forward at a time does so: those that wait for their backward
    meanwhile (the clips of a long video) keep two streams only. So do those inside of other saved-tensor hooks, whose
    owners (activation checkpointing) expect the same tensors in every run.

Note [Results in 16 bits]
    Under autocast, and in networks of 16-bit weights, a branch gives half as many bits as a state has. There a
    checkpointed unit keeps that result instead of x_{k-1}, and its few bits: from both x_{k-1} is made again to the
    bit, before the recompute, which stops early just as well. It costs half of what checkpointing keeps for a stream in
    32 bits, and one step of the streams.

Note [Chunks]
    A unit whose branch treats the samples (or the tokens) each by itself may run in chunks (``Chain.cuts``): each has a
    record, a branch and a step of its own, so that a backward pass rebuilds, and holds, the activations of one chunk at
    a time. The states change for all of them at once: in forward when the last chunk is there (`UnitRun.join`), in
    backward when the first one is (`Rewind`). Autograd runs the nodes that were made last first, so it goes through the
    chunks from the last to the first, and finishes each.
    A unit that runs whole is one chunk.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from revwire._runtime.chain import Kept
from revwire._runtime.chunks import Chunk, Cut, SharedDraws, joined, parts_of
from revwire._runtime.entries import Anchor, Before, Result, UnitRecord
from revwire._runtime.saving import Evaluation, evaluated_as_is, recorded
from revwire._runtime.tape import Tape
from revwire._runtime.unit import Unit, evaluate
from revwire._streams.base import VALUE_BYTES, Stepped
from revwire._streams.floats import FloatStreams
from revwire._streams.samples import Fingerprint
from revwire._surroundings.modes import saved_tensors_hooked
from revwire.couplings.base import PLAIN, Rule


class UnitRun:
    """One unit on a tape: for each of its chunks `branch` and `step`, and `join` at the end.

    As a context, around these: if they fail, nothing of the unit stays on the tape.

    Args:
        tape: where it runs; it stands before the unit.
        host: the module whose branch it is.
        chunks: those that it runs in; none where it runs whole.

    Attributes:
        place: its place in the chain.
        rule: by which the present chunk enters the step.
        kept: lives as long as autograd keeps what the branch saves; None where it does not.
    """

    __slots__ = (
        *("tape", "unit", "host", "chunks", "place", "rule", "kept"),
        *("_whole_rule", "_chunk", "_record", "_parts", "_records", "_start"),
    )

    def __init__(self, tape: Tape, unit: Unit, host: nn.Module, chunks: tuple[Chunk, ...]) -> None:
        place = unit.place(tape.position)
        assert place is not None  # else the unit had begun a tape of its own
        self.tape, self.host, self.chunks, self.place = tape, host, chunks, place
        self.rule: Rule
        self._whole_rule: Rule
        self.become(unit)
        self.kept = self._keeps() if tape.rewinds else None
        self._chunk: Chunk | None = None
        self._record: UnitRecord | None = None
        self._parts: list[Tensor] = []  # of the state x_{k+1}

    def __enter__(self) -> None:
        self._records, self._start = len(self.tape.records), self.tape.start

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            del self.tape.records[self._records :]
            self.tape.start = self._start

    @property
    def shares(self) -> bool:
        """Whether the gradient that the step gives x_{k-1} is made of that of the branch."""
        return not self.tape.plain and self.tape.couplings[self.place].shares

    def _keeps(self) -> Kept | None:
        """Whether autograd keeps what the unit saves; see Note [The last unit], and Note [Stored units] in `tape`."""
        chain = self.tape.chain
        if chain.stores(self.place):
            return Kept()
        last = chain.keeps_last and self.place == chain.length - 1
        if not last or self.chunks or chain.observer or saved_tensors_hooked():
            return None
        if chain.waiting is not None and chain.waiting() is not None:
            return None
        kept = Kept()
        chain.waiting = ref(kept)
        return kept

    # -- its branch ------------------------------------------------------------------------------------------------

    def branch(self, chunk: Chunk | None, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """(F_k(x_k), side outputs), on a chunk of the state or on all of it; if the tape can be rewound, with
        placeholders for what autograd saves.
        """
        tape = self.tape
        self._chunk, self._record = chunk, None
        if chunk is not None:
            self.rule = chunk.rule(self._whole_rule)
            extras = self.cut.extras(extras, chunk, tape.intact_state()[1].shape[chunk.dim])
        if not tape.rewinds:
            return _evaluated(self, x, extras)
        if self.kept is not None:
            return evaluated_as_is(tape.chain, self.unit, self.host, x, extras)
        call = Evaluation(tape.chain, tape.streams, self.unit, self.place, self.host, self.rule, chunk, x, extras)
        record, f, sides = recorded(call, tape.source(tape, len(tape.records)))
        self.take(record, x, f, sides)
        return f, sides

    def take(self, record: UnitRecord, x: Tensor, f: Tensor, sides: tuple[Any, ...]) -> None:
        """The branch has run on ``x``, and gave this."""
        tape = self.tape
        if tape.chain.modes is not None or tape.chain.observer:
            record.narrow = _is_narrow(tape, f, sides)
        if tape.start is None and (x.requires_grad or f.requires_grad or record.saved):
            tape.start = len(tape.records)
        self._record = record

    def become(self, unit: Unit) -> None:
        """Run as this unit: a block, or a residual."""
        self.unit: Unit = unit
        tape, current = self.tape, self.tape.intact_state()[1]
        self.rule = PLAIN[unit.kind] if tape.plain else tape.couplings[self.place].rule(unit.kind, current)
        self._whole_rule = self.rule

    def keep(self) -> None:
        """Let autograd keep what the branch saved."""
        self.kept = Kept()

    @property
    def cut(self) -> Cut:
        """How its unit is cut."""
        cuts = self.tape.chain.cuts
        assert cuts is not None
        cut = cuts[self.place]
        assert cut is not None
        return cut

    # -- its step --------------------------------------------------------------------------------------------------

    def step(self, x: Tensor, f: Tensor, dtype: torch.dtype) -> Tensor:
        """The float value of x_{k+1}, or of its chunk, in this ``dtype`` where that is narrow; ``x`` carries x_k."""
        tape = self.tape
        if tape.chain.observer:
            tape.chain.observer.on_step()
        states = tape.intact_state()
        if x.element_size() < VALUE_BYTES:
            x = states[1] if self._chunk is None else self._chunk.of(states[1])
        previous = states[0] if self._chunk is None else self._chunk.of(states[0])
        begins = states[0] is states[1]
        rebuilt = tape.rewinds and self.kept is None
        anchored = not tape.streams.rebuilds or tape.chain.anchored(self.place)
        undone = rebuilt and not begins and (not anchored or self._by_result())
        done = tape.streams.step(previous, x, f, self.rule, undone=undone, dtype=dtype)
        if not tape.range.holds(self.unit, done):
            done = _beyond(tape, self.unit, self.rule, previous, x, f)
        if rebuilt:
            if tape.chain.observer:
                tape.chain.observer.on_drop(tape.key(len(tape.records)), previous)
            tape.records.append(self._closed(previous, f, done, begins=begins, anchored=anchored))
        self._parts.append(done.state)
        return done.value.to(dtype) if dtype.itemsize < VALUE_BYTES else done.value

    def join(self, out: Tensor) -> None:
        """All chunks have been stepped, and give ``out``, which carries x_{k+1}: the tape goes on."""
        tape = self.tape
        assert tape.state is not None
        current = tape.state[1]
        if tape.left:
            self._keep_whole()
            state = current, current
        elif self._chunk is None:
            state = current, self._parts[0]
        elif isinstance(tape.streams, FloatStreams) and out.element_size() >= VALUE_BYTES:
            state = current, out.detach()
        else:
            state = current, joined(self._parts, self._chunk.dim, current)
        if self.kept is None:
            tape.advance(state)
        else:
            tape.pass_over(state, ends=tape.left or self.place == tape.chain.length - 1)
        tape.position = self.place + 1

    def _keep_whole(self) -> None:
        """Nothing of a unit whose values left the range can come back from its result: it keeps x_{k-1}."""
        tape = self.tape
        states = tape.intact_state()
        for record in tape.records[self._records :]:
            if isinstance(record, UnitRecord):
                record.by_result, record.result, record.bits = False, None, None
                record.before = None if record.begins else Before(states[0], tape.versions[0])

    def _by_result(self) -> bool:
        """Whether the record keeps what the branch gave; see Note [Results in 16 bits]."""
        record = self._record
        if record is None or not record.narrow or not self.tape.chain.checkpoints(self.place):
            return False
        record.by_result = True
        return True

    def _closed(self, previous: Tensor, f: Tensor, done: Stepped, *, begins: bool, anchored: bool) -> UnitRecord | None:
        """The record of what has just run, complete; None where no backward pass can reach it."""
        record, tape = self._record, self.tape
        if tape.start is None or record is None:
            return None
        assert record.sample is not None
        record.fingerprint, record.sample = Fingerprint(self._summary(record, previous, done), *record.sample), None
        record.bits, record.begins = done.bits, begins
        if record.by_result:
            record.result = Result.of(f)
        elif anchored and not begins:
            states = tape.intact_state()
            if tape.streams.witnesses:  # x_k will be rebuilt to the bit
                record.before = Before(states[0], tape.versions[0])
            else:
                record.anchor = Anchor(states, tape.versions)
        return record

    def _summary(self, record: UnitRecord, previous: Tensor, done: Stepped) -> Tensor:
        """That of the state x_{k-1}; empty where the state is known anyway."""
        if record.stop and not record.by_result:
            return previous.new_empty(0)
        return self.tape.streams.summary(previous) if done.summary is None else done.summary


def _beyond(tape: Tape, unit: Unit, rule: Rule, previous: Tensor, x: Tensor, f: Tensor) -> Stepped:
    """A step whose values leave the range: no state, but the float value; the tape ends with it."""
    read = tape.streams.read
    out = FloatStreams().step(read(previous), x if x.is_floating_point() else read(x), f, rule).value
    tape.range.leave(unit, out)
    tape.left = True
    return Stepped(previous, out, None)


def _evaluated(run: UnitRun, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """F_k(x_k) where nothing will be rebuilt; without gradients the branch alone runs chunk by chunk."""
    if run.tape.keep or not run.chunks:
        return evaluate(run.unit, run.host, x, extras)
    cut, found, draws = run.cut, [], SharedDraws(x)
    for chunk, part in zip(run.chunks, parts_of(x, run.chunks), strict=True):
        draws.before(chunk)
        f, sides = evaluate(run.unit, run.host, part, cut.extras(extras, chunk, x.shape[chunk.dim]))
        found.append(f)
    return torch.cat(found, run.chunks[0].dim), sides


def _is_narrow(tape: Tape, f: Tensor, sides: tuple[Any, ...]) -> bool:
    """Whether what a branch gave may be kept instead of a state, and takes less; side outputs may share its memory."""
    if not tape.streams.witnesses or sides or type(f) is not Tensor:
        return False
    return f.element_size() < tape.intact_state()[0].element_size()
