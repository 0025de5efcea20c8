"""What is wrong with a command line."""

from __future__ import annotations

from revwire import RevwireError

Shape = tuple[int, ...]


class UsageError(RevwireError, ValueError):
    """Something on the command line that does not exist or does not fit; the message says what does."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
