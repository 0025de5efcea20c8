"""How far a plan is: one line on a terminal, which goes when it is done, and nothing elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType


class Progress:
    """Counts the steps that are measured, of at most so many."""

    def __init__(self, most: int) -> None:
        self.most, self.done, self.width = most, 0, 0

    @property
    def left(self) -> int:
        """How many more there may be."""
        return self.most - self.done

    def advance(self) -> None:
        """A step begins."""
        self.done += 1
        self._show(f"revwire: measuring step {self.done} of at most {max(self.most, self.done)}")

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
