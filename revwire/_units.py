"""The units of one host, found again in a recording of that host alone."""

from __future__ import annotations

from revwire._adds import Candidate, residual_adds, whole_call
from revwire._chains import climb, events_of, opened_calls, predecessor
from revwire._errors import CaptureError
from revwire._flow import Flow
from revwire._graph import CLOSED
from revwire._layout import keeps_layout
from revwire._recording import Recording, refs

UnitKey = tuple[tuple[str, ...], int]
"""Where an add stands in its host: the modules around it, and which of their residual adds it is."""

WHOLE: UnitKey = ((), -1)
"""The key of a host that is one unit as a whole."""


def unit_keys(recording: Recording) -> dict[int, UnitKey]:
    """The key of every residual add in the recording of a host, by event number."""
    counts: dict[tuple[str, ...], int] = {}
    keys: dict[int, UnitKey] = {}
    for c in residual_adds(Flow(recording)):
        around = [n for n in recording.calls_around(c.add) if not recording.events[n].hooked]
        names = tuple(recording.module_names.get(id(recording.events[n].target), ("?",))[0] for n in around)
        keys[c.add] = (names, counts.get(names, 0))
        counts[names] = counts.get(names, 0) + 1
    return keys


def find_units(recording: Recording, wanted: list[tuple[UnitKey, int]]) -> tuple[list[Candidate], set[int]]:
    """The units of one host, found again in a recording of it: (units in order, module calls to open).

    Args:
        recording: a run of the host alone.
        wanted: for each unit, its key and the number of post calls between its add and its output.

    Raises:
        CaptureError: this run of the host does not have those units.
    """
    flow = Flow(recording)
    if [key for key, _ in wanted] == [WHOLE]:
        return [_whole(flow)], CLOSED
    by_key = {key: add for add, key in unit_keys(recording).items()}
    by_add = {c.add: c for c in residual_adds(flow)}
    units = []
    for key, _ in wanted:
        if key not in by_key or by_add[by_key[key]].reason:
            raise CaptureError("does not have the residual adds that it had at conversion")
        units.append(by_add[by_key[key]])
    by_result = {c.result: c for c in units}
    followed = set()
    for c in units:
        c.host = 0
        before = predecessor(flow, c, by_result)
        if before is not None:
            followed.add(before.add)
        else:
            c.lead = _views_above(flow, c.fork)
    for c, (_, posts) in zip(units, wanted, strict=True):
        if c.add not in followed:
            _extend_to_output(flow, c, posts)
        if len(c.post) != posts:
            raise CaptureError(f"goes on after a residual add by {len(c.post)} calls, and by {posts} at conversion")
    return units, opened_calls(flow, units).get(0, set())


def _views_above(flow: Flow, value: int) -> tuple[int, ...]:
    """The views through which a value came from an input of the root, the last first."""
    out = []
    event = flow.event_of(value)
    while event is not None and event.view:
        out.append(event.number)
        value = flow.activations(value)[0]
        event = flow.event_of(value)
    return tuple(out)


def _extend_to_output(flow: Flow, c: Candidate, posts: int) -> None:
    """Let a unit that nothing in its host follows end ``posts`` calls after its add, on the way to a result."""
    events, values = flow.recording.events, flow.recording.values
    ends = [r.value for r in refs(events[0].out)]
    for start in ends if not posts else [*ends, *range(c.result, len(values))]:
        found = climb(flow, start, {c.result})
        chosen = _first(flow, found[1], posts) if found is not None else None
        if chosen is None or found is None:
            continue
        rest = events_of(flow, found[1][chosen:])
        out = found[1][chosen - 1][0] if chosen else c.result
        if all(events[e].view for e in rest) and keeps_layout(flow, c, out, events_of(flow, found[1][:chosen])):
            c.post, c.views, c.out = events_of(flow, found[1][:chosen]), rest, out
            return


def _first(flow: Flow, hops: list[list[int]], posts: int) -> int | None:
    """How many steps hold this many calls."""
    return next((n for n in range(len(hops) + 1) if len(events_of(flow, hops[:n])) == posts), None)


def _whole(flow: Flow) -> Candidate:
    found = whole_call(flow, 0, residual_adds(flow))
    if found is None:
        raise CaptureError("does not lead its input to its output by residual adds, as it did at conversion")
    return found
