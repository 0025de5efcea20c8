"""Dataflow questions about a recording: who comes from whom."""

from __future__ import annotations

from revwire._capture.recording import Event, Recording
from revwire._structures import refs

LONGEST_STEP = 32
"""How many calls a hop from a value to the one that it comes from may be long."""


def flow_of(recording: Recording) -> Flow:
    """Dataflow questions about a recording, whose run is over: the same object for all who ask."""
    found: Flow = recording.derived.get(Flow) or recording.derived.setdefault(Flow, Flow(recording))
    return found


class Flow:
    """Dataflow questions about a recording; see `flow_of`.

    A value is *active* if it comes from the root's arguments, and *unseen* if it comes from a tensor that is neither an
    argument nor the model's own: it was made by a call that is not in the recording, or was held by an object.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.parents: list[tuple[int, ...]] = [() for _ in recording.values]
        self.children: list[list[int]] = [[] for _ in recording.values]
        inputs = (
            {r.value for r in refs((recording.events[0].args, recording.events[0].kwargs))}
            if recording.events
            else set()
        )
        self.active = [False] * len(recording.values)
        self.unseen = [v.event < 0 and not v.names and v.number not in inputs for v in recording.values]
        for value in recording.values:
            if value.event >= 0:
                event = recording.events[value.event]
                self.parents[value.number] = tuple(
                    dict.fromkeys(r.value for r in refs((event.args, event.kwargs)) if r.value != value.number)
                )
            self.active[value.number] = value.number in inputs or any(
                self.active[p] for p in self.parents[value.number]
            )
            self.unseen[value.number] |= any(self.unseen[p] for p in self.parents[value.number])
            for parent in self.parents[value.number]:
                self.children[parent].append(value.number)

    def event_of(self, value: int) -> Event | None:
        number = self.recording.values[value].event
        return self.recording.events[number] if number >= 0 else None

    def activations(self, value: int) -> list[int]:
        return [p for p in self.parents[value] if self.active[p]]

    def is_ancestor(self, value: int, of: int) -> bool:
        """Whether ``value`` is a strict ancestor of ``of`` (parents always have smaller numbers)."""
        seen, todo = set(), [of]
        while todo:
            for parent in self.parents[todo.pop()]:
                if parent == value:
                    return True
                if parent > value and parent not in seen:
                    seen.add(parent)
                    todo.append(parent)
        return False

    def between(self, fork: int, end: int) -> set[int]:
        """Values on a path from ``fork`` (excluded) to ``end`` (included)."""
        above, todo = {end}, [end]
        while todo:
            for parent in self.parents[todo.pop()]:
                if parent > fork and parent not in above:
                    above.add(parent)
                    todo.append(parent)
        below: set[int] = set()
        for value in sorted(above):
            if any(p == fork or p in below for p in self.parents[value]):
                below.add(value)
        return below

    def hop_up(self, value: int) -> tuple[int, list[int]] | None:
        """(the nearest value that all activations of ``value`` come through, ``value`` and those in between), or None.

        One call of one activation is the simplest hop; a normalisation that is spelled out, or a gate, is a longer
        one. An addition of two activations is no hop: it joins two streams.
        """
        between = [value]
        waiting = set(self.activations(value))
        if self._joins(value, waiting):
            return None
        while len(waiting) > 1 and len(between) < LONGEST_STEP:
            latest = max(waiting)
            above = set(self.activations(latest))
            if not above or self._joins(latest, above):
                return None
            between.append(latest)
            waiting = waiting - {latest} | above
        return (waiting.pop(), between) if len(waiting) == 1 else None

    def _joins(self, value: int, above: set[int]) -> bool:
        event = self.event_of(value)
        return len(above) > 1 and event is not None and event.is_addition

    def is_light(self, value: int) -> bool:
        """Whether a value was made from one activation by views and element-wise kernels only."""
        event = self.event_of(value)
        return event is not None and (event.view or event.is_pointwise) and len(self.activations(value)) == 1
