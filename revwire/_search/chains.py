"""The search: recording -> residual units and the chains they form. Dataflow only; no module, no name decides.

Definitions, besides those of `residuals`:

- A *unit* runs from its fork to its *out*: the add, and what is done to the sum before it becomes a fork again (a
  post-activation, a post-normalisation).
- Units whose out is the next one's fork, but for views, form a *chain*.
- Between two units of a chain no matrix is multiplied with, and nothing convolved: a block that ends so is far from the
  identity, and rewired as x + (block(x) − x) it would not keep its function.
- A host whose code cannot be taken apart, or a module of which the caller wants that, may be a unit *as a whole*: from
  one of its inputs to one of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from revwire._capture.recording import Recording
from revwire._search.dataflow import Flow, flow_of
from revwire._search.ends import what_ends_it
from revwire._search.hosts import opened_calls, separate
from revwire._search.links import climb, extend_last, predecessor
from revwire._search.nesting import leanest, levels
from revwire._search.residuals import Candidate, residual_adds, whole_call

PART_OF_WHOLE = "a part of a block whose code cannot be taken apart, and which is rewired as a whole"


PART_AS_ASKED = "a part of a block that is rewired as a whole, as the caller wants it"


INSIDE = "inside the branch of another unit, which is the larger saving"


SPANS = "its branch holds units that are rewired, which keep less than it would"


ALONE = "stands alone: a chain needs at least two units whose streams follow each other unchanged"


CALLER = "excluded"
"""How the reasons begin that are the caller's own wish."""


@dataclass
class Search:
    """The result: chains of at least two units, and every other residual add with its reason."""

    chains: list[list[Candidate]] = field(default_factory=list)
    rejected: list[Candidate] = field(default_factory=list)


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
    flow = flow_of(recording)
    candidates = residual_adds(flow)
    asked = {
        call for c in candidates if c.reason is None for call in [call for call in whole(c) if call not in barred][:1]
    }
    units = _units(flow, candidates, asked, refuse)
    chains = leanest(flow, _ways_to_nest(flow, sorted(units, key=lambda c: c.result), shortest))
    separate(flow, chains)
    alone = asked - {c.add for chain in chains for c in chain}
    if alone:
        return Search(), alone
    rejected = _rejected(flow, candidates, chains)
    opened_calls(flow, [c for chain in chains for c in chain])  # a host that another one opens gives its units to that
    return Search(chains, rejected), alone


def _units(flow: Flow, candidates: list[Candidate], asked: set[int], refuse: Refusal) -> list[Candidate]:
    """What may be a unit: residual adds, the calls that the caller wants whole, and hosts that can only be whole."""
    found = _wholes(flow, candidates, asked, refuse)
    calls = {w.add for w in found}
    for c in candidates:
        if c.reason is None and not calls.isdisjoint(flow.recording.calls_around(c.add)):
            c.reason = PART_AS_ASKED
    closed = {call for c in candidates if c.reason is None for call in _refused(flow.recording, c, refuse)}
    _absorb_sums(candidates)
    good = [c for c in candidates if c.reason is None]
    return [*good, *_wholes(flow, candidates, sorted(closed), refuse), *found]


def _wholes(flow: Flow, candidates: list[Candidate], calls: Iterable[int], refuse: Refusal) -> list[Candidate]:
    """Those of these calls that may be one unit each."""
    wholes = [whole_call(flow, call, candidates) for call in calls]
    return [w for w in wholes if w is not None and refuse(w) is None]


def _rejected(flow: Flow, candidates: list[Candidate], chains: list[list[Candidate]]) -> list[Candidate]:
    """The residual adds that are in no chain, each with its reason."""
    units = [c for chain in chains for c in chain]
    taken = {add for c in units for add in (c.add, *c.absorbed, *c.post)}
    rejected = [c for c in candidates if c.add not in taken]
    for c in rejected:
        outer = next((u for u in units if c.add in u.region), None)
        if outer is None:
            c.reason = c.reason or (_alone(flow, c, candidates) if taken.isdisjoint(c.region) else SPANS)
            continue
        c.inside = True
        if c.reason != PART_AS_ASKED:
            host = f"{_name(flow.recording, c.host)} "
            cause = f": it {c.reason.removeprefix(host)}" if c.reason and c.reason.startswith(host) else ""
            c.reason = f"{PART_OF_WHOLE}{cause}" if outer.whole else INSIDE
    return rejected


def _alone(flow: Flow, c: Candidate, candidates: list[Candidate]) -> str:
    ends = what_ends_it(flow, c, candidates)
    return f"{ALONE} ({ends})" if ends else ALONE


def _refused(recording: Recording, c: Candidate, refuse: Callable[[Candidate], str | None]) -> list[int]:
    """Ask ``refuse``; returns the host, if that is what cannot be taken apart.

    Where a larger module than the unit's own host could not, the unit may still do without what it was needed for.
    """
    c.reason = refuse(c)
    if c.reason is None or c.reason.startswith(CALLER):
        return []
    if c.reason.startswith(f"{_name(recording, c.host)} "):
        return [c.host]
    c.reason, c.widens = None, False
    return []


def _name(recording: Recording, call: int) -> str:
    """The module of a call, as reasons name it."""
    return next(iter(recording.module_names.get(id(recording.events[call].target), ())), "") or "the model"


def _absorb_sums(candidates: list[Candidate]) -> None:
    """x + A(x) + B(x) is one unit: an add of the same fork inside the region of a larger one belongs to that."""
    forks = {c.fork for c in candidates}
    for c in (c for c in candidates if c.reason is None):
        inner = [d for d in candidates if d is not c and d.fork == c.fork and d.add in c.region and d.out not in forks]
        c.absorbed = tuple(d.add for d in inner)
        for d in inner:
            d.reason = d.reason or "part of a sum that is one unit"


def _ways_to_nest(flow: Flow, units: list[Candidate], shortest: int) -> list[list[list[Candidate]]]:
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


def _chains_of(
    flow: Flow, units: list[Candidate], shortest: int, *, larger_first: bool = False
) -> list[list[Candidate]]:
    return _outermost(_linked(flow, [replace(c) for c in units], larger_first=larger_first), shortest)


def _linked(flow: Flow, candidates: list[Candidate], *, larger_first: bool = False) -> list[list[Candidate]]:
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
        extend_last(flow, chain)
        chains.append(chain)
    return chains


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
