"""How far long work is: one line on a terminal, which goes when it is done, and nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

PATIENCE = 2.0
"""Seconds without a line: short work is left alone."""


class Progress:
    """Counts the steps of long work, of at most so many.

    Args:
        most: how many there may be.
        what: is done in a step.
        after: so many seconds from its begin, it is shown.

    Example:
        >>> with Progress(3, "reading part") as progress:
        ...     for _ in range(3):
        ...         progress.advance()
        >>> progress.left
        0
    """

    def __init__(self, most: int, what: str = "measuring step", after: float = PATIENCE) -> None:
        self.most, self.what, self.after = most, what, after
        self.done, self.width, self.since = 0, 0, time.monotonic()

    @property
    def left(self) -> int:
        """How many more there may be."""
        return self.most - self.done

    def advance(self) -> None:
        """A step begins."""
        self.done += 1
        if time.monotonic() - self.since >= self.after:
            self._show(f"revwire: {self.what} {self.done} of at most {max(self.most, self.done)}")

    def counting(self, step: Callable[[], object]) -> Callable[[], object]:
        """A step that counts itself."""

        def counted() -> object:
            self.advance()
            return step()

        return counted

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.width:
            self._show("")

    def _show(self, line: str) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            sys.stderr.write(f"\r{line.ljust(self.width)}" + ("" if line else "\r"))
            sys.stderr.flush()
            self.width = len(line)
