"""Globs over qualified names: the one place where a caller's patterns meet the names of modules and units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from revwire._errors import ConversionError

T = TypeVar("T")


def matches(names: Iterable[str], globs: Iterable[str]) -> bool:
    """Whether any of a thing's names matches any of the globs; case counts, and ``*`` goes across dots."""
    globs = tuple(globs)
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def first_match(names: Iterable[str], table: Iterable[tuple[str, T]], default: T) -> T:
    """What the first glob of ``table`` that matches one of the names stands for."""
    names = tuple(names)
    return next((value for glob, value in table if matches(names, [glob])), default)


def idle_glob(option: str, glob: str, effect: str, expected: str) -> ConversionError:
    """The error that says that a glob does nothing.

    Args:
        option: the argument of `convert` that holds it.
        glob: the caller's.
        effect: what it should have done, as "which matches no unit".
        expected: what would do it.
    """
    return ConversionError(f"{option}: got the glob {glob!r}, {effect}; expected {expected}")


def refuse_idle_globs(option: str, globs: Iterable[str], units: Sequence[tuple[str, ...]]) -> None:
    """Raise where a glob matches none of the units, given by their names.

    Raises:
        ConversionError: names the option, the glob, and some units.
    """
    for glob in globs:
        if not any(matches(names, [glob]) for names in units):
            some = ", ".join(names[0] for names in units[:3])
            raise idle_glob(option, glob, "which matches no unit", f"one that does: {some} ...")
