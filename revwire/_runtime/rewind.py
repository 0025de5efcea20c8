"""One backward pass through a tape: it walks the state back, unit by unit, and refills what branches saved.

Note [Which backward is this]
    A tape serves several backward passes (``retain_graph``, threads). Autograd gives each an id; each walks back on its
    own from the end of the tape. A pass that does not retain the graph takes the end state away with it and frees
    records as it goes; what it did not reach, it leaves to the next one. When it is over, `Rewind.finish` runs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from revwire._errors import ReconstructionError, UnsupportedTransformError
from revwire._runtime.autograd_graph import NO_PASS, recording_nothing, running_pass
from revwire._runtime.cells import Source
from revwire._runtime.checks import Checks
from revwire._runtime.chunks import joined
from revwire._runtime.endings import Ending
from revwire._runtime.entries import Anchor, MoveRecord, UnitRecord, ViewRecord
from revwire._runtime.observer import Rebuilt
from revwire._runtime.recompute import Again, evaluated_again
from revwire._runtime.tape import Tape
from revwire._torch import current_graph_task_keeps_graph


class Rewind:
    """One backward pass through ``tape``, standing between two records.

    Attributes:
        position: the number of records that lie before it.
        previous, current: the states (x_{k-1}, x_k) there.
        cache: what the branch of the record at ``position`` saved, until asked for, with version counters.
    """

    def __init__(self, tape: Tape, task: int) -> None:
        if task == NO_PASS or not tape.range.late:  # else it is read when the pass ends
            tape.range.settle()
        self.tape = tape
        self.task = task
        self.retained = task == NO_PASS or bool(current_graph_task_keeps_graph())
        self.previous: Tensor
        self.current: Tensor | None  # None while a unit is rebuilt that needs no x_{k+1}
        self.previous, self.current = tape.intact_state()
        self.position = len(tape.records)
        self.cache: dict[int, tuple[Tensor, int]] = {}
        self.checks = Checks(tape.chain, tape.streams, deferred=tape.deferred, range=tape.range)
        self.parts: list[tuple[Tensor, Tensor]] = []  # (x_{k-1}, x_k) of the chunks so far, from the last to the newest
        if not self.retained:
            tape.state = None

    @classmethod
    def of(cls, tape: Tape) -> Rewind:
        """The backward pass that is running, as far as ``tape`` is concerned."""
        task = running_pass()
        found = tape.passes.get(task)
        if found is None:
            found = cls(tape, task)
            if task != NO_PASS:  # else somebody looks at a graph by hand: nothing is kept
                tape.passes[task] = found
                Ending.of(task).add(found.checks, found.finish)
        return found

    def finish(self) -> None:
        """At the end of the pass: free what it held. Then its deferred comparisons are read."""
        self.tape.passes.pop(self.task, None)
        self.cache.clear()
        if not self.retained and not self.parts and self.current is not None:  # else nothing is left to go on from
            self.tape.shorten(self.position, (self.previous, self.current))

    def let_go(self) -> None:
        """The walk is over, and all gradients behind it are there: free the states before the pass ends."""
        start = self.tape.start
        if start is not None and self.position <= start and not (self.retained or self.parts):
            self.previous, self.current = self.previous.new_empty(0), None
            self.cache.clear()
            self.tape.records.clear()

    # -- walking ---------------------------------------------------------------------------------------------------

    def undo(self, position: int) -> None:
        """Stand before the unit at ``position``; what its branch saved is then in the cache."""
        if position == self.position:
            return
        if position > self.position or position >= len(self.tape.records):
            self._start_over(position)
        if torch.is_grad_enabled() and self.task != NO_PASS:
            raise UnsupportedTransformError(
                f"{self.tape.chain.name}: got create_graph=True (a double backward); expected a first-order backward; "
                "compute it inside `with revwire.stored_activations(model):`, or on `revwire.revert(model)`"
            )
        with recording_nothing():
            try:
                while self.position > position:
                    self._step_back()
            except ReconstructionError:
                self.tape.range.settle()  # what left the range cannot be found again
                raise

    def saved(self, position: int, index: int) -> Tensor:
        """The tensor that the branch of the unit at ``position`` saved as its ``index``-th."""
        self.undo(position)
        if index not in self.cache:  # asked for a second time
            record = _unit_at(self.tape, position)
            with recording_nothing():
                previous, current = self._before(record)
                self.checks.compare(record, previous, self._evaluated(position, record, current))
        tensor, version = self.cache.pop(index)
        if tensor._version != version:
            raise _unit_at(self.tape, position).fault(
                self.tape.chain,
                "a tensor needed for its gradient was modified by an in-place operation",
                "no such operation",
            )
        return tensor

    def _start_over(self, position: int) -> None:
        if not self.retained or position >= len(self.tape.records):
            raise ReconstructionError(
                f"{self.tape.chain.name}: got a backward through a unit whose record was freed; pass retain_graph=True "
                "to the first backward through it"
            )
        self.previous, self.current = self.tape.intact_state()
        self.position = len(self.tape.records)
        self.cache.clear()
        self.parts.clear()

    def _step_back(self) -> None:
        position, records = self.position - 1, self.tape.records
        record = records[position]
        if isinstance(record, (ViewRecord, MoveRecord)):
            self.previous, self.current = record.undo(self.tape.streams, self.previous, self._now())
        elif isinstance(record, Anchor):  # past a run of stored units
            self.previous, self.current = self.tape.anchored(record)
        else:
            self._undo_unit(position, _unit_at(self.tape, position))
            if self.tape.chain.observer:
                self.tape.chain.observer.on_undo(self.tape.key(position))
        self.position = position
        if not self.retained:
            if isinstance(record, UnitRecord):
                record.bits = None
            if position + 1 < len(records):
                records[position + 1] = None

    def _now(self) -> Tensor:
        assert self.current is not None
        return self.current

    def _undo_unit(self, position: int, record: UnitRecord) -> None:
        """Rebuild x_{k-1}, or a chunk of it; with the first chunk, the states change."""
        chunk = record.chunk
        anchor = None if record.anchor is None else self.tape.anchored(record.anchor)
        whole = self.previous if anchor is None else anchor[1]
        current = whole if chunk is None else chunk.of(whole)
        before = self.tape.kept_state(record.before) if anchor is None else anchor[0]
        rebuilt, summary, again = self._rebuilt(position, record, current, before)
        if self.tape.chain.observer:
            self.tape.chain.observer.on_rebuild(_told(self.tape, position, record, rebuilt, again))
        self.checks.compare(record, rebuilt, again, summary)
        if chunk is None:
            self.previous, self.current = rebuilt, current
            return
        self.parts.append((rebuilt, current))
        if chunk.first:
            parts = [part for part, _ in reversed(self.parts)]
            self.parts.clear()
            if before is None:
                before = whole if record.begins else joined(parts, chunk.dim, whole)
            self.previous, self.current = before, whole

    def _rebuilt(
        self, position: int, record: UnitRecord, current: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Again]:
        """x_{k-1}, or a chunk of it, from x_k and the recompute, unless it is kept: (the state, its summary if known,
        the recompute).
        """
        chunk = record.chunk
        if record.by_result:
            rebuilt, summary = self._from_result(record, current)
            if chunk is None:
                self._spend_following()
            return rebuilt, summary, self._evaluated(position, record, current)
        if before is not None:
            self._spend_following()
        again = self._evaluated(position, record, current)
        if record.begins:
            return current, None, again
        if before is not None:
            return before if chunk is None else chunk.of(before), None, again
        assert again.f is not None
        following = self._now() if chunk is None else chunk.of(self._now())
        x = current if again.x is None else again.x
        undone = self.tape.streams.unstep(following, x, again.f, record.rule, record.bits)
        return undone.state, undone.summary, again

    def _spend_following(self) -> None:
        """x_{k+1} has served: let it go before the branch runs."""
        if not self.retained:
            self.current = None

    def _from_result(self, record: UnitRecord, current: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_{k-1}, or a chunk of it, and its summary, by the kept result of the branch; see Note [Results in 16 bits]
        in `unit_run`.
        """
        value = record.intact_result(self.tape.chain)
        following = self._now() if record.chunk is None else record.chunk.of(self._now())
        if not self.retained:
            record.result = None
        return self.tape.streams.unstep(following, current, value, record.rule, record.bits)

    def _before(self, record: UnitRecord) -> tuple[Tensor, Tensor]:
        """The states (x_{k-1}, x_k) that a unit, or its chunk, begins with; the walk stands before it."""
        if record.chunk is None:
            return self.previous, self._now()
        return self.parts[-1] if self.parts else (record.chunk.of(self.previous), record.chunk.of(self._now()))

    def _evaluated(self, position: int, record: UnitRecord, state: Tensor) -> Again:
        """The branch of a unit, or of its chunk, on the state x_k again; what it saves is in the cache then."""
        chain = self.tape.chain
        complete = partial(chain.observer.on_complete, self.tape.key(position)) if chain.observer else None
        again = evaluated_again(chain, self.tape.streams, record, state, complete, deferred=self.tape.deferred)
        self.cache = again.saved
        if not self.retained:
            record.products = None
        return again


def _unit_at(tape: Tape, position: int) -> UnitRecord:
    record = tape.records[position]
    assert isinstance(record, UnitRecord)
    return record


def _told(tape: Tape, position: int, record: UnitRecord, state: Tensor, again: Again) -> Rebuilt:
    """What an observer is told when a state is there again."""
    saved = [t for t, _ in again.saved.values()]
    key, path = tape.key(position), record.unit.path
    return Rebuilt(key, path, tape.streams, state, saved, record.standing, record.result_bytes(state))


def source_of(tape: Tape, position: int) -> Source:
    """What gives the tensors that the branch of the unit at ``position`` saved."""
    return Source(tape.passes, position, lambda number: Rewind.of(tape).saved(position, number))
