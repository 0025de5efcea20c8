"""What the site is made of: docstrings as Griffe reads them, links, and figures as the records have them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.harness.record import read
from benchmarks.memory.tables import KNOWN
from benchmarks.site import results


def test_arguments_that_share_a_line_are_spelled_out() -> None:
    docstrings = pytest.importorskip("benchmarks.site.docstrings", reason="needs Griffe", exc_type=ImportError)
    text = (
        "Do.\n\nArgs:\n    a, b,\n        c: of both,\n        kinds.\n    d: alone, or: not.\n\nExample:\n    >>> 1\n"
    )
    each = "".join(f"    {name}: of both,\n        kinds.\n" for name in "abc")
    assert docstrings.spelled_out(text) == f"Do.\n\nArgs:\n{each}    d: alone, or: not.\n\nExamples:\n    >>> 1\n"


def test_links_work_on_the_site_and_in_the_repository() -> None:
    hooks = pytest.importorskip("benchmarks.site.hooks", reason="needs MkDocs", exc_type=ImportError)
    assert hooks._target("../glossary.md", "how-to/plans.md", "https://x") == "../glossary.md"
    assert hooks._target("memory_budget.ipynb", "tutorials/index.md", "https://x") == "memory_budget.md"
    assert hooks._target("../../tests/stacks", "how-to/plans.md", "https://x") == "https://x/blob/main/tests/stacks"


def test_only_a_site_of_several_versions_lets_one_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = pytest.importorskip("benchmarks.site.hooks", reason="needs MkDocs", exc_type=ImportError)
    config = SimpleNamespace(extra={})
    hooks.on_config(config)
    assert not config.extra
    monkeypatch.setenv("MIKE_DOCS_VERSION", "{}")
    hooks.on_config(config)
    assert config.extra["version"]["provider"] == "mike"


def test_figures_are_those_of_the_records() -> None:
    (row,) = (r for record in read("default")[:1] for r in record.results or [] if r["model"] == "Hugging Face BERT")
    (line,) = (line for line in results._default() if line[:2] == ["Hugging Face BERT", "revwire"])
    assert line[2] == round(row["plain_bytes"] / 2**20, 1)
    assert line[3] == round(row["plain_bytes"] / row["rival_bytes"], 3)
    assert line[4] == round(row["to_rival"]["median"], 3)


def test_the_short_table_has_no_name_that_is_not_measured() -> None:
    measured = {row["model"] for record in read("default")[:1] for row in record.results or []}
    assert set(KNOWN) <= measured
