"""The units of one host, found again in a recording of that host alone."""

from __future__ import annotations

from collections.abc import Container

from revwire._capture.recording import Recording
from revwire._errors import CaptureError
from revwire._search.dataflow import Flow, flow_of
from revwire._search.hosts import opened_calls
from revwire._search.links import Hops, begin_at, climb, events_of, predecessor
from revwire._search.order import keeps_layout
from revwire._search.residuals import CLIMB, Candidate, residual_adds, whole_call
from revwire._structures import refs

UnitKey = tuple[tuple[str, ...], int]
"""Where an add stands in its host: the modules around it, and which of their residual adds it is."""


WHOLE: UnitKey = ((), -1)
"""The key of a host that is one unit as a whole."""


def unit_keys(recording: Recording) -> dict[int, UnitKey]:
    """The key of every residual add in the recording of a host, by event number."""
    counts: dict[tuple[str, ...], int] = {}
    keys: dict[int, UnitKey] = {}
    for c in residual_adds(flow_of(recording)):
        around = [n for n in recording.calls_around(c.add) if not recording.events[n].hooked]
        names = tuple(recording.module_names.get(id(recording.events[n].target), ("?",))[0] for n in around)
        keys[c.add] = (names, counts.get(names, 0))
        counts[names] = counts.get(names, 0) + 1
    return keys


def find_units(
    recording: Recording,
    wanted: list[tuple[UnitKey, int]],
    followed: Container[int] = (),
    following: Container[int] = (),
) -> tuple[list[Candidate], set[int]]:
    """The units of one host, found again in a recording of it: (units in order, module calls to open).

    Args:
        recording: a run of the host alone.
        wanted: for each unit, its key and the number of post calls between its add and its output in the example. There
            may be fewer or more of them in another mode of the host (a dropout after the sum).
        followed: the places in ``wanted`` of units that another one follows, so that they end at a result of the host,
            if they are the last in it.
        following: those that follow another one, so that they begin at an input of the host, if they are the first in
            it.

    Raises:
        CaptureError: this run of the host does not have those units.
    """
    flow = flow_of(recording)
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
    preceding = set()
    for place, c in enumerate(units):
        c.host = 0
        before = predecessor(flow, c, by_result)
        if before is not None:
            preceding.add(before.add)
            continue
        if place in following:
            _begin_at_input(flow, c)
        c.lead = _views_above(flow, c.fork)
    for place, (c, (_, posts)) in enumerate(zip(units, wanted, strict=True)):
        if c.add not in preceding and not _extend_to_output(flow, c, posts, place in followed) and posts:
            raise CaptureError(f"does not go on after a residual add by {posts} calls, as it did at conversion")
    return units, opened_calls(flow, units).get(0, set())


def _begin_at_input(flow: Flow, c: Candidate) -> None:
    """Let a unit begin at the input of its host that its fork was made from, where more than views lie between."""
    top = flow.recording.events[0]
    found = climb(flow, c.fork, {r.value for r in refs((top.args, top.kwargs))})
    if found is not None and any(not flow.recording.events[e].view for e in events_of(flow, found[1])):
        begin_at(flow, c, *found)


def _views_above(flow: Flow, value: int) -> tuple[int, ...]:
    """The views through which a value came from an input of the root, the last first."""
    out = []
    event = flow.event_of(value)
    while event is not None and event.view:
        out.append(event.number)
        value = flow.activations(value)[0]
        event = flow.event_of(value)
    return tuple(out)


def _extend_to_output(flow: Flow, c: Candidate, posts: int, returned: bool) -> bool:
    """Let a unit that nothing in its host follows end ``posts`` calls after its add, on the way to a result; or
    elsewhere on that way.

    Args:
        posts: how many calls there were in the example.
        returned: its output is a result of the host, or a view of one, so there may be more calls than those.
    """
    ends = [r.value for r in refs(flow.recording.events[0].out)]
    for start in ends if not posts else [*ends, *range(c.result, len(flow.recording.values))]:
        found = climb(flow, start, {c.result})
        if found is not None and _ends_after(flow, c, found[1], [posts]):
            return True
    for start in ends:
        found = climb(flow, start, {c.result})
        if found is not None and _ends_after(flow, c, found[1], [*range(posts), *([CLIMB] if returned else [])]):
            return True
    return False


def _ends_after(flow: Flow, c: Candidate, hops: Hops, calls: list[int]) -> bool:
    """Let the unit end after one of these numbers of calls, if there are only views after them. `CLIMB`: any number."""
    for count in range(len(hops) + 1):
        post, rest = events_of(flow, hops[:count]), events_of(flow, hops[count:])
        out = hops[count - 1][0] if count else c.result
        only_views = all(flow.recording.events[e].view for e in rest)
        if only_views and (len(post) in calls or CLIMB in calls) and keeps_layout(flow, c, out, post):
            c.post, c.views, c.out = post, rest, out
            return True
    return False


def _whole(flow: Flow) -> Candidate:
    found = whole_call(flow, 0, residual_adds(flow))
    if found is None:
        raise CaptureError("does not lead its input to its output by residual adds, as it did at conversion")
    return found


CLOSED = {-1}
"""Instead of module calls to open: a host whose own code stays closed too."""
