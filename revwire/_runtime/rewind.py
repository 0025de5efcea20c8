"""One backward pass through a tape: it walks the state back, unit by unit, and refills what branches saved.

Note [Which backward is this]
    A tape serves several backward passes (``retain_graph``, threads). Autograd gives each an id; each walks back on its
    own from the end of the tape. A pass that does not retain the graph takes the end state away with it and frees
    records as it goes; what it did not reach, it leaves to the next one. PyTorch runs `Rewind.finish` when it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revwire._errors import ReconstructionError, UnsupportedTransformError
from revwire._runtime.autograd_graph import _NO_PASS, _is_checkpointed, recording_nothing, running_pass
from revwire._runtime.chunks import joined
from revwire._runtime.entries import Anchor, Before, UnitRecord, ViewRecord
from revwire._runtime.recompute import (
    _OTHER_CALLS,
    _Again,
    _CheckpointWatch,
    _Enough,
    _modules_as_found,
    _name,
    _never,
    _UntilEnough,
    branch_again,
)
from revwire._runtime.tape import Tape
from revwire._streams.samples import Fingerprint, glance, same_glances
from revwire._surroundings.inventory import version_of, versions_of
from revwire._surroundings.modes import NOTHING
from revwire._surroundings.weights import lent


class Rewind:
    """One backward pass through ``tape``, standing between two records.

    Attributes:
        position: the number of records that lie before it.
        previous, current: the states (x_{k-1}, x_k) there.
        cache: what the branch of the record at ``position`` saved, until asked for, with version counters.
    """

    def __init__(self, tape: Tape, task: int) -> None:
        tape.settle_range()
        self.tape = tape
        self.task = task
        self.retained = task == _NO_PASS or bool(torch._C._autograd._get_current_graph_task_keep_graph())
        self.previous: Tensor
        self.current: Tensor | None  # None while a unit is rebuilt that needs no x_{k+1}
        self.previous, self.current = tape.intact_state()
        self.position = len(tape.records)
        self.cache: dict[int, tuple[Tensor, int]] = {}
        self.pending: list[tuple[UnitRecord, Fingerprint, Tensor]] = []
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
            if task != _NO_PASS:  # else somebody looks at a graph by hand: nothing is kept
                tape.passes[task] = found
                torch.autograd.Variable._execution_engine.queue_callback(found.finish)
        return found

    def finish(self) -> None:
        """At the end of the pass: free what it held, and read the deferred comparisons.

        Raises:
            ReconstructionError: a deferred comparison failed.
        """
        self.tape.passes.pop(self.task, None)
        self.cache.clear()
        if (
            not self.retained and not self.parts and self.current is not None
        ):  # else it failed, and nothing is left to go on from
            self.tape.shorten(self.position, (self.previous, self.current))
        if self.pending:
            for (record, after, _), values in zip(
                self.pending, torch.stack([d for _, _, d in self.pending]).tolist(), strict=True
            ):
                self._judge(record, after, values)

    # -- walking ---------------------------------------------------------------------------------------------------

    def undo(self, position: int) -> None:
        """Stand before the unit at ``position``; what its branch saved is then in the cache."""
        if position == self.position:
            return
        if position > self.position or position >= len(self.tape.records):
            self._start_over(position)
        if torch.is_grad_enabled() and self.task != _NO_PASS:
            raise UnsupportedTransformError(
                f"{self.tape.chain.name}: got create_graph=True (a double backward); expected a first-order "
                "backward; compute it "
                "inside `with revwire.stored_activations(model):`, or on `revwire.revert(model)`"
            )
        with recording_nothing():
            while self.position > position:
                self._step_back()

    def saved(self, position: int, index: int) -> Tensor:
        """The tensor that the branch of the unit at ``position`` saved as its ``index``-th."""
        self.undo(position)
        if index not in self.cache:  # asked for a second time
            record = self._unit(position)
            with recording_nothing():
                previous, current = self._before(record)
                self._compare(record, previous, self._evaluated(position, record, current))
        tensor, version = self.cache.pop(index)
        if tensor._version != version:
            raise self._unit(position).fault(
                self.tape.chain,
                "a tensor needed for its gradient was modified by an in-place operation",
                "no such operation",
            )
        return tensor

    def _start_over(self, position: int) -> None:
        if not self.retained or position >= len(self.tape.records):
            raise ReconstructionError(
                f"{self.tape.chain.name}: got a backward through a unit whose record was freed; pass "
                "retain_graph=True to the first "
                "backward through it"
            )
        self.previous, self.current = self.tape.intact_state()
        self.position = len(self.tape.records)
        self.cache.clear()
        self.parts.clear()

    def _step_back(self) -> None:
        position, records = self.position - 1, self.tape.records
        record = records[position]
        if isinstance(record, ViewRecord):
            self.previous, self.current = record.undo(self.previous), record.undo(self._now())
        elif isinstance(record, Anchor):  # past a run of stored units
            self.previous, self.current = self._anchored(record)
        else:
            self._undo_unit(position, self._unit(position))
            if self.tape.chain.meter:
                self.tape.chain.meter.undone(self.tape, position)
        self.position = position
        if not self.retained:
            if isinstance(record, UnitRecord):
                record.bits = None
            if position + 1 < len(records):
                records[position + 1] = None

    def _now(self) -> Tensor:
        assert self.current is not None
        return self.current

    def _anchored(self, anchor: Anchor) -> tuple[Tensor, Tensor]:
        if tuple(map(version_of, anchor.states)) != anchor.versions:
            raise self.tape.written()
        return anchor.states

    def _kept(self, before: Before | None) -> Tensor | None:
        if before is not None and version_of(before.state) != before.version:
            raise self.tape.written()
        return None if before is None else before.state

    def _undo_unit(self, position: int, record: UnitRecord) -> None:
        """Rebuild x_{k-1}, or a chunk of it; with the first chunk, the states change."""
        chunk, streams = record.chunk, self.tape.streams
        anchor = None if record.anchor is None else self._anchored(record.anchor)
        whole = self.previous if anchor is None else anchor[1]
        current = whole if chunk is None else chunk.of(whole)
        before = self._kept(record.before) if anchor is None else anchor[0]
        summary = None
        if record.by_result:
            rebuilt, summary = self._from_result(record, current)
        if (before is not None or (record.by_result and chunk is None)) and not self.retained:
            self.current = None  # x_{k+1} has served
        again = self._evaluated(position, record, current)
        if record.by_result:
            pass
        elif record.begins:
            rebuilt = current
        elif before is not None:
            rebuilt = before if chunk is None else chunk.of(before)
        else:
            assert again.f is not None
            following = self._now() if chunk is None else chunk.of(self._now())
            rebuilt, summary = streams.unstep(following, again.x, again.f, record.rule, record.bits)
        if self.tape.chain.monitor:
            self.tape.chain.monitor.backward(self.tape, position, rebuilt)
        self._compare(record, rebuilt, again, summary)
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

    def _from_result(self, record: UnitRecord, current: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_{k-1}, or a chunk of it, and its summary, by the kept result of the branch; see Note [Results in 16 bits]
        in `_tape`.
        """
        assert record.result is not None
        value, version = record.result
        if version_of(value) != version:
            raise self._fault(
                record, "the result of its branch was modified in place", "no in-place write before backward"
            )
        following = self._now() if record.chunk is None else record.chunk.of(self._now())
        if not self.retained:
            record.result = None
        return self.tape.streams.unstep(following, self.tape.streams.read(current), value, record.rule, record.bits)

    def _before(self, record: UnitRecord) -> tuple[Tensor, Tensor]:
        """The states (x_{k-1}, x_k) that a unit, or its chunk, begins with; the walk stands before it."""
        if record.chunk is None:
            return self.previous, self._now()
        return self.parts[-1] if self.parts else (record.chunk.of(self.previous), record.chunk.of(self._now()))

    def _unit(self, position: int) -> UnitRecord:
        record = self.tape.records[position]
        assert isinstance(record, UnitRecord)
        return record

    # -- recomputing -----------------------------------------------------------------------------------------------

    def _evaluated(self, position: int, record: UnitRecord, state: Tensor) -> _Again:
        """The branch on the state x_k again, as far as that is needed; where what it saved seems to differ, to its
        end.
        """
        again = self._recompute(position, record, state)
        if again.f is None and record.stop and not same_glances(record.stop.looks, again.looks):
            self.tape.chain.run_whole.add(record.unit.path)
            record.products = None
            again = self._recompute(position, record, state, whole=True)
        return again

    def _recompute(self, position: int, record: UnitRecord, state: Tensor, *, whole: bool = False) -> _Again:
        """Evaluate the branch again, as in forward, on the state x_k, as far as it is needed, or all of it; fills the
        cache.
        """
        self._check_versions(record)
        wide = self.tape.streams.read(state)
        x = (wide if wide.dtype == record.dtype else wide.to(record.dtype)).detach()
        if record.input_requires_grad:
            x.requires_grad_()
        version = x._version
        cache: dict[int, tuple[Tensor, int]] = {}
        saved, meter, until = record.saved, self.tape.chain.meter, _UntilEnough()
        looks, stop = list[Tensor](), None if whole else record.stop
        looked = {*stop.looked} if stop else ()

        def pack(t: Tensor) -> None:
            if until.enough:  # a handler in the branch took it for a fault, and goes on
                raise _Enough
            index, meta = len(cache), (t.shape, t.dtype, t.device)
            if index >= len(saved) or saved[index] != meta:
                raise self._fault(
                    record, f"its recompute saved another tensor at {index}: {meta}", "the same as in forward"
                )
            cache[index] = (t.detach(), t._version)
            if index in looked and (found := glance(t)) is not None:
                looks.append(found)
            if len(cache) == len(saved):
                if meter:
                    meter.complete(self.tape, position)
                if stop and not gone:
                    until.enough = True
                    raise _Enough

        gone = lent(record.owned.tables, self.tape.chain.homes)
        watch = _CheckpointWatch() if gone else None
        f: Tensor | None = None
        products = record.products.recalled(partial(self._fault, record, *_OTHER_CALLS)) if record.products else NOTHING
        hooks = saved_tensors_hooks(pack, _never)
        with until, record.surroundings.restored(), _modules_as_found(record, gone), hooks, watch or NOTHING, products:
            f = branch_again(record, x)
        if x._version != version:
            raise self._fault(
                record, "its branch wrote to its own input in place", "a branch that leaves its input as it is"
            )
        if len(cache) != len(record.saved):
            raise self._fault(record, f"its recompute saved {len(cache)} tensors", f"{len(record.saved)} as in forward")
        if watch is not None and (watch.found or (f is not None and _is_checkpointed(f))):
            raise self._fault(
                record,
                "the weights that torch.func.functional_call lent it were taken back, and a torch.utils.checkpoint "
                "inside of it would run "
                "again without them",
                "no checkpointing inside of this branch",
            )
        self.cache = cache
        if not self.retained:
            record.products = None
        return _Again(
            wide,
            None if f is None or until.enough else f.detach(),
            [cache[number][0] for number in record.witnesses],
            looks,
        )

    def _check_versions(self, record: UnitRecord) -> None:
        for tensor, version in record.inputs:
            if tensor._version != version:
                raise self._fault(
                    record, "an extra input of it was modified in place", "no in-place write before backward"
                )
        if record.products and not record.products.intact:
            raise self._fault(
                record, "the result of a product in it was modified in place", "no in-place write before backward"
            )
        for reference, version in record.stop.constants if record.stop else ():
            constant = reference()
            if constant is not None and constant._version != version:
                raise self._fault(
                    record, "a constant that it uses was modified in place", "no in-place write before backward"
                )
        owned = record.owned
        now = versions_of(owned.weights)
        if now != owned.versions:
            weight = next(w for w, a, b in zip(owned.weights, owned.versions, now, strict=True) if a != b)
            raise self._fault(
                record, f"its weight {_name(record, weight)!r} was modified in place", "the weights of the forward pass"
            )

    # -- checking --------------------------------------------------------------------------------------------------

    def _compare(self, record: UnitRecord, previous: Tensor, again: _Again, summary: Tensor | None = None) -> None:
        assert record.fingerprint is not None
        if again.f is None and not record.by_result:  # it was compared
            return
        streams = self.tape.streams
        if record.stop and not record.by_result:
            summary = record.fingerprint.state
        branch = record.fingerprint[1:] if again.f is None else streams.sample(again.f, again.witnesses)
        after = Fingerprint(streams.summary(previous) if summary is None else summary, *branch)
        if self.tape.deferred:
            self.pending.append((record, after, self.tape.streams.difference(record.fingerprint, after)))
        elif not record.fingerprint.same_bits(after):
            self._judge(record, after, self.tape.streams.difference(record.fingerprint, after).tolist())

    def _judge(self, record: UnitRecord, after: Fingerprint, values: list[float]) -> None:
        assert record.fingerprint is not None
        self.tape.chain.drifted(values[0])
        whats = ("its rebuilt input differs", "its branch computed other values")
        for what, value, allowed in zip(whats, values, self.tape.streams.allowed(record.fingerprint), strict=True):
            if not value <= allowed and not self.tape.streams.hopeless(record.fingerprint, after):
                raise self._fault(
                    record, f"{what} (by {value:.3g}; {allowed:.3g} is allowed)", "the same as in the forward pass"
                )

    def _fault(self, record: UnitRecord, got: str, expected: str) -> ReconstructionError:
        return record.fault(self.tape.chain, got, expected)


def unpacker(tape: Tape, position: int) -> Callable[[int], Tensor]:
    """The hook that gives the tensors that the branch of the unit at ``position`` saved, by their numbers: recomputed
    if need be.
    """
    passes: dict[int, Rewind] = tape.passes
    running = torch._C._current_graph_task_id

    def unpack(number: int) -> Tensor:
        here = passes.get(running())
        if here is not None and here.position == position:  # as `saved` does it, in the common case
            found = here.cache.get(number)
            if found is not None and found[0]._version == found[1]:
                del here.cache[number]
                return found[0]
        return Rewind.of(tape).saved(position, number)

    return unpack
