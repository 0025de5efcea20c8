"""The search: recording -> residual units and the chains they form. Dataflow only; no module, no name decides.

Definitions, besides those of `_adds`:

- A *unit* runs from its fork to its *out*: the add, and what is done to the sum before it becomes a fork again (a
  post-activation, a post-normalisation).
- Units whose out is the next one's fork, but for views, form a *chain*.
- Between two units of a chain no matrix is multiplied with, and nothing convolved: a block that ends so is far from the
  identity, and rewired as x + (block(x) − x) it would not keep its function.
- A host whose code cannot be taken apart, or a module of which the caller wants that, may be a unit *as a whole*: from
  one of its inputs to one of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from revwire._capture.recording import Recording
from revwire._search.dataflow import Flow
from revwire._search.nesting import leanest
from revwire._search.order import keeps_layout
from revwire._search.residuals import CLIMB, Candidate, innermost_call, residual_adds, whole_call

Hops = list[list[int]]
"""Steps from a sum to the next fork: of each, the values that it makes, the last first."""


PART_OF_WHOLE = "a part of a block whose code cannot be taken apart, and which is rewired as a whole"


PART_AS_ASKED = "a part of a block that is rewired as a whole, as the caller wants it"


CALLER = "excluded"
"""How the reasons begin that are the caller's own wish."""


@dataclass
class Search:
    """The result: chains of at least two units, and every other residual add with its reason."""

    recording: Recording
    chains: list[list[Candidate]] = field(default_factory=list)
    rejected: list[Candidate] = field(default_factory=list)
    inline: dict[int, set[int]] = field(default_factory=dict)


Refusal = Callable[[Candidate], str | None]


Wish = Callable[[Candidate], Sequence[int]]


def find_chains(
    recording: Recording, refuse: Refusal = lambda _: None, shortest: int = 2, whole: Wish = lambda _: ()
) -> Search:
    """All chains of at least ``shortest`` units in a recording, the outermost where residuals nest.

    Args:
        recording: a run of the whole model.
        refuse: gives the reason why a residual add must stay, or None. Where it is not the caller's wish, the host
            cannot be taken apart, and is tried as a whole.
        shortest: chains with fewer units stay.
        whole: gives the module calls around a residual add that may be a unit as a whole, the one to try first in
            front. Where none of them is a unit of a chain then, the add is a unit of its own.
    """
    barred: set[int] = set()
    while True:
        search, alone = _found(recording, refuse, shortest, whole, barred)
        if not alone:
            return search
        barred |= alone


def _found(
    recording: Recording, refuse: Refusal, shortest: int, whole: Wish, barred: set[int]
) -> tuple[Search, set[int]]:
    """(the search, those of the calls that the caller would have whole which are in no chain: their parts may be)."""
    flow = Flow(recording)
    candidates = residual_adds(flow)
    asked = {
        call for c in candidates if c.reason is None for call in [call for call in whole(c) if call not in barred][:1]
    }
    found = {call: w for call in asked if (w := whole_call(flow, call, candidates)) is not None and refuse(w) is None}
    for c in candidates:
        if c.reason is None and any(call in found for call in recording.calls_around(c.add)):
            c.reason = PART_AS_ASKED
    closed = {call for c in candidates if c.reason is None for call in _refused(recording, c, refuse)}
    _absorb_sums(candidates)
    search = Search(recording)
    good = [c for c in candidates if c.reason is None]
    wholes = [
        w
        for w in (whole_call(flow, call, candidates) for call in sorted(closed))
        if w is not None and refuse(w) is None
    ]
    units = sorted([*good, *wholes, *found.values()], key=lambda c: c.result)
    chains = leanest(flow, ways_to_nest(flow, units, shortest))
    _separate(flow, chains)
    used = {c.add for chain in chains for c in chain}
    alone = asked - used
    if alone:
        return search, alone
    absorbed = {a for chain in chains for c in chain for a in (*c.absorbed, *c.post)}
    for c in candidates:
        if c.add in used or c.add in absorbed:
            continue
        outer = next((u for chain in chains for u in chain if c.add in u.region), None)
        if outer is not None:
            c.inside = True
            if c.reason != PART_AS_ASKED:
                c.reason = (
                    PART_OF_WHOLE if outer.whole else "inside the branch of another unit, which is the larger saving"
                )
        elif c.reason is None and not used.isdisjoint(c.region):
            c.reason = "its branch holds units that are rewired, which keep less than it would"
        elif c.reason is None:
            c.reason = "stands alone: a chain needs at least two units whose streams follow each other unchanged"
        search.rejected.append(c)
    search.chains = chains
    search.inline = opened_calls(flow, [c for chain in chains for c in chain])
    return search, alone


def _refused(recording: Recording, c: Candidate, refuse: Callable[[Candidate], str | None]) -> list[int]:
    """Ask ``refuse``; returns the host, if that is what cannot be taken apart.

    Where a larger module than the unit's own host could not, the unit may still do without what it was needed for.
    """
    c.reason = refuse(c)
    if c.reason is None or c.reason.startswith(CALLER):
        return []
    own = next(iter(recording.module_names.get(id(recording.events[c.host].target), ())), "") or "the model"
    if c.reason.startswith(f"{own} "):
        return [c.host]
    c.reason, c.widens = None, False
    return []


def _absorb_sums(candidates: list[Candidate]) -> None:
    """x + A(x) + B(x) is one unit: an add of the same fork inside the region of a larger one belongs to that."""
    forks = {c.fork for c in candidates}
    for c in (c for c in candidates if c.reason is None):
        inner = [d for d in candidates if d is not c and d.fork == c.fork and d.add in c.region and d.out not in forks]
        c.absorbed = tuple(d.add for d in inner)
        for d in inner:
            d.reason = d.reason or "part of a sum that is one unit"


def ways_to_nest(flow: Flow, units: list[Candidate], shortest: int) -> list[list[list[Candidate]]]:
    """Where units lie inside of others: the chains of all, those in which the larger unit goes on first, and those of
    the units that hold no others, or few levels of them. Linking writes to the units, so each way has copies of its
    own.
    """
    deep = levels(units)
    ways = [_chains_of(flow, units, shortest)]
    for most in range(max(deep.values(), default=0), -1, -1) if any(deep.values()) else ():
        some = [replace(c, reason=None) for c in units if deep[c.add] <= most]
        ways.append(_chains_of(flow, some, shortest, larger_first=True))
    return ways


def levels(units: list[Candidate]) -> dict[int, int]:
    """How deep other units are nested in the region of each, by its add."""
    deep: dict[int, int] = {}
    for c in sorted(units, key=lambda c: len(c.region)):
        inside = [deep[d.add] for d in units if d.add in deep and d is not c and d.add in c.region]
        deep[c.add] = 1 + max(inside) if inside else 0
    return deep


def _chains_of(
    flow: Flow, units: list[Candidate], shortest: int, *, larger_first: bool = False
) -> list[list[Candidate]]:
    return _outermost(_link(flow, [replace(c) for c in units], larger_first=larger_first), shortest)


def _link(flow: Flow, candidates: list[Candidate], *, larger_first: bool = False) -> list[list[Candidate]]:
    """Join the units to chains; only then let units end outside of their hosts, where that joins more."""
    by_result = {c.result: c for c in candidates}
    following: dict[int, Candidate] = {}
    preceded: set[int] = set()
    steps = {c.add: len(found[1]) for c in candidates if (found := climb(flow, c.fork, by_result)) is not None}
    nearest = sorted(
        (c for c in candidates if c.add in steps), key=lambda c: (steps[c.add], -len(c.region) if larger_first else 0)
    )  # a sum goes on in what is added to it next
    for widen in (False, True):
        for c in (c for c in nearest if c.add not in preceded):
            before = predecessor(flow, c, by_result, following if widen else None)
            if before is not None and before.add not in following:
                following[before.add] = c
                preceded.add(c.add)
    chains = []
    for c in candidates:
        if c.add in preceded:
            continue
        chain = [c]
        while chain[-1].add in following:
            chain.append(following[chain[-1].add])
        _extend_last(flow, chain)
        chains.append(chain)
    return chains


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
    """(the goal that a value comes from, the steps from it to the value in order), or None."""
    hops: Hops = []
    while value not in goals:
        step = flow.step_up(value) or _past_sum(flow, value, goals)
        if (
            step is None
            or len(hops) == CLIMB
            or any(flow.recording.events[flow.recording.values[v].event].is_product for v in step[1])
        ):
            return None
        value = step[0]
        hops.append(step[1])
    return value, hops[::-1]


def _past_sum(flow: Flow, value: int, goals: Container[int]) -> tuple[int, list[int]] | None:
    """(the operand of a sum that comes from a goal, the sum), where nothing else in it does: a tensor from elsewhere is
    added to the stream (the embedding of a time, an input that is injected again); or None.
    """
    event, values = flow.event_of(value), flow.recording.values
    if event is None or not event.is_addition:
        return None
    for operand in flow.activations(value):
        others = [o for o in flow.activations(value) if o != operand]
        found = climb(flow, operand, goals) if values[operand].shape == values[value].shape else None
        if found is not None and not any(o == found[0] or flow.is_ancestor(found[0], o) for o in others):
            return operand, [value]
    return None


def _attach(flow: Flow, before: Candidate, c: Candidate, hops: Hops, widen: bool) -> bool:
    """Split the steps between a sum and the next fork into post calls and views; False if they break the chain."""
    hops = hops[: len(hops) - lead_in(flow, before, c, hops)]
    count = _posts(flow, before, hops)
    if count is None:
        return False
    post, rest = events_of(flow, hops[:count]), events_of(flow, hops[count:])
    host = _host_with(flow, before, post, c if widen else None)
    between = tuple(e for e in rest if host not in (around := flow.recording.calls_around(e)) and c.host not in around)
    if between and host is not None and widen:
        host = _host_with(flow, before, (*post, *between), c)
    if host is None or (before.post and before.post != post):
        return False
    inside = tuple(e for e in rest if host in flow.recording.calls_around(e))
    lead = tuple(e for e in rest if e not in inside)
    if any(c.host not in flow.recording.calls_around(e) for e in lead):
        return False
    before.host, before.out, before.post, before.views, c.lead = host, _end(before, hops, count), post, inside, lead
    return True


def lead_in(flow: Flow, before: Candidate, c: Candidate, hops: Hops) -> int:
    """Let a unit begin before what is done to its fork in its own host first (x = norm(x); x + F(x)): how many steps
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
    """Whether a step is more than a view."""
    return len(hop) > 1 or not flow.recording.events[flow.recording.values[hop[0]].event].view


def _posts(flow: Flow, before: Candidate, hops: Hops) -> int | None:
    """How many steps belong to the unit: at least all but the views at their end, and the skip must keep shape and
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
    """The calls of these steps, in order."""
    return tuple(sorted({flow.recording.values[v].event for hop in hops for v in hop}))


def _host_with(flow: Flow, c: Candidate, post: tuple[int, ...], follower: Candidate | None) -> int | None:
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
    shared = {b for e in post for b in _below(recording, e, host) if b in recording.calls_around(follower.add)}
    opened = {host, *_below(recording, c.add, host), *shared}
    return None if recording.events[host].hooked or recording.hidden(opened) else host


def _extend_last(flow: Flow, chain: list[Candidate]) -> None:
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
    host = _host_with(flow, last, tuple(post), last if last.widens else None)
    if host is not None and keeps_layout(flow, last, nxt[0], tuple(post)):
        last.host, last.out, last.post = host, nxt[0], tuple(post)


def _outermost(chains: list[list[Candidate]], shortest: int) -> list[list[Candidate]]:
    """Chains that are long enough, without those inside a branch of another one."""
    long = [chain for chain in chains if len(chain) >= shortest]
    inside = [
        any(_lies_in(c, u) for other in long if other is not chain for u in other for c in chain) for chain in long
    ]
    return [chain for chain, nested in zip(long, inside, strict=True) if not nested]


def _lies_in(c: Candidate, unit: Candidate) -> bool:
    """Whether a unit lies in the branch of another; the region of one that is taken apart holds no module calls, only
    what they make.
    """
    return c.add in unit.region or (
        c.whole and c is not unit and bool(c.region & unit.region) and not c.region > unit.region
    )


def _separate(flow: Flow, chains: list[list[Candidate]]) -> None:
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
            opened = {parent, c.host, *_below(recording, c.add, c.host)}
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
                below = _below(recording, number, c.host)
                if number in c.post:  # a module that holds no part of a unit but this stays closed
                    below = [b for b in below if any(b < u.add < recording.events[b].end for u in units)]
                opened.update(below)
            producer = recording.values[c.fork].event
            if producer >= 0:
                opened.update(
                    b
                    for b in _below(recording, producer, c.host)
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


def _below(recording: Recording, event: int, host: int) -> list[int]:
    """The module calls around an event that lie inside ``host``, outermost first."""
    calls = recording.calls_around(event)
    return list(calls[calls.index(host) + 1 :]) if host in calls else []
