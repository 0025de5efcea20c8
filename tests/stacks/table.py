"""The table of docs/training-stacks.md: one row for what is asked of a stack, filled with what its tests came to.

``pytest tests/stacks --stacks-table=write`` runs the tests, notes in ``outcomes.json`` what they came to, and renews
the table and the listings of the recipes; of some files only, it renews their rows. ``=check`` runs the tests and fails
if any of it says something else. What was not run here keeps its row, and says why.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "training-stacks.md"
RECIPES = ROOT / "docs" / "recipes"
OUTCOMES = Path(__file__).parent / "outcomes.json"
Noted = dict[str, Any]  # a row as it stands in the file
STACKS = (
    "DistributedDataParallel",
    "DataParallel",
    "FSDP2",
    "Tensor parallelism",
    "torch.compile",
    "Mixed precision",
    "Optimizers and weights",
    "PEFT",
    "timm",
    "Hugging Face Trainer",
    "accelerate",
    "Lightning",
    "Saving and loading",
    "Export",
    "Offloading and checkpointing",
    "Hooks and profiler",
    "Transforms of autograd",
    "Conversion itself",
)
_TABLE = re.compile(r"(<!-- stacks -->\n)(.*?)(<!-- /stacks -->)", re.DOTALL)
_RECIPE = re.compile(r"(<!-- recipe: (\w+) -->\n)(.*?)(<!-- /recipe -->)", re.DOTALL)

Kind = Literal["works", "refused"]


def works(stack: str, what: str, note: str = "") -> pytest.MarkDecorator:
    """Mark a test as the one that shows that ``what`` works in ``stack``; with ``note`` where there is something to
    know.
    """
    return pytest.mark.stack(stack=stack, what=what, kind="works", note=note)


def refused(stack: str, what: str, note: str) -> pytest.MarkDecorator:
    """Mark a test as the one that shows that ``what`` is refused; ``note`` is the way out."""
    return pytest.mark.stack(stack=stack, what=what, kind="refused", note=note)


@dataclass
class Row:
    """One line of the table, and what its tests came to."""

    stack: str
    what: str
    kind: Kind
    note: str
    on_gpu: bool
    where: tuple[str, int]
    outcomes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    @property
    def result(self) -> str:
        """The cell of the table."""
        if "failed" in self.outcomes:
            return "**fails**"
        if "passed" not in self.outcomes:
            return "not run"
        if self.kind == "refused":
            return "refused"
        return "works, with a note" if self.note else "works"

    @property
    def remark(self) -> str:
        """The last cell: figures that the test measured, then the note, or why it was not run."""
        reasons = [] if "passed" in self.outcomes or self.on_gpu else sorted(set(self.reasons))
        return "; ".join(dict.fromkeys([*sorted(set(self.figures)), *([self.note] if self.note else []), *reasons]))


def noted(rows: list[Row]) -> list[Noted]:
    """Rows as they stand in the file, in the order of the tests."""
    out = []
    for row in sorted(rows, key=lambda row: row.where):
        what = {"file": row.where[0].rpartition("/")[2], "stack": row.stack, "what": row.what, "on_gpu": row.on_gpu}
        out.append(
            {**what, "result": "" if row.on_gpu else row.result, "remark": row.note if row.on_gpu else row.remark}
        )
    return out


def with_new(before: list[Noted], now: list[Noted]) -> list[Noted]:
    """What was noted before, with the rows of the files that ran now exchanged."""
    ran = {row["file"] for row in now}
    return sorted([*(row for row in before if row["file"] not in ran), *now], key=lambda row: row["file"])


def read_outcomes() -> list[Noted]:
    """What was noted."""
    return json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else []


def write_outcomes(rows: list[Noted]) -> None:
    """Note it."""
    OUTCOMES.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def table(rows: list[Noted]) -> str:
    """The Markdown table. Rows that need a GPU depend on the machine, and stand below it."""
    lines = ["", "| stack | what | | |", "| --- | --- | --- | --- |"]
    for stack in STACKS:
        mine = [r for r in rows if r["stack"] == stack and not r["on_gpu"]]
        lines += [
            f"| {stack if i == 0 else ''} | {r['what']} | {r['result']} | {r['remark']} |" for i, r in enumerate(mine)
        ]
    on_gpu = [
        f"- {r['stack']}: {r['what']}" + (f" ({r['remark']})" if r["remark"] else "") for r in rows if r["on_gpu"]
    ]
    return "\n".join(
        [*lines, "", "Written for a GPU, and skipped where there is none (`pytest -m gpu`):", "", *on_gpu, "", ""]
    )


def recipe(name: str) -> str:
    """The listing of a recipe."""
    return f"\n```python\n{(RECIPES / f'{name}.py').read_text()}```\n\n"


def with_recipes(text: str) -> str:
    """The document with every recipe as its script is now."""
    return _RECIPE.sub(lambda m: m[1] + recipe(m[2]) + m[4], text)


def with_table(text: str, rows: list[Noted]) -> str:
    """The document with the table of these rows."""
    return _TABLE.sub(lambda m: m[1] + table(rows) + m[3], text)
