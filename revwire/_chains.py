"""The search: recording -> residual units and the chains they form. Dataflow only; no module, no name decides.

Definitions, on the values (tensors) and events (calls) of a `Recording`:

- A *residual add* is an addition one of whose operands, the *skip*, is an ancestor of the other. The skip may have been
  scaled, dropped out or viewed on the way; ``fork`` is the value before that.
- Its *region* is what lies on a path from the fork to the add. Its *host* is the innermost module call around all of it.
- A *unit* runs from its fork to its *out*: the add, and what is done to the sum before it becomes a fork again (a
  post-activation, a post-normalisation).
- Units whose out is the next one's fork, but for views, form a *chain*.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from revwire._errors import CaptureError
from revwire._trace import Event, Recording, refs

_CLIMB = 64
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


@dataclass
class Search:
    """The result: chains of at least two units, and every other residual add with its reason."""

    recording: Recording
    chains: list[list[Candidate]] = field(default_factory=list)
    rejected: list[Candidate] = field(default_factory=list)
    inline: dict[int, set[int]] = field(default_factory=dict)


class _Flow:
    """Dataflow questions about a recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.parents: list[tuple[int, ...]] = [() for _ in recording.values]
        self.children: list[list[int]] = [[] for _ in recording.values]
        inputs = {r.value for r in refs((recording.events[0].args, recording.events[0].kwargs))} if recording.events else set()
        self.active = [False] * len(recording.values)
        for value in recording.values:
            if value.event >= 0:
                event = recording.events[value.event]
                self.parents[value.number] = tuple(dict.fromkeys(r.value for r in refs((event.args, event.kwargs)) if r.value != value.number))
            self.active[value.number] = value.number in inputs or any(self.active[p] for p in self.parents[value.number])
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

    def is_light(self, value: int) -> bool:
        """Whether a value was made from one activation by views and element-wise kernels only."""
        event = self.event_of(value)
        return event is not None and (event.view or event.is_pointwise) and len(self.activations(value)) == 1


def find_chains(recording: Recording, refuse: Callable[[Candidate], str | None] = lambda _: None, shortest: int = 2) -> Search:
    """All chains of at least ``shortest`` units in a recording, the outermost where residuals nest.

    Args:
        recording: a run of the whole model.
        refuse: gives the reason why a residual add must stay, or None.
        shortest: chains with fewer units stay.
    """
    flow = _Flow(recording)
    candidates = _residual_adds(flow)
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
    search.inline = _inline(flow, [c for chain in chains for c in chain])
    return search


UnitKey = tuple[tuple[str, ...], int]
"""Where an add stands in its host: the modules around it, and which of their residual adds it is."""


def unit_keys(recording: Recording) -> dict[int, UnitKey]:
    """The key of every residual add in the recording of a host, by event number."""
    counts: dict[tuple[str, ...], int] = {}
    keys: dict[int, UnitKey] = {}
    for c in _residual_adds(_Flow(recording)):
        around = recording.calls_around(c.add)
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
    flow = _Flow(recording)
    by_key = {key: add for add, key in unit_keys(recording).items()}
    by_add = {c.add: c for c in _residual_adds(flow)}
    units = []
    for key, _ in wanted:
        if key not in by_key or by_add[by_key[key]].reason:
            raise CaptureError("does not have the residual adds that it had at conversion")
        units.append(by_add[by_key[key]])
    by_result = {flow_result(flow, c): c for c in units}
    followed = set()
    for c in units:
        c.host = 0
        before = _predecessor(flow, c, by_result)
        if before is not None:
            followed.add(before.add)
        else:
            c.lead = _views_above(flow, c.fork)
    for c, (_, posts) in zip(units, wanted, strict=True):
        if c.add not in followed:
            _extend_to_output(flow, c, posts)
        if len(c.post) != posts:
            raise CaptureError(f"goes on after a residual add by {len(c.post)} calls, and by {posts} at conversion")
    return units, _inline(flow, units).get(0, set())


def _views_above(flow: _Flow, value: int) -> tuple[int, ...]:
    """The views through which a value came from an input of the root, the last first."""
    out = []
    event = flow.event_of(value)
    while event is not None and event.view:
        out.append(event.number)
        value = flow.activations(value)[0]
        event = flow.event_of(value)
    return tuple(out)


def _extend_to_output(flow: _Flow, c: Candidate, posts: int) -> None:
    """Let a unit that nothing in its host follows end ``posts`` calls after its add, on the way to a result."""
    events, values, result = flow.recording.events, flow.recording.values, flow_result(flow, c)
    ends = [r.value for r in refs(events[0].out)]
    for start in ends if not posts else [*ends, *range(len(values))]:
        path, at = [], start
        while at != result and len(path) <= _CLIMB and len(flow.activations(at)) == 1:
            path.append(at)
            at = flow.activations(at)[0]
        chosen = [values[v].event for v in reversed(path)]
        post = chosen[:posts]
        if at == result and len(chosen) >= posts and all(events[e].view for e in chosen[posts:]):
            out = path[len(path) - posts] if posts else result
            if values[out].shape == values[c.fork].shape:
                c.post, c.views, c.out = tuple(post), tuple(chosen[posts:]), out
                return


def _residual_adds(flow: _Flow) -> list[Candidate]:
    out: list[Candidate] = []
    forks: dict[int, int] = {}
    for event in flow.recording.events:
        if not event.is_addition:
            continue
        results = [r.value for r in refs(event.out)]
        first, second = (r.value for r in refs((event.args, event.kwargs)))
        if len(results) != 1 or not (flow.active[first] and flow.active[second]) or first == second:
            continue
        found = _fork(flow, first, second, forks)
        if found is None:
            continue
        fork, branch = found
        forks[results[0]] = fork
        out.append(_candidate(flow, event, results[0], fork, branch))
    return out


def _candidate(flow: _Flow, event: Event, result: int, fork: int, branch: int | None) -> Candidate:
    values = flow.recording.values
    region = {values[v].event for v in flow.between(fork, result)}
    host = _host(flow, region)
    c = Candidate(event.number, fork, branch, result, host, frozenset(region - {event.number}))
    if branch is None and not _light_skip(flow, event, fork):
        c.computed_shortcut = True
        c.reason = f"both operands are computed from {_shape(values[fork].shape)} (a projection shortcut): the input is not carried on"
    elif values[fork].shape != values[result].shape:
        c.reason = f"the shortcut changes shape: {_shape(values[fork].shape)} -> {_shape(values[result].shape)}"
    elif not values[result].dtype.is_floating_point:
        c.reason = f"adds {values[result].dtype}, not floating point"
    elif branch is not None and values[branch].shape != values[result].shape:
        c.branch = None
    return c


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(s) for s in shape) or "scalar"


def _light_skip(flow: _Flow, event: Event, fork: int) -> bool:
    """Whether one operand comes from the fork by views, element-wise kernels and residual adds of the same sum."""
    for operand in (r.value for r in refs((event.args, event.kwargs))):
        at = operand
        for _ in range(_CLIMB):
            if at == fork:
                return True
            above = flow.event_of(at)
            if above is not None and above.is_addition and fork in flow.parents[at]:
                return True
            if not flow.is_light(at):
                break
            at = flow.activations(at)[0]
    return False


def _fork(flow: _Flow, first: int, second: int, forks: dict[int, int]) -> tuple[int, int | None] | None:
    """(fork, F(fork) if the add is literally fork + F(fork)), or None if neither operand comes from the other."""
    low, high = sorted((first, second))
    if flow.is_ancestor(low, high):
        return low, high
    best = None
    for side, other in ((first, second), (second, first)):
        at: int | None = side
        for _ in range(_CLIMB):
            at = _above(flow, at, forks)
            if at is None:
                break
            if flow.is_ancestor(at, other):
                best = at if best is None else max(best, at)
                break
    return None if best is None else (best, None)


def _above(flow: _Flow, value: int | None, forks: dict[int, int]) -> int | None:
    if value is None:
        return None
    if value in forks:
        return forks[value]
    above = flow.activations(value)
    return above[0] if len(above) == 1 else None


def _host(flow: _Flow, events: set[int]) -> int:
    """The innermost module call around all of these events."""
    common: tuple[int, ...] | None = None
    for number in events:
        calls = flow.recording.calls_around(number)
        if common is None:
            common = calls
        while common != calls[: len(common)]:
            common = common[:-1]
    return common[-1] if common else 0


def _absorb_sums(candidates: list[Candidate]) -> None:
    """x + A(x) + B(x) is one unit: an add of the same fork inside the region of a larger one belongs to that."""
    forks = {c.fork for c in candidates}
    for c in candidates:
        inner = [d for d in candidates if d is not c and d.fork == c.fork and d.add in c.region and d.out not in forks]
        c.absorbed = tuple(d.add for d in inner)
        for d in inner:
            d.reason = d.reason or "part of a sum that is one unit"


def _link(flow: _Flow, candidates: list[Candidate]) -> list[list[Candidate]]:
    by_result = {flow_result(flow, c): c for c in candidates}
    following: dict[int, Candidate] = {}
    preceded: set[int] = set()
    for c in candidates:
        before = _predecessor(flow, c, by_result)
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


def flow_result(flow: _Flow, c: Candidate) -> int:
    """The value that the addition of a candidate made."""
    return next(r.value for r in refs(flow.recording.events[c.add].out))


def _predecessor(flow: _Flow, c: Candidate, by_result: dict[int, Candidate]) -> Candidate | None:
    """The unit whose sum becomes the fork of ``c`` by calls of one activation each; sets its ``out``."""
    path: list[int] = []
    at = c.fork
    for _ in range(_CLIMB):
        if at in by_result:
            return by_result[at] if _attach(flow, by_result[at], c, path[::-1]) else None
        above = flow.activations(at)
        if len(above) != 1:
            return None
        path.append(at)
        at = above[0]
    return None


def _attach(flow: _Flow, before: Candidate, c: Candidate, path: list[int]) -> bool:
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


def _extend_last(flow: _Flow, chain: list[Candidate]) -> None:
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


def _inline(flow: _Flow, units: list[Candidate]) -> dict[int, set[int]]:
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
