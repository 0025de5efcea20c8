"""In words: what stays of a model, with one line for all that stays for the same reason, and why nothing is rewired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from revwire._search.chains import ALONE, CALLER

_SHOWN = 8
"""How many names of one line are shown."""


@dataclass(frozen=True)
class Skipped:
    """A residual add that stays as it is, and why."""

    path: str
    reason: str
    computed_shortcut: bool = False
    inside_unit: bool = False

    @property
    def kind(self) -> str:
        """The reason without the name of the module that it may begin with."""
        first, _, rest = self.reason.partition(" ")
        names_its_host = self.path == first or self.path.startswith((f"{first}.", f"{first}#"))
        return rest if names_its_host else self.reason


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
    return lines + ([f"{inside} more lie inside the branches of rewired units"] if inside else [])


def _line(several: Sequence[Skipped]) -> str:
    """The line of those that stay for one reason: ``  4.blocks.0, 4.blocks.1 (2 times): stands alone``."""
    counts = Counter(s.path for s in several)
    names = [f"{path} ({count} times)" if count > 1 else path for path, count in counts.items()]
    if len(names) == 1:
        return f"  {names[0]}: {several[0].reason}"
    more = len(names) - _SHOWN
    return f"  {', '.join(names[:_SHOWN])}{f' and {more} more' if more > 0 else ''}: {several[0].kind}"


def why_nothing(skipped: Sequence[Skipped]) -> str:
    """Why a model has nothing to rewire, in one line: the commonest reason, and what would help."""
    if not skipped:
        return (
            "the run on the example made no residual add (a tensor, and what was computed from it, added up), or made "
            "it where it cannot be seen; expected a network of residual blocks, converted before it is compiled or "
            "scripted"
        )
    reason, count = Counter(s.kind for s in skipped).most_common(1)[0]
    return f"of {len(skipped)} residual adds, {count} stay because: {reason}; {_way_out(reason)}"


def _way_out(reason: str) -> str:
    if reason.startswith(CALLER):
        return "let more through by include= and exclude="
    if reason == ALONE:
        return "deeper stages would have chains; checkpoint='stays' recomputes such blocks one by one"
    return "checkpoint='stays' recomputes the blocks that stay, and revwire.plan(model, x) lists them all"
