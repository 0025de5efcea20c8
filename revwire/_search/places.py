"""How the own code of a host is met at a unit again, in a run that may decide otherwise than the example did.

A unit begins where the code first uses a state, and ends with its residual add, or a few calls behind it. A state is
known by its link; where a chain begins, by where it came from in the example: an argument, or the result of a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from revwire._capture.lines import shown
from revwire._capture.reads import name_of
from revwire._capture.recording import HIDDEN, HOOKED, Event, Recording, at
from revwire._errors import CaptureError
from revwire._search.dataflow import flow_of
from revwire._search.residuals import Candidate
from revwire._search.units import CLOSED
from revwire._structures import Opaque, Ref, is_mapping, is_sequence, refs
from revwire._surroundings.inventory import has_hooks

INSIDE_A_MODULE = (
    "keeps a part of a residual unit inside a module that is called for something else{}; make the sum in the block's "
    "own forward, or name the block in whole="
)
WITHOUT_GRADIENTS = "makes a residual add without gradients{}; make it outside of torch.no_grad()"
TO_ITS_INPUT = "adds in place to its own input{}; write x = x + f(x)"
TO_ANOTHER_NAME = "adds in place to a tensor that is used again under another name{}; write x = x + f(x)"
WRITTEN_UNDER_ANOTHER_NAME = "goes on with a tensor that is written to under another name{}; write to a clone"
NOT_ITS_OWN = "writes in place to a tensor that is not its branch's own{}; write to a clone"
"""Why units cannot be taken out of a host's code, with the line of the code, and what would help."""


Path = tuple[Any, ...]
"""Keys, indices and names of fields that lead to a tensor in a structure."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from.

    Attributes:
        path: leads to it: in (args, kwargs) of the host, or in the result of a call.
        call: the name of the module (with a dot in front) or of the function that gave it, or None: an argument.
        number: how many such calls there were before.
    """

    path: Path
    call: str | None = None
    number: int = 0


@dataclass(frozen=True)
class Place:
    """How a unit shows in its host's code.

    Attributes:
        block: it is rewired as F = block(x) - x.
        literal: the state itself is an operand of its add.
        spelled: the name of the function that is its sum, where that is no addition (``x - f``, ``lerp``); else None.
        adds: how many such sums there are from its beginning to its own.
        posts: how many calls there are behind the add.
        idle: how many calls there are behind it that handed the sum back in the example (a dropout in eval mode), where
            there are no others.
        writes: a call behind the add writes to the sum.
        drops: the skip is dropped.
        views: how many views of the state may lie before it, and behind it.
        origin: of the tensor that it begins with.
        line: of the code that makes its add.
        modules: that its branch calls, by their names in the host.
        out: for a host that is one unit, where its output is in what the host returns.
    """

    block: bool
    literal: bool
    spelled: str | None
    adds: int
    posts: int
    idle: int
    writes: bool
    drops: bool
    views: tuple[int, int]
    origin: Origin | None
    modules: tuple[str, ...]
    out: Path | None = None
    line: str = ""


@dataclass(frozen=True)
class Layout:
    """How all units of a host show: in order, with the names of the modules whose code is followed like the host's.

    Attributes:
        whole: it is one unit, and its code stays closed.
        opaque: its code makes calls that no function mode sees.
    """

    places: tuple[Place, ...]
    opened: tuple[str, ...]
    whole: bool = False
    opaque: bool = False


def layout(recording: Recording, units: Sequence[Candidate], inline: set[int], drops: Sequence[bool]) -> Layout:
    """The layout of a host.

    Args:
        recording: a run of the host alone.
        units: as `find_units` gave them.
        inline: the module calls to open.
        drops: for each unit, whether its skip is dropped.

    Raises:
        CaptureError: the units cannot be met in the host's code; the message is a short reason.
    """
    if inline == CLOSED:
        return Layout((_whole(recording, units[0]),), (), whole=True)
    seen = _Seen(recording, inline)
    seen.refuse_hooks()
    seen.refuse_what_is_not_seen()
    places = tuple(seen.place(c, drop) for c, drop in zip(units, drops, strict=True))
    opened = tuple(dict.fromkeys(seen.name(recording.events[n]) for n in sorted(inline)))
    return Layout(places, opened, opaque=seen.has_opaque_calls)


def _whole(recording: Recording, c: Candidate) -> Place:
    top = recording.events[0]
    start, out = path_to((top.args, top.kwargs), c.fork), path_to(top.out, c.out)
    if start is None or out is None:
        raise CaptureError("hides the stream in an object; hand it on as a tensor, or in a tuple, list or dict")
    return Place(True, False, None, 1, 0, 0, False, False, (0, 0), Origin(start), ("",), out)


class _Seen:
    """What shows of a run in the code of its root and of the calls ``inline``."""

    def __init__(self, recording: Recording, inline: set[int]) -> None:
        self.recording, self.flow = recording, flow_of(recording)
        self.inline, self.code = inline, {0, *inline}
        self.events = [e for e in recording.events[1:] if e.parent in self.code and e.number not in inline]

    def shown(self, number: int) -> int:
        """The call in that code in which an event lies."""
        event = self.recording.events[number]
        while event.parent not in self.code:
            event = self.recording.events[event.parent]
        return event.number

    def name(self, event: Event) -> str:
        names = self.recording.module_names.get(id(event.target), ())
        return names[0] if names else "?"

    def refuse_what_is_not_seen(self) -> None:
        """State of tensors that is changed, and calls that nothing sees."""
        for e in self.events:
            if not e.is_module and any(self.recording.values[r.value].custom for r in refs(e.out)):
                raise CaptureError(
                    f"calls a custom autograd function by a name bound to its apply{e.at}; call Function.apply itself"
                )
        for read in self.recording.reads:
            if read.parent in self.code and read.kind == "state":
                raise CaptureError(f"{HIDDEN['state'].format(read.name)}{at(read.line)}; do so outside of the block")

    @property
    def has_opaque_calls(self) -> bool:
        """Whether there are calls that do not show in a function mode."""
        return any(e.opaque for e in self.events)

    def refuse_hooks(self) -> None:
        for n in self.inline:
            call = self.recording.events[n]
            if has_hooks(call.target):
                kind = type(call.target).__name__
                raise CaptureError(f"{HOOKED.format(kind)}{call.at}; remove them before it is converted")

    def place(self, c: Candidate, drops: bool) -> Place:
        events = self.recording.events
        self.check(c)
        literal = c.branch is not None
        spelled = None if events[c.add].is_addition else name_of(events[c.add].target)
        post = list(dict.fromkeys(self.shown(e) for e in c.post))
        calls = list(dict.fromkeys(self.shown(e) for e in (*c.region, *c.post)))
        called = [events[n] for n in calls if events[n].is_module]
        drops = drops and literal and bool(post)
        sum_of = self.recording.values[c.result].storage
        idle = self.idle(c, post)
        after = [e for n in post for e in events[n : max(events[n].end, n + 1)]]
        return Place(
            block=not literal or (bool(post) and not drops),
            literal=literal,
            spelled=spelled,
            adds=self.adds(c, literal, spelled),
            posts=len(post) + idle if post else 0,
            idle=0 if post else idle,
            writes=any(self.recording.values[b].storage == sum_of for e in after for b, _ in e.writes),
            drops=drops,
            views=(len(c.lead), max(len(c.views), self.views_behind(c.out))),
            origin=self.origin(c.fork),
            modules=tuple(dict.fromkeys(self.name(e) for e in called)),
            line=shown(events[c.add].line),
        )

    def check(self, c: Candidate) -> None:
        events, values = self.recording.events, self.recording.values
        add = events[c.add]
        if add.parent not in self.code:
            raise CaptureError(INSIDE_A_MODULE.format(add.at))
        if add.modes[:2] != events[0].modes[:2]:
            raise CaptureError(WITHOUT_GRADIENTS.format(add.at))
        if any(values[before].storage == values[c.fork].storage for before, _ in add.writes):
            raise CaptureError(TO_ITS_INPUT.format(add.at))
        written = {after for _, after in add.writes if after != c.result}
        if any(r.value in written for e in events[c.add + 1 :] for r in refs((e.args, e.kwargs))):
            raise CaptureError(TO_ANOTHER_NAME.format(add.at))
        inside = {self.shown(e) for e in (*c.region, c.add, *c.post)}
        given = {r.value for r in refs((events[0].args, events[0].kwargs))}
        for number in inside:
            for e in reversed(events[number : max(events[number].end, number + 1)]):  # a call, before the module around
                for before, _ in e.writes:
                    first = next(v for v in values if v.storage == values[before].storage)
                    made = first.event >= 0 and self.shown(first.event) not in inside
                    if first.number in given or made:
                        raise CaptureError(NOT_ITS_OWN.format(e.at))

    def adds(self, c: Candidate, literal: bool, spelled: str | None) -> int:
        count = 0
        for e in self.events:
            if e.number > c.add or not (e.is_addition if spelled is None else self.target(e) == spelled):
                continue
            given = [r.value for r in refs((e.args, e.kwargs))]
            own = [v == c.fork for v in given]
            comes = [o or self.flow.is_ancestor(c.fork, v) for o, v in zip(own, given, strict=True)]
            count += any(comes) if spelled else all(comes) and (any(own) or not literal)
        return count

    def idle(self, c: Candidate, post: Sequence[int]) -> int:
        """How many calls behind the add gave back what they were given."""
        made = {c.result, *(r.value for n in post for r in refs(self.recording.events[n].out))}
        count = 0
        for e in self.events:
            if e.number <= c.add or e.number in post:
                continue
            given = {r.value for r in refs((e.args, e.kwargs))}
            if isinstance(e.out, Ref) and e.out.value in made & given and not e.writes:
                count += 1
            elif c.out in given:
                return count
        return count

    def views_behind(self, value: int) -> int:
        """How many views of a value follow each other, of which nothing else is used."""
        count = 0
        while True:
            users = [e for e in self.events if any(r.value == value for r in refs((e.args, e.kwargs)))]
            if len(users) != 1 or users[0].is_module or not users[0].view or not isinstance(users[0].out, Ref):
                return count
            count, value = count + 1, users[0].out.value

    def origin(self, value: int) -> Origin | None:
        top = self.recording.events[0]
        path = path_to((top.args, top.kwargs), value)
        if path is not None:
            return Origin(path)
        producer = self.recording.values[value].event
        if producer < 0:
            return None
        call = self.recording.events[self.shown(producer)]
        path = path_to(call.out, value)
        if path is None:
            raise CaptureError((INSIDE_A_MODULE if call.is_module else WRITTEN_UNDER_ANOTHER_NAME).format(call.at))
        target = self.target(call)
        before = sum(self.target(e) == target for e in self.events if e.number < call.number)
        return Origin(path, target, before)

    def target(self, event: Event) -> str:
        return f".{self.name(event)}" if event.is_module else name_of(event.target)


def path_to(structure: Any, value: int) -> Path | None:
    """Where a value is in a recorded structure."""
    return next((path for path, leaf in _paths(structure) if isinstance(leaf, Ref) and leaf.value == value), None)


def _paths(structure: Any) -> Iterator[tuple[Path, Any]]:
    if is_sequence(structure):
        items: Any = enumerate(structure)
    elif is_mapping(structure):
        items = structure.items()
    elif isinstance(structure, Opaque) and structure.fields is not None:
        items = [(_Field(name), item) for name, item in structure.fields.items()]
    else:
        yield (), structure
        return
    for key, item in items:
        for path, leaf in _paths(item):
            yield (key, *path), leaf


class _Field(str):
    """A key that is the name of an attribute."""

    __slots__ = ()


def found_at(path: Path, structure: Any) -> Any:
    """What is at a path; None where there is no such."""
    for key in path:
        try:
            structure = getattr(structure, key) if isinstance(key, _Field) else structure[key]
        except (KeyError, IndexError, AttributeError, TypeError):
            return None
    return structure
