"""Which module holds a unit: the innermost whose code can be taken apart around all that the unit does."""

from __future__ import annotations

from revwire._capture.recording import Recording
from revwire._search.dataflow import Flow
from revwire._search.residuals import CLIMB, Candidate, innermost_call


def host_with(flow: Flow, c: Candidate, post: tuple[int, ...], follower: Candidate | None) -> int | None:
    """The host of a unit with these post calls, or None.

    Where they lie outside of its own host, and it has a ``follower``: the innermost call around all, if that can be
    opened.
    """
    recording = flow.recording
    if all(c.host in recording.calls_around(e) for e in post):
        return None if post and c.whole else c.host
    if c.whole or follower is None:
        return None
    host = innermost_call(flow, [c.add, *c.region, *post])
    shared = {b for e in post for b in _calls_between(recording, e, host) if b in recording.calls_around(follower.add)}
    opened = {host, *_calls_between(recording, c.add, host), *shared}
    return None if recording.events[host].hooked or recording.hidden(opened) else host


def separate(flow: Flow, chains: list[list[Candidate]]) -> None:
    """Where two chains run through the same module, let its units belong to a larger one, in which the two calls are
    told apart.
    """
    recording = flow.recording

    def host(c: Candidate) -> int:
        return id(recording.events[c.host].target)

    for _ in range(CLIMB):
        lists = [[host(c) for c in chain] for chain in chains]
        calls: dict[int, dict[int, int]] = {}
        for number, chain in enumerate(chains):
            for c in chain:
                calls.setdefault(host(c), {}).setdefault(c.host, number)
        shared = {
            h for h, found in calls.items() if any(lists[a] != lists[b] for a in found.values() for b in found.values())
        }
        moved = False
        for c in (c for chain in chains for c in chain if host(c) in shared and not c.whole):
            parent = recording.events[c.host].parent
            opened = {parent, c.host, *_calls_between(recording, c.add, c.host)}
            if parent >= 0 and not recording.events[parent].hooked and recording.hidden(opened) is None:
                c.host, moved = parent, True
        if not moved:
            return


def opened_calls(flow: Flow, units: list[Candidate]) -> dict[int, set[int]]:
    """For each host call, the module calls inside it that must be opened to see its units whole."""
    recording = flow.recording
    for _ in range(len(units) + 1):
        inline: dict[int, set[int]] = {}
        for c in units:
            opened = inline.setdefault(c.host, set())
            for number in (c.add, *c.views, *c.lead, *c.post):
                below = _calls_between(recording, number, c.host)
                if number in c.post:  # a module that holds no part of a unit but this stays closed
                    below = [b for b in below if any(b < u.add < recording.events[b].end for u in units)]
                opened.update(below)
            producer = recording.values[c.fork].event
            if producer >= 0:
                opened.update(
                    b
                    for b in _calls_between(recording, producer, c.host)
                    if any(b in recording.calls_around(e) for e in c.region)
                )
        moved = False
        for c in units:
            outer = next((h for h, opened in inline.items() if c.host in opened), None)
            if outer is not None:
                c.host, moved = outer, True
        if not moved:
            return inline
    return inline


def _calls_between(recording: Recording, event: int, host: int) -> list[int]:
    """The module calls around an event that lie inside ``host``, outermost first."""
    calls = recording.calls_around(event)
    return list(calls[calls.index(host) + 1 :]) if host in calls else []
