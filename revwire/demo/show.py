"""How the demo prints: headings, tables, a bar while something takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

T = TypeVar("T")


class Show:
    """A console, with the few things the demo says."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)

    def title(self, text: str) -> None:
        """Begin a part."""
        self.console.print()
        self.console.rule(f"[bold]{text}", align="left")

    def say(self, text: object) -> None:
        """Print as it is: no markup, no wrapping."""
        self.console.print(str(text), markup=False, soft_wrap=True)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner and the time gone by."""
        with self._progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as progress:
            progress.add_task(what, total=None)
            yield

    def counted(self, steps: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Pass ``steps`` on, under a bar."""
        with self._progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as progress:
            yield from progress.track(steps, total=total, description=what)

    def _progress(self, *columns: SpinnerColumn | TextColumn | BarColumn | TimeElapsedColumn) -> Progress:
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def predictions(self, names: Iterable[str], before: Tensor, after: Tensor, categories: list[str]) -> None:
        """Top-5 of each input before and after conversion; ``before`` and ``after`` are logits (inputs, categories)."""
        table = Table("input", "top-5 before", "top-5 after")
        for name, b, a in zip(names, before, after, strict=True):
            table.add_row(name, _top(b, categories), _top(a, categories), end_section=True)
        self.console.print(table)
        same = (before.argmax(1) == after.argmax(1)).sum().item()
        self.say(
            f"top-1 unchanged on {same} of {len(before)}; largest change of a probability {_moved(before, after):.4f}"
        )

    def losses(self, losses: list[float]) -> None:
        """A run of losses, on one line."""
        self.say("loss: " + "  ".join(f"{loss:.3f}" for loss in losses))

    def verdict(self, passed: bool) -> None:
        """The last line."""
        self.console.print()
        self.say("every check passed" if passed else "A CHECK FAILED: see above")


def _top(logits: Tensor, categories: list[str], k: int = 5) -> str:
    values, indices = logits.softmax(-1).topk(k)
    return "\n".join(
        f"{value:6.1%} {categories[i]}" for value, i in zip(values.tolist(), indices.tolist(), strict=True)
    )


def _moved(before: Tensor, after: Tensor) -> float:
    return (before.softmax(-1) - after.softmax(-1)).abs().max().item()
