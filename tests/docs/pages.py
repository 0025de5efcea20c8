"""The pages of the documentation, and the Python that they show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *DOCS.glob("**/*.md")))
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in DOCS.glob("tutorials/*.ipynb"))
MARKER = re.compile(r"<!-- (not run|recipe): .+ -->")
BLOCK = re.compile(r"```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A ``python`` block of a page: the line where its code begins, the code, and the line of text above it."""

    line: int
    code: str
    above: str

    @property
    def runs(self) -> bool:
        """Whether it is run here. One below ``<!-- not run: WHY -->`` is not (it needs a download, or a device), nor
        is a recipe, which `tests/stacks` runs.
        """
        return not MARKER.fullmatch(self.above)


def blocks(page: str) -> list[Block]:
    """All blocks of a page, in their order."""
    text = (ROOT / page).read_text()
    found = []
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip().splitlines()
        found.append(Block(text.count("\n", 0, match.start(1)) + 1, match[1], before[-1] if before else ""))
    return found
