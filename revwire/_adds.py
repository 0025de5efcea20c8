"""The residual adds of a recording: additions one of whose operands comes from the other.

Definitions, on the values (tensors) and events (calls) of a `Recording`:

- A *residual add* is an addition one of whose operands, the *skip*, is an ancestor of the other. The skip may have been
  scaled, dropped out or viewed on the way; ``fork`` is the value before that.
- Its *region* is what lies on a path from the fork to the add. Its *host* is the innermost module call around all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from revwire._flow import Flow
from revwire._recording import Event, refs

CLIMB = 64
"""How many calls a skip, or a post-activation path, may be long."""


@dataclass
class Candidate:
    """A residual add, and what was found out about it.

    Attributes:
        add: event number of the addition.
        fork: value number of the input of the unit.
        branch: value number of F(x) where the add is literally fork + F(fork), else None.
        out: value number of the output of the unit.
        post: events between the add and ``out`` (no views).
        views: events of views between the out of this unit and the fork of the next.
        host: event number of the module call that holds the unit.
        region: events between fork and add.
        absorbed: adds inside the region that belong to the same sum (parallel branches).
        reason: why it cannot be a unit, or None.
        computed_shortcut: neither operand is the input itself (a projection): not a residual add in the strict sense.
        inside: it lies in the branch of a unit.
    """

    add: int
    fork: int
    branch: int | None
    out: int
    host: int
    region: frozenset[int]
    post: tuple[int, ...] = ()
    views: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    absorbed: tuple[int, ...] = ()
    reason: str | None = None
    computed_shortcut: bool = False
    inside: bool = False


def residual_adds(flow: Flow) -> list[Candidate]:
    out: list[Candidate] = []
    forks: dict[int, int] = {}
    for event in flow.recording.events:
        if not event.is_addition:
            continue
        results = [r.value for r in refs(event.out)]
        first, second = (r.value for r in refs((event.args, event.kwargs)))
        if len(results) == 1 and flow.active[first] != flow.active[second] and _is_unseen(flow, first, second):
            out.append(_unseen(flow, event, first if flow.active[first] else second))
        if len(results) != 1 or not (flow.active[first] and flow.active[second]) or first == second:
            continue
        found = _fork(flow, first, second, forks)
        if found is None:
            continue
        fork, branch = found
        forks[results[0]] = fork
        out.append(_candidate(flow, event, results[0], fork, branch))
    return out


def _is_unseen(flow: Flow, first: int, second: int) -> bool:
    values = flow.recording.values
    return (flow.unseen[first] or flow.unseen[second]) and values[first].shape == values[second].shape


def _unseen(flow: Flow, event: Event, fork: int) -> Candidate:
    host = flow.recording.calls_around(event.number)[-1]
    reason = "one operand comes from a tensor that was made by a call that cannot be seen, or that an object holds"
    return Candidate(event.number, fork, None, fork, host, frozenset(), reason=reason)


def _candidate(flow: Flow, event: Event, result: int, fork: int, branch: int | None) -> Candidate:
    values = flow.recording.values
    region = {values[v].event for v in flow.between(fork, result)}
    host = _host(flow, region)
    c = Candidate(event.number, fork, branch, result, host, frozenset(region - {event.number}))
    if branch is None and not _light_skip(flow, event, fork):
        c.computed_shortcut = True
        c.reason = f"both operands are computed from {_shape(values[fork].shape)} (a projection shortcut): the input is not carried on"
    elif flow.recording.events[host].hooked:
        c.reason = "lies in a hook of its module, at least in part"
    elif values[fork].shape != values[result].shape:
        c.reason = f"the shortcut changes shape: {_shape(values[fork].shape)} -> {_shape(values[result].shape)}"
    elif not values[result].dtype.is_floating_point:
        c.reason = f"adds {values[result].dtype}, not floating point"
    elif branch is not None and values[branch].shape != values[result].shape:
        c.branch = None
    return c


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(s) for s in shape) or "scalar"


def _light_skip(flow: Flow, event: Event, fork: int) -> bool:
    """Whether one operand comes from the fork by views, element-wise kernels and residual adds of the same sum."""
    for operand in (r.value for r in refs((event.args, event.kwargs))):
        at = operand
        for _ in range(CLIMB):
            if at == fork:
                return True
            above = flow.event_of(at)
            if above is not None and above.is_addition and fork in flow.parents[at]:
                return True
            if not flow.is_light(at):
                break
            at = flow.activations(at)[0]
    return False


def _fork(flow: Flow, first: int, second: int, forks: dict[int, int]) -> tuple[int, int | None] | None:
    """(fork, F(fork) if the add is literally fork + F(fork)), or None if neither operand comes from the other."""
    low, high = sorted((first, second))
    if flow.is_ancestor(low, high):
        return low, high
    best = None
    for side, other in ((first, second), (second, first)):
        at: int | None = side
        for _ in range(CLIMB):
            at = _above(flow, at, forks)
            if at is None:
                break
            if flow.is_ancestor(at, other):
                best = at if best is None else max(best, at)
                break
    return None if best is None else (best, None)


def _above(flow: Flow, value: int | None, forks: dict[int, int]) -> int | None:
    if value is None:
        return None
    if value in forks:
        return forks[value]
    above = flow.activations(value)
    return above[0] if len(above) == 1 else None


def _host(flow: Flow, events: set[int]) -> int:
    """The innermost module call around all of these events."""
    common: tuple[int, ...] | None = None
    for number in events:
        calls = flow.recording.calls_around(number)
        if common is None:
            common = calls
        while common != calls[: len(common)]:
            common = common[:-1]
    return common[-1] if common else 0


def flow_result(flow: Flow, c: Candidate) -> int:
    """The value that the addition of a candidate made."""
    return next(r.value for r in refs(flow.recording.events[c.add].out))
