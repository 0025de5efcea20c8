"""What the documents say of the sources: files that they name exist, packages are drawn, lines are short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "revwire"
TABLES = re.compile(r"<!-- (\w+).*? -->.*?<!-- /\1 -->", re.DOTALL)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
OURS = re.compile(
    r"https://(?:github\.com/revwire/revwire/(?:blob|tree)|raw\.githubusercontent\.com/revwire/revwire)/main/([^)\"#\s]+)"
)
MOST_COLUMNS = 120

DOCUMENTS = sorted(
    str(path.relative_to(ROOT)) for where in ("*.md", "docs/**/*.md", "benchmarks/**/*.md") for path in ROOT.glob(where)
)

documents = pytest.mark.parametrize("document", DOCUMENTS)


def exists(name: str) -> bool:
    """Whether there is a file or folder of this name: from the root, from `revwire/`, or in one of its packages."""
    return (ROOT / name).exists() or (HOUSE / name).exists() or any(HOUSE.glob(f"*/{name}"))


@pytest.mark.parametrize("document", ["docs/explanation/how-it-works.md", "CONTRIBUTING.md"])
def test_the_files_that_say_where_things_are_exist(document: str) -> None:
    quoted = re.findall(r"`([\w./-]+)`", (ROOT / document).read_text())
    files = {name for name in quoted if name.endswith((".py", ".md", "/")) and "NAME" not in name}
    assert files
    assert not {name for name in files if not exists(name)}


def test_every_package_is_drawn() -> None:
    text = (ROOT / "docs/explanation/how-it-works.md").read_text()
    drawing = text[text.index("```text") : text.index("```\n\n")]
    found = [
        f"{p.name}/" if p.is_dir() else p.name for p in HOUSE.iterdir() if p.name not in ("__init__.py", "py.typed")
    ]
    assert not [name for name in found if not name.startswith("__pycache__") and name not in drawing]


@documents
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    assert not [link for link in LINK.findall(path.read_text()) if not (path.parent / link).exists()]


@documents
def test_links_to_this_repository_lead_somewhere(document: str) -> None:
    assert not [path for path in OURS.findall((ROOT / document).read_text()) if not (ROOT / path).exists()]


def test_links_of_the_readme_work_on_a_package_index() -> None:
    text = (ROOT / "README.md").read_text()
    assert OURS.findall(text)
    assert not LINK.findall(text)


@documents
def test_memory_is_in_binary_units(document: str) -> None:
    assert not re.findall(r"\d MB\b.*", (ROOT / document).read_text())


@documents
def test_lines_are_short(document: str) -> None:
    lines = TABLES.sub("", (ROOT / document).read_text()).splitlines()
    assert not [line for line in lines if len(line) > MOST_COLUMNS and not line.startswith("|")]
