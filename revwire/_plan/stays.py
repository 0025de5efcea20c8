"""In words: what stays of a model, with one line for all that stays for the same reason, and why nothing is rewired."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from revwire._search.chains import ALONE, PART_OF_WHOLE

_SHOWN = 8
"""How many names of one line are shown."""


_LINES_SHOWN = 3


_SHAPES = re.compile(r" \([x\d]+ -> [x\d]+\)")


_ENDS = re.compile(rf"(?<={re.escape(ALONE)}) \((.*?)\)")
"""What ends the stream of an add that stands alone."""


DOES_NOT_PAY = (
    "its chain would not lower the peak of a step below what checkpointing needs, and stays what it is; "
    "rewire='everywhere' rewires it all the same"
)
"""Why the chains stay that the leanest layout leaves alone."""


@dataclass(frozen=True)
class Skipped:
    """A residual add that stays as it is, and why.

    Attributes:
        path: qualified name: the host module, and the part of it that is the branch.
        reason: why it stays, and what would help.
        computed_shortcut: neither operand is the input itself (a projection).
        inside_unit: it lies in the branch of a unit that is rewired, and is recomputed with it.
        line: of the code that makes the add, ``package/models/net.py:215``; "" where it is not known.
    """

    path: str
    reason: str
    computed_shortcut: bool = False
    inside_unit: bool = False
    line: str = ""

    @property
    def in_closed_block(self) -> bool:
        """Whether it is a part of a block whose code cannot be taken apart, and which is rewired as a whole."""
        return self.reason.startswith(PART_OF_WHOLE)

    @property
    def kind(self) -> str:
        """The reason without the name of the module that it may begin with, and without what differs in a kind."""
        first, _, rest = self.reason.partition(" ")
        names_its_host = self.path == first or self.path.startswith((f"{first}.", f"{first}#"))
        return _ENDS.sub("", _SHAPES.sub("", rest if names_its_host else self.reason))


def stays_lines(skipped: Iterable[Skipped]) -> list[str]:
    """One line per reason for which residual adds stay, with the names of some; those inside a rewired branch are
    recomputed with it, and only counted.
    """
    skipped = tuple(skipped)
    by_kind: dict[str, list[Skipped]] = {}
    for s in skipped:
        if not s.inside_unit:
            by_kind.setdefault(s.kind, []).append(s)
    total, inside = sum(map(len, by_kind.values())), sum(s.inside_unit for s in skipped)
    lines = [f"stays: {total} residual adds"] if total else []
    lines += [_line(several) for several in by_kind.values()]
    closed: dict[str, list[Skipped]] = {}
    for s in skipped:
        if s.inside_unit and s.in_closed_block:
            closed.setdefault(s.kind, []).append(s)
    count = sum(map(len, closed.values()))
    whole = f", {count} of them in blocks that are rewired as a whole" if count else ""
    lines += [f"{inside} more lie inside the branches of rewired units{whole}"] if inside else []
    return lines + [_line(several) for kind, several in closed.items() if kind != PART_OF_WHOLE]


def _line(several: Sequence[Skipped]) -> str:
    """The line of those that stay for one reason: ``  blocks.0, blocks.1 (2 times), at net.py:12: stands alone``."""
    counts = Counter(s.path for s in several)
    names = _some([f"{path} ({count} times)" if count > 1 else path for path, count in counts.items()], _SHOWN)
    lines = _some([*dict.fromkeys(s.line for s in several if s.line)], _LINES_SHOWN)
    first = several[0]
    reason = first.reason
    if len({s.reason for s in several}) > 1:
        ends = _ENDS.search(first.reason)
        reason = first.kind + (f" ({first.path}: {ends[1]})" if ends else "")
    return f"  {names}{f', at {lines}' if lines else ''}: {reason}"


def _some(names: Sequence[str], count: int) -> str:
    more = len(names) - count
    return ", ".join(names[:count]) + (f" and {more} more" if more > 0 else "")


def why_nothing(skipped: Sequence[Skipped]) -> str:
    """Why a model has nothing to rewire, in one line: the commonest reason, and what would help."""
    if not skipped:
        return (
            "the run on the example made no residual add (a tensor, and what was computed from it, added up), or made "
            "it where it cannot be seen; expected a network of residual blocks, converted before it is compiled or "
            "scripted"
        )
    reason, count = Counter(s.kind for s in skipped).most_common(1)[0]
    lines = _some([*dict.fromkeys(s.line for s in skipped if s.kind == reason and s.line)], _LINES_SHOWN)
    return (
        f"of {len(skipped)} residual adds, {count} stay{f', at {lines},' if lines else ''} because: {reason}; "
        "revwire.plan(model, x) lists them all"
    )
