"""Every Python block of the README and of the documentation runs; those of one page share their names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, blocks

SHOWN = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages write files, and draw random numbers."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("page", SHOWN)
def test_the_blocks_of_a_page_run(page: str) -> None:
    names = {"__name__": "__main__"}
    for block in blocks(page):
        if block.runs:
            code = "\n" * (block.line - 1) + block.code  # so that a traceback has the page's line
            exec(compile(code, str(ROOT / page), "exec", dont_inherit=True), names)


def test_the_readme_is_run() -> None:
    assert [block.runs for block in blocks("README.md")] == [True]


def test_a_marker_says_why_a_block_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pages.ROOT", tmp_path)
    (tmp_path / "a.md").write_text("x\n<!-- not run: a GPU -->\n```python\na\n```\n\n```python\nb\n```\n")
    assert [(block.line, block.code, block.runs) for block in blocks("a.md")] == [(4, "a\n", False), (8, "b\n", True)]
