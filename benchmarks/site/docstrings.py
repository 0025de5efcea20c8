"""An extension of Griffe (``mkdocs.yml`` names it): our docstrings, in the words that it knows."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_GROUP = re.compile(r"^( +)((?:\w+,\s+)+\w+): ((?:.*)(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """``Example:`` is a section, and what is said of several arguments at once is said of each."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that is read."""
        if obj.docstring:
            obj.docstring.value = spelled_out(obj.docstring.value)


def spelled_out(text: str) -> str:
    """The docstring with its groups of arguments taken apart."""

    def each(group: re.Match[str]) -> str:
        names = re.split(r",\s+", group[2])
        return "\n".join(f"{group[1]}{name}: {group[3]}" for name in names)

    return _GROUP.sub(each, _EXAMPLE.sub(r"\1Examples:", text))
