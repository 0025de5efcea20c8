"""The residual adds of a recording: additions one of whose operands comes from the other.

Definitions, on the values (tensors) and events (calls) of a `Recording`:

- A *residual add* is an addition one of whose operands, the *skip*, is an ancestor of the other. The skip may have been
  scaled, dropped out or viewed on the way; ``fork`` is the value before that. A sum that is spelled otherwise (``x -
  f``, ``addcmul``, ``lerp``, a scaled addition, the sum of a stack) is one too where its branch multiplies by a matrix
  or convolves: ``x - mean(x)`` is a part of a norm.
- Its *region* is what lies on a path from the fork to the add. Its *host* is the innermost module call around all of
  it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import nn

from revwire._capture.recording import Event
from revwire._search.dataflow import Flow
from revwire._structures import Ref, leaves_of, refs

CLIMB = 64
"""How many calls a skip, or a post-activation path, may be long."""


PROJECTION = "both operands are computed from the input (a projection shortcut), which itself is not carried on"


@dataclass
class Candidate:
    """A residual add, and what was found out about it.

    Attributes:
        add: event number of the addition (of the host call, for a host that is one unit as a whole).
        result: value number of the sum (of the output, for a host that is one unit).
        fork: value number of the input of the unit.
        branch: value number of F(x) where the add is literally fork + F(fork), else None.
        out: value number of the output of the unit.
        post: events between the add and ``out`` (no views).
        views: events of views between the out of this unit and the fork of the next.
        host: event number of the module call that holds the unit.
        region: events between fork and add.
        absorbed: adds inside the region that belong to the same sum (parallel branches).
        whole: it is all that its host does, whose code stays closed.
        widens: it may end outside of its host, which becomes a larger module then.
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
    result: int = -1
    whole: bool = False
    widens: bool = True
    reason: str | None = None
    computed_shortcut: bool = False
    inside: bool = False


def residual_adds(flow: Flow) -> list[Candidate]:
    """Those of a recording, in order; looked for once, and each time other objects, as the search writes to them."""
    found = flow.recording.derived.get(Candidate)
    if found is None:
        found = flow.recording.derived[Candidate] = _residual_adds(flow)
    return [replace(c) for c in found]


def _residual_adds(flow: Flow) -> list[Candidate]:
    out: list[Candidate] = []
    forks: dict[int, int] = {}
    for event in flow.recording.events:
        if not event.is_addition:
            out += _spelled(flow, event, forks)
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


def _spelled(flow: Flow, event: Event, forks: dict[int, int]) -> list[Candidate]:
    """The residual add that a sum in other words than an addition is, if it is one."""
    results, values = [r.value for r in refs(event.out)], flow.recording.values
    for skip, other in _operands(flow, event) if len(results) == 1 else ():
        if not (flow.active[skip] and flow.active[other]) or values[other].shape != values[results[0]].shape:
            continue
        found = _fork(flow, skip, other, forks)
        if found is None or not _comes_lightly(flow, skip, found[0]):
            continue
        c = _candidate(flow, event, results[0], found[0], None, light=True)
        if any(flow.recording.events[e].is_product for e in c.region):
            forks[results[0]] = found[0]
            return [c]
    return []


def _operands(flow: Flow, event: Event) -> list[tuple[int, int]]:
    """What may be (the skip, the branch) in a sum that is spelled otherwise; none if it is no sum."""
    operands = [r.value for r in refs((event.args, event.kwargs))]
    if len(operands) > 1 and event.is_spelled_sum:
        first, *others = operands
        pairs = [(first, other) for other in others]
        return pairs + [(b, a) for a, b in pairs[:1]] if event.is_symmetric_sum else pairs
    stack = flow.event_of(operands[0]) if event.sums_up and operands else None
    if stack is None or not stack.stacks:
        return []
    parts = [r.value for r in refs((stack.args, stack.kwargs))]
    shapes = {flow.recording.values[v].shape for v in (*parts, *(r.value for r in refs(event.out)))}
    return [(parts[0], parts[1]), (parts[1], parts[0])] if len(parts) == 2 and len(shapes) == 1 else []


def _is_unseen(flow: Flow, first: int, second: int) -> bool:
    values = flow.recording.values
    return (flow.unseen[first] or flow.unseen[second]) and values[first].shape == values[second].shape


def _unseen(flow: Flow, event: Event, fork: int) -> Candidate:
    host = flow.recording.calls_around(event.number)[-1]
    reason = (
        "one operand comes from a tensor that was made by a call that cannot be seen, or that an object holds; hand it "
        "to the module as an argument, as a tensor"
    )
    return Candidate(
        event.number, fork, None, fork, host, frozenset(), result=next(refs(event.out)).value, reason=reason
    )


def _candidate(
    flow: Flow, event: Event, result: int, fork: int, branch: int | None, *, light: bool = False
) -> Candidate:
    values = flow.recording.values
    region = {values[v].event for v in flow.between(fork, result)}
    host = innermost_call(flow, region)
    c = Candidate(event.number, fork, branch, result, host, frozenset(region - {event.number}), result=result)
    if branch is None and not light and not _light_skip(flow, event, fork):
        c.computed_shortcut = True
        c.reason = PROJECTION
    elif flow.recording.events[host].hooked:
        c.reason = "lies in a hook of its module, at least in part; make the sum in the module's forward"
    elif values[fork].shape != values[result].shape:
        c.reason = f"the shortcut changes shape ({_shape(values[fork].shape)} -> {_shape(values[result].shape)})"
    elif not values[result].dtype.is_floating_point:
        c.reason = f"adds {values[result].dtype}, not floating point; streams are of real floating-point numbers"
    elif branch is not None and values[branch].shape != values[result].shape:
        c.branch = None
    return c


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(str(s) for s in shape) or "scalar"


def _light_skip(flow: Flow, event: Event, fork: int) -> bool:
    """Whether one operand comes from the fork by views, element-wise kernels and residual adds of the same sum."""
    return any(_comes_lightly(flow, operand.value, fork) for operand in refs((event.args, event.kwargs)))


def _comes_lightly(flow: Flow, value: int, fork: int) -> bool:
    """Whether a value comes from the fork by views, element-wise kernels and residual adds of the same sum."""
    for _ in range(CLIMB):
        if value == fork:
            return True
        above = flow.event_of(value)
        if above is not None and above.is_addition and fork in flow.parents[value]:
            return True
        if not flow.is_light(value):
            break
        value = flow.activations(value)[0]
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


def innermost_call(flow: Flow, events: Iterable[int]) -> int:
    """The innermost module call around all of these events."""
    common: tuple[int, ...] | None = None
    for number in events:
        calls = flow.recording.calls_around(number)
        if common is None:
            common = calls
        while common != calls[: len(common)]:
            common = common[:-1]
    return common[-1] if common else 0


def whole_call(flow: Flow, call: int, candidates: list[Candidate]) -> Candidate | None:
    """A module call as one unit: from an input of its own to an output of the same shape, by residual adds; None if it
    has no such.

    The code of the module is not opened, so another output must not be made from this one, nor an input be written to.
    """
    event, values = flow.recording.events[call], flow.recording.values
    ends = list(dict.fromkeys(leaf.value for leaf in _plain_leaves(event.out) if isinstance(leaf, Ref)))
    starts = {leaf.value for leaf in _plain_leaves((event.args, event.kwargs)) if isinstance(leaf, Ref)}
    forks = {
        c.result: c.fork
        for c in candidates
        if call < c.add < event.end and values[c.fork].shape == values[c.result].shape
    }
    for out in ends:
        fork = _spine(flow, out, starts, forks)
        if fork is None or _has_effects(flow, call, starts):
            continue
        if values[fork].shape == values[out].shape and not any(flow.is_ancestor(out, other) for other in ends):
            region = frozenset(range(call + 1, event.end))
            return Candidate(call, fork, None, out, call, region, result=out, whole=True)
    return None


def _plain_leaves(structure: Any) -> Iterator[Any]:
    """The leaves of a recorded structure that are not inside of an object."""
    return leaves_of(structure, into_objects=False)


def _spine(flow: Flow, value: int, starts: set[int], forks: dict[int, int]) -> int | None:
    """The start from which a value comes by residual adds (at least one), and by steps between them."""
    residual = False
    for _ in range(CLIMB):
        if value in starts:
            return value if residual else None
        if value in forks:
            value, residual = forks[value], True
            continue
        hop = flow.hop_up(value)
        if hop is None:
            return None
        value = hop[0]
    return None


def can_run_twice(flow: Flow, call: int) -> bool:
    """Whether a module call, made twice, leaves behind what it leaves when it is made once (buffers, which are
    exchanged, aside).
    """
    event = flow.recording.events[call]
    starts = {leaf.value for leaf in leaves_of((event.args, event.kwargs)) if isinstance(leaf, Ref)}
    return not _has_effects(flow, call, starts)


def _holds_nothing(module: nn.Module) -> bool:
    """Whether it is a layer of PyTorch's without any state, such as a softmax that is made where it is called."""
    tensors = chain(module.parameters(), module.buffers())
    return type(module).__module__.startswith("torch.nn.") and next(tensors, None) is None


def _has_effects(flow: Flow, call: int, starts: set[int]) -> bool:
    """Whether a call, made twice, would leave something else behind than made once."""
    recording = flow.recording
    values, inside = recording.values, recording.events[call : recording.events[call].end]
    memory = {values[s].storage for s in starts}
    drawn = any(read.kind in ("random", "state") and call <= read.parent < inside[0].end for read in recording.reads)
    unnamed = (e.target for e in inside if e.is_module and id(e.target) not in recording.module_names)
    foreign = not all(map(_holds_nothing, unnamed))
    written = any(values[before].storage in memory for e in inside for before, _ in e.writes)
    return inside[0].hooked or bool(inside[0].changes) or drawn or foreign or written
