"""Globs over qualified names: the one place where a caller's patterns meet the names of modules and units."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
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


def refuse_idle_globs(option: str, globs: Iterable[str], names: Iterable[str], what: str = "unit") -> None:
    """Raise where a glob matches none of the names of ``what``.

    Raises:
        ConversionError: names the option, the glob, and the names nearest to it.
    """
    names = tuple(dict.fromkeys(names))
    for glob in globs:
        if not matches(names, [glob]):
            some = ", ".join(nearest(glob, filter(None, names)))
            raise idle_glob(option, glob, f"which matches no {what}", f"one that does: {some} ...")


def nearest(glob: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The names that a glob with a typing error may have meant, the likeliest first; the first names where none is like
    it.

    A glob is compared with as many parts of a name as it has itself: ``blokcs.*`` is like ``blocks.0``.
    """
    parts = glob.replace("*", "").rstrip(".").split(".")
    beginnings: dict[str, str] = {}
    for name in names:
        beginnings.setdefault(".".join(name.split(".")[: len(parts)]), name)
    close = get_close_matches(".".join(parts), beginnings, most)
    return [beginnings[beginning] for beginning in close or list(beginnings)[:most]]
