"""How the demo prints: headings, tables, a bar while something takes long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from string import ascii_uppercase
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from torch import Tensor

from revwire import Check, Plan
from revwire.demo.costs import Cost
from revwire.demo.curve import MIB
from revwire.demo.texts import PASSAGES, QUESTIONS

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
        """Print without markup, wrapped between words."""
        self.console.print(str(text), markup=False)

    def plain(self, text: str) -> None:
        """Print as it is, line by line."""
        self.console.print(text, markup=False, soft_wrap=True)

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

    def plan(self, plan: Plan) -> None:
        """What a conversion rewired, in two sentences; and what that makes of a step's peak, on paper."""
        self.say(str(plan).splitlines()[0])
        for chain in plan.chains:
            self.say(f"{chain.name}: {len(chain.units)} units of {chain.units[0].host} ..., {chain.coupling}")
        if plan.checkpointed:
            self.say(f"checkpointed outside of chains: {len(plan.checkpointed)} modules")
        if plan.peaks:
            self.say(f"forecast, {plan.peaks}")

    def moved(self, before: Tensor, after: Tensor) -> None:
        """By how much conversion moved what a network gives."""
        share = ((after - before).norm() / before.norm()).item()
        self.say(f"conversion moved the outputs by {share:.2%}" if share else "the outputs are the same to the bit")

    def predictions(self, names: Iterable[str], before: Tensor, after: Tensor, categories: list[str]) -> None:
        """The top category of each input before and after; ``before`` and ``after`` are logits (inputs, categories)."""
        table = Table("input", "before", "after")
        for name, b, a in zip(names, before, after, strict=True):
            table.add_row(name, _top(b, categories), _top(a, categories))
        self.console.print(table)
        same = (before.argmax(1) == after.argmax(1)).sum().item()
        self.say(
            f"top-1 unchanged on {same} of {len(before)}; largest change of a probability {_moved(before, after):.4f}"
        )

    def found(self, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> None:
        """For each question the passage found before and after, and its cosine; see `texts.nearest`."""
        table = Table("question", "before", "after")
        for question, *places in zip(QUESTIONS, *map(_places, (before, after)), strict=True):
            table.add_row(question, *places)
        self.console.print(table)
        self.say(f"the same passage for {(before[0] == after[0]).sum().item()} of {len(QUESTIONS)} questions")

    def check(self, check: Check, passed: bool) -> None:
        """What was rebuilt, and whether gradients are those of stored activations."""
        if not check.bit_exact:
            self.say(f"{'' if passed else 'FAILED: '}{check}")
            return
        rebuilt = f"{len(check.units)} states rebuilt to the bit" if check.units else "no state to rebuild"
        unstable = f" (less {', '.join(check.unstable)}, which vary by themselves)" if check.unstable else ""
        self.say(f"bit-exact: {rebuilt}, and gradients equal to those with stored activations{unstable}")

    def costs(self, table: list[Cost]) -> None:
        """Peak bytes and seconds, as measured."""
        shown = Table(
            "", "training step", *(Column(name, justify="right") for name in ("peak MiB", "ratio", "seconds", "ratio"))
        )
        for letter, cost in zip(ascii_uppercase, table, strict=False):
            peak = f"{cost.peak / MIB:.1f}", f"{cost.peak / table[1].peak:.2f}"
            shown.add_row(letter, cost.name, *peak, f"{cost.seconds.median:.3f}", f"{cost.ratio.median:.2f}")
        self.console.print(shown)
        self.say("ratio: to checkpointing; bytes above weights, .grad and inputs; median seconds of paired rounds")

    def losses(self, losses: list[float]) -> None:
        """A run of losses, on one line."""
        self.say("loss: " + "  ".join(f"{loss:.3f}" for loss in losses))

    def verdict(self, passed: bool) -> None:
        """The last line."""
        self.console.print()
        self.say("every check passed" if passed else "A CHECK FAILED: see above")


def _top(logits: Tensor, categories: list[str]) -> str:
    value, index = logits.softmax(-1).max(-1)
    return f"{value.item():6.1%} {categories[int(index)]}"


def _places(found: tuple[Tensor, Tensor]) -> list[str]:
    return [f"{cosine:.2f} {PASSAGES[i]}" for i, cosine in zip(found[0].tolist(), found[1].tolist(), strict=True)]


def _moved(before: Tensor, after: Tensor) -> float:
    return (before.softmax(-1) - after.softmax(-1)).abs().max().item()
