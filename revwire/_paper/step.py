"""The bytes of a training step, event by event, from one run without a backward pass.

Note [A step on paper]
    Backward passes visit the events of a run in reverse. At an event there is: what the events up to it keep for their
    backward, and the gradients that wait (`Step.waiting`): one for each value whose consumers have had their turn and
    whose producer has not. A gradient that goes through a view, a sum or an alias lies in the memory of the one that it
    comes from; several gradients of one value are summed up, in place where nothing else holds the first. Gradients of
    weights are there for the moment in which they are added to ``.grad``; those of a weight that is used several times
    wait until all are summed up. Scratch memory is there while a kernel runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

from revwire._capture.recording import Event, Recording
from revwire._paper.lives import Lives
from revwire._paper.scratch import scratch_of
from revwire._structures import refs


class Bytes(NamedTuple):
    """Bytes at some time: all, and without the gradients of weights, which do not grow with the input."""

    all: int
    growing: int

    def over(self, kept: int) -> Bytes:
        """On top of so much more."""
        return Bytes(self.all + kept, self.growing + kept)

    def or_more(self, other: Bytes) -> Bytes:
        """The larger of both, each for itself."""
        return Bytes(max(self.all, other.all), max(self.growing, other.growing))


NONE = Bytes(0, 0)


class _Buffer:
    """The memory of a gradient: its bytes, and how many values hold it."""

    __slots__ = ("held", "size")

    def __init__(self, size: int) -> None:
        self.size, self.held = size, 0


class Step:
    """Bytes of a step, by event; see Note [A step on paper].

    Attributes:
        gradients: at most alive during the backward of an event, but for those of weights.
        weights: bytes of the gradients of weights that it gives or that wait, and of the scratch memory of its kernels.
        waiting: alive when the backward of an event is over, and (the last) when the backward pass begins.
        unsummed: bytes of the gradients of weights that wait then.
        passing: alive during the forward of an event, and kept by nothing.
        sizes: of each storage that is not there before the run.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.values, self.events = recording.values, recording.events
        there = {v.storage for v in self.values if v.event < 0}
        self.sizes = {s: size for s, size in recording.storages.items() if s not in there}
        self.calls = [e.number for e in self.events if not e.is_module]
        self.gradients = [0] * len(self.events)
        self.weights = [0] * len(self.events)
        self.waiting = [0] * (len(self.events) + 1)
        self.unsummed = [0] * (len(self.events) + 1)
        self._pending: dict[int, _Buffer] = {}
        self._alive = 0
        self._uses: dict[int, list[int]] = {}  # events that give a gradient to a weight, from the last
        self._scratch = scratch_of(recording)
        self._go_back()
        self.lives = Lives(recording, self.sizes)
        self.passing = self.lives.passing(range(len(self.events)))

    def keeps(self, event: int) -> Iterator[int]:
        """The storages that autograd keeps for an event, beside what is there before the run."""
        return (s for s in self.events[event].keeps if s in self.sizes)

    def height(self, event: int, kept: int) -> Bytes:
        """At most alive in the forward and the backward of an event whose forward ends with so much kept."""
        return self.backward(event, kept).or_more(NONE.over(kept + self.passing[event]))

    def backward(self, event: int, kept: int) -> Bytes:
        """At most alive in the backward of an event whose forward ends with so much kept."""
        back = kept + self.gradients[event]
        return Bytes(back + self.weights[event], back)

    def again(self, last: int, alive: int) -> Bytes:
        """Alive in a forward that is run again, up to this event, before its backward."""
        waiting = alive + self.waiting[last + 1]
        return Bytes(waiting + self.unsummed[last + 1], waiting)

    def size_of(self, value: int) -> int:
        """Bytes of a value by its own elements."""
        v = self.values[value]
        return abs(prod(v.shape)) * v.dtype.itemsize

    # -- backward --------------------------------------------------------------------------------------------------

    def _go_back(self) -> None:
        for ref in refs(self.events[0].out):
            if self.values[ref.value].wants and ref.value not in self._pending:
                self._hold(ref.value, _Buffer(self.size_of(ref.value)))
        self.waiting[-1] = self._alive
        for event in reversed(self.events):
            if not event.is_module:
                self._undo(event)
            self.waiting[event.number] = self._alive
        self._sum_up()

    def _undo(self, event: Event) -> None:
        """The backward of one event."""
        given = [v for v in self._results(event) if v in self._pending]
        self.gradients[event.number] = self._alive
        if not given:
            return
        buffers = [self._pending.pop(v) for v in given]
        wanted = self._wanted(event, given)
        shared = len(given) == 1 and _passes_on(event)
        own = [v for v in wanted if self.values[v].event < 0]
        weights = sum(map(self.size_of, own))
        for v in own:
            self._uses.setdefault(v, []).append(event.number)
        new: list[tuple[int, _Buffer]] = []
        for v in (v for v in wanted if self.values[v].event >= 0):
            same = shared and self.size_of(v) == buffers[0].size
            new.append((v, buffers[0] if same else _Buffer(self.size_of(v))))
        self._alive += sum(b.size for _, b in new if b is not buffers[0])
        self.gradients[event.number], self.weights[event.number] = (
            self._alive,
            weights + self._scratch.get(event.number, 0),
        )
        for _, buffer in new:
            buffer.held += 1
        for buffer in buffers:
            self._let_go(buffer)
        for v, buffer in new:
            buffer.held -= 1
            self._add(event, v, buffer)

    def _sum_up(self) -> None:
        """Count the gradients of weights that wait to be summed up with those of their other uses."""
        first: dict[int, int] = {}
        for v, (last, *others) in self._uses.items():
            size = self.size_of(v)
            for event in range(others[-1], last) if others else ():
                self.weights[event] += size
                self.unsummed[event + 1] += size
            for event in others[:1]:
                first[event] = max(size, first.get(event, 0))
        for event, size in first.items():  # the first sum is not in place, once the gradients of results are gone
            self.weights[event] += max(0, size - (self.gradients[event] - self.waiting[event]))

    def _results(self, event: Event) -> list[int]:
        """What an event made: what it only hands on has its gradient already."""
        taken = {r.value for r in refs((event.args, event.kwargs))}
        made = [r.value for r in refs(event.out) if r.value not in taken]
        return [*dict.fromkeys([*made, *(after for _, after in event.writes)])]

    def _wanted(self, event: Event, given: list[int]) -> list[int]:
        """The values to which an event gives a gradient."""
        before = dict(event.writes)
        inputs = dict.fromkeys(r.value for r in refs((event.args, event.kwargs)))
        return [v for v in inputs if v not in given and (self.values[v].wants or before.get(v) in given)]

    def _add(self, event: Event, value: int, buffer: _Buffer) -> None:
        """A gradient comes to a value, which may have one already."""
        there = self._pending.get(value)
        if there is None:
            self._pending[value] = buffer
            buffer.held += 1
            return
        if there is buffer:
            return
        if there.held == 1:  # summed up in place
            if buffer.held == 0:
                self._alive -= buffer.size
            return
        total = _Buffer(there.size)
        self._alive += total.size
        self.gradients[event.number] = max(self.gradients[event.number], self._alive)
        self._pending[value] = total
        total.held = 1
        self._let_go(there)
        if buffer.held == 0:
            self._alive -= buffer.size

    def _hold(self, value: int, buffer: _Buffer) -> None:
        self._pending[value] = buffer
        buffer.held += 1
        self._alive += buffer.size

    def _let_go(self, buffer: _Buffer) -> None:
        buffer.held -= 1
        if buffer.held == 0:
            self._alive -= buffer.size


def _passes_on(event: Event) -> bool:
    """Whether the gradient of the result is that of the inputs, in the same memory."""
    return event.view or event.is_addition


def inner_height(step: Step, events: Sequence[int], there: Iterable[int], *, whole: bool) -> Bytes:
    """At most alive in the backward of some events that have to run again first, beyond what is there; the ``whole`` of
    them runs again, or all up to the last that keeps something, where `torch.utils.checkpoint` stops.
    """
    saved, most, seen = 0, NONE, set(there)
    keeping = [e for e in events if whole or step.events[e].keeps]
    for e, passing in zip(events, step.lives.passing(events, seen), strict=True):
        for s in step.keeps(e):
            if s not in seen:
                seen.add(s)
                saved += step.sizes[s]
        most = most.or_more(step.backward(e, saved))
        if keeping and e <= keeping[-1]:
            most = most.or_more(step.again(events[-1], saved + passing))
    return most
