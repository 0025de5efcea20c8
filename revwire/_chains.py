"""The search: recording -> residual units and the chains they form. Dataflow only; no module, no name decides.

Definitions, besides those of `_adds`:

- A *unit* runs from its fork to its *out*: the add, and what is done to the sum before it becomes a fork again (a
  post-activation, a post-normalisation).
- Units whose out is the next one's fork, but for views, form a *chain*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from revwire._adds import CLIMB, Candidate, flow_result, residual_adds
from revwire._flow import Flow
from revwire._recording import Recording


@dataclass
class Search:
    """The result: chains of at least two units, and every other residual add with its reason."""

    recording: Recording
    chains: list[list[Candidate]] = field(default_factory=list)
    rejected: list[Candidate] = field(default_factory=list)
    inline: dict[int, set[int]] = field(default_factory=dict)


def find_chains(recording: Recording, refuse: Callable[[Candidate], str | None] = lambda _: None, shortest: int = 2) -> Search:
    """All chains of at least ``shortest`` units in a recording, the outermost where residuals nest.

    Args:
        recording: a run of the whole model.
        refuse: gives the reason why a residual add must stay, or None.
        shortest: chains with fewer units stay.
    """
    flow = Flow(recording)
    candidates = residual_adds(flow)
    for c in candidates:
        c.reason = c.reason or refuse(c)
    _absorb_sums(candidates)
    search = Search(recording)
    good = [c for c in candidates if c.reason is None]
    chains = _link(flow, good)
    chains = _outermost(chains, shortest)
    used = {c.add for chain in chains for c in chain}
    absorbed = {a for chain in chains for c in chain for a in c.absorbed}
    for c in candidates:
        if c.add in used or c.add in absorbed:
            continue
        outer = next((u for chain in chains for u in chain if c.add in u.region), None)
        if outer is not None:
            c.reason, c.inside = "inside the branch of another unit, which is the larger saving", True
        elif c.reason is None:
            c.reason = "stands alone: a chain needs at least two units whose streams follow each other unchanged"
        search.rejected.append(c)
    search.chains = chains
    search.inline = opened_calls(flow, [c for chain in chains for c in chain])
    return search


def _absorb_sums(candidates: list[Candidate]) -> None:
    """x + A(x) + B(x) is one unit: an add of the same fork inside the region of a larger one belongs to that."""
    forks = {c.fork for c in candidates}
    for c in candidates:
        inner = [d for d in candidates if d is not c and d.fork == c.fork and d.add in c.region and d.out not in forks]
        c.absorbed = tuple(d.add for d in inner)
        for d in inner:
            d.reason = d.reason or "part of a sum that is one unit"


def _link(flow: Flow, candidates: list[Candidate]) -> list[list[Candidate]]:
    by_result = {flow_result(flow, c): c for c in candidates}
    following: dict[int, Candidate] = {}
    preceded: set[int] = set()
    for c in candidates:
        before = predecessor(flow, c, by_result)
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


def predecessor(flow: Flow, c: Candidate, by_result: dict[int, Candidate]) -> Candidate | None:
    """The unit whose sum becomes the fork of ``c`` by calls of one activation each; sets its ``out``."""
    path: list[int] = []
    at = c.fork
    for _ in range(CLIMB):
        if at in by_result:
            return by_result[at] if _attach(flow, by_result[at], c, path[::-1]) else None
        above = flow.activations(at)
        if len(above) != 1:
            return None
        path.append(at)
        at = above[0]
    return None


def _attach(flow: Flow, before: Candidate, c: Candidate, path: list[int]) -> bool:
    """Split the values between a sum and the next fork into post calls and views; False if they break the chain."""
    events = [flow.recording.values[v].event for v in path]
    views = len(path)
    while views and flow.recording.events[events[views - 1]].view:
        views -= 1
    post, rest = path[:views], events[views:]
    values = flow.recording.values
    out = post[-1] if post else flow_result(flow, before)
    if values[out].shape != values[before.fork].shape:
        return False
    if any(before.host not in flow.recording.calls_around(e) for e in events[:views]):
        return False
    inside = [e for e in rest if before.host in flow.recording.calls_around(e)]
    lead = [e for e in rest if e not in inside]
    if any(c.host not in flow.recording.calls_around(e) for e in lead):
        return False
    if before.post and before.post != tuple(events[:views]):
        return False
    before.out, before.post, before.views, c.lead = out, tuple(events[:views]), tuple(inside), tuple(lead)
    return True


def _extend_last(flow: Flow, chain: list[Candidate]) -> None:
    """The last unit of a chain ends as the ones before it do: with the same post calls, if they are there."""
    if len(chain) < 2 or not chain[-2].post or chain[-1].post:
        return
    events, last = flow.recording.events, chain[-1]
    out, post = flow_result(flow, last), []
    for model in chain[-2].post:
        nxt = [v for v in flow.children[out] if events[flow.recording.values[v].event].kernels == events[model].kernels]
        if len(nxt) != 1 or last.host not in flow.recording.calls_around(flow.recording.values[nxt[0]].event):
            return
        out = nxt[0]
        post.append(flow.recording.values[out].event)
    if flow.recording.values[out].shape == flow.recording.values[last.fork].shape:
        last.out, last.post = out, tuple(post)


def _outermost(chains: list[list[Candidate]], shortest: int) -> list[list[Candidate]]:
    """Chains that are long enough, without those inside a branch of another one."""
    long = [chain for chain in chains if len(chain) >= shortest]
    inside = [any(c.add in u.region for other in long if other is not chain for u in other for c in chain) for chain in long]
    return [chain for chain, nested in zip(long, inside, strict=True) if not nested]


def opened_calls(flow: Flow, units: list[Candidate]) -> dict[int, set[int]]:
    """For each host call, the module calls inside it that must be opened to see its units whole."""
    recording = flow.recording
    for _ in range(len(units) + 1):
        inline: dict[int, set[int]] = {}
        for c in units:
            opened = inline.setdefault(c.host, set())
            for number in (c.add, *c.views, *c.lead, *c.post):
                below = _below(recording, number, c.host)
                if number in c.post:  # a module that only does this call stays closed
                    below = [b for b in below if b in _below(recording, c.add, c.host)]
                opened.update(below)
            producer = recording.values[c.fork].event
            if producer >= 0:
                opened.update(b for b in _below(recording, producer, c.host) if any(b in recording.calls_around(e) for e in c.region))
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
