"""From the sum of one unit to the fork of the next: which hops lie between, and to which of the two each belongs."""

from __future__ import annotations

from collections.abc import Container
from math import prod

from revwire._search.dataflow import Flow
from revwire._search.hosts import host_with
from revwire._search.order import keeps_layout
from revwire._search.residuals import CLIMB, Candidate

Hops = list[list[int]]
"""Hops from a sum to the next fork: of each, the values that it makes, the last first."""


def predecessor(
    flow: Flow, c: Candidate, by_result: dict[int, Candidate], followed: Container[int] | None = None
) -> Candidate | None:
    """The unit whose sum becomes the fork of ``c``, which depends on nothing else; sets its ``out``.

    With ``followed``, the units whose place is taken, it may end outside of its host, which becomes a larger module
    then.
    """
    found = climb(flow, c.fork, by_result)
    if found is None:
        return None
    before = by_result[found[0]]
    if followed is not None and (before.add in followed or not before.widens):
        return None
    return before if _attach(flow, before, c, found[1], widen=followed is not None) else None


def climb(flow: Flow, value: int, goals: Container[int]) -> tuple[int, Hops] | None:
    """(the goal that a value comes from, the hops from it to the value in order), or None."""
    return _climb(flow, value, goals, set())


def _climb(flow: Flow, value: int, goals: Container[int], tried: set[int]) -> tuple[int, Hops] | None:
    """As `climb`; ``tried`` are the sums that come from no goal, as several ways may meet the same one."""
    hops: Hops = []
    while value not in goals:
        hop = flow.hop_up(value)
        if hop is None:
            below = _past_sum(flow, value, goals, tried)
            return None if below is None else (below[0], [*below[1], *hops[::-1]])
        if len(hops) == CLIMB or any(flow.recording.events[flow.recording.values[v].event].is_product for v in hop[1]):
            return None
        value = hop[0]
        hops.append(hop[1])
    return value, hops[::-1]


def _past_sum(flow: Flow, value: int, goals: Container[int], tried: set[int]) -> tuple[int, Hops] | None:
    """(the goal that one operand of a sum comes from, the hops to the sum), where nothing else in it does: a tensor
    from elsewhere is added to the stream (the embedding of a time, an input that is injected again); or None.
    """
    event, values = flow.event_of(value), flow.recording.values
    if event is None or not event.is_addition or value in tried or len(tried) == CLIMB:
        return None
    tried.add(value)
    for operand in flow.activations(value):
        others = [o for o in flow.activations(value) if o != operand]
        found = _climb(flow, operand, goals, tried) if values[operand].shape == values[value].shape else None
        if found is not None and not any(o == found[0] or flow.is_ancestor(found[0], o) for o in others):
            return found[0], [*found[1], [value]]
    return None


def _attach(flow: Flow, before: Candidate, c: Candidate, hops: Hops, widen: bool) -> bool:
    """Split the hops between a sum and the next fork into post calls and views; False if they break the chain."""
    hops = hops[: len(hops) - lead_in(flow, before, c, hops)]
    count = _posts(flow, before, hops)
    if count is None:
        return False
    post, rest = events_of(flow, hops[:count]), events_of(flow, hops[count:])
    host = host_with(flow, before, post, c if widen else None)
    between = tuple(e for e in rest if host not in (around := flow.recording.calls_around(e)) and c.host not in around)
    if between and host is not None and widen:
        host = host_with(flow, before, (*post, *between), c)
    if host is None or (before.post and before.post != post):
        return False
    inside = tuple(e for e in rest if host in flow.recording.calls_around(e))
    lead = tuple(e for e in rest if e not in inside)
    if any(c.host not in flow.recording.calls_around(e) for e in lead):
        return False
    before.host, before.out, before.post, before.views, c.lead = host, _end(before, hops, count), post, inside, lead
    return True


def lead_in(flow: Flow, before: Candidate, c: Candidate, hops: Hops) -> int:
    """Let a unit begin before what is done to its fork in its own host first (x = norm(x); x + F(x)): how many hops
    become its own.

    The unit is then a block: its output less its input is what is added.
    """
    own = next((n for n, hop in enumerate(hops) if not _touches(flow, before.host, hop)), len(hops))
    mine = hops[own:]
    if (
        c.whole
        or c.absorbed
        or not any(_is_call(flow, hop) for hop in mine)
        or not all(_touches(flow, c.host, hop) for hop in mine)
    ):
        return 0
    start = _end(before, hops, own)
    return len(mine) if begin_at(flow, c, start, mine) else 0


def begin_at(flow: Flow, c: Candidate, start: int, hops: Hops) -> bool:
    """Let a unit begin at an earlier value, from which ``hops`` lead to its fork, if its skip keeps shape and
    layout.
    """
    kept = c.fork, c.branch, c.region
    c.fork, c.branch, c.region = start, None, c.region | frozenset(events_of(flow, hops))
    if keeps_layout(flow, c, c.result, ()):
        return True
    c.fork, c.branch, c.region = kept
    return False


def _touches(flow: Flow, host: int, hop: list[int]) -> bool:
    return all(host in flow.recording.calls_around(flow.recording.values[v].event) for v in hop)


def _is_call(flow: Flow, hop: list[int]) -> bool:
    """Whether a hop is more than a view."""
    return len(hop) > 1 or not flow.recording.events[flow.recording.values[hop[0]].event].view


def _posts(flow: Flow, before: Candidate, hops: Hops) -> int | None:
    """How many hops belong to the unit: at least all but the views at their end, and the skip must keep shape and
    layout.
    """
    values = flow.recording.values
    count = len(hops)
    while count and not _is_call(flow, hops[count - 1]):
        count -= 1
    elements = prod(values[before.fork].shape)
    if any(prod(values[hop[0]].shape) != elements for hop in hops):
        return None
    for posts in range(count, len(hops) + 1):
        if keeps_layout(flow, before, _end(before, hops, posts), events_of(flow, hops[:posts])):
            return posts
    return None


def _end(before: Candidate, hops: Hops, count: int) -> int:
    return hops[count - 1][0] if count else before.result


def events_of(flow: Flow, hops: Hops) -> tuple[int, ...]:
    """The calls of these hops, in order."""
    return tuple(sorted({flow.recording.values[v].event for hop in hops for v in hop}))


def extend_last(flow: Flow, chain: list[Candidate]) -> None:
    """The last unit of a chain ends as the ones before it do: with the same post calls, if they are there."""
    if len(chain) < 2 or not chain[-2].post or chain[-1].post:
        return
    events, last = flow.recording.events, chain[-1]
    made = {last.result}
    post: list[int] = []
    for model in (events[e] for e in chain[-2].post):
        below = sorted(
            v for m in made for v in flow.children[m] if v not in made and made.issuperset(flow.activations(v))
        )
        nxt = [v for v in below if events[flow.recording.values[v].event].kernels == model.kernels]
        if not nxt:
            return
        made.add(nxt[0])
        post.append(flow.recording.values[nxt[0]].event)
    host = host_with(flow, last, tuple(post), last if last.widens else None)
    if host is not None and keeps_layout(flow, last, nxt[0], tuple(post)):
        last.host, last.out, last.post = host, nxt[0], tuple(post)
