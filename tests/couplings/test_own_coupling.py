"""docs/how-to/own-coupling.md: what it shows runs, and uses public names only."""

import ast
import re
from pathlib import Path

import revwire

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-coupling.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_runs_from_its_first_line_to_its_last():
    found = {"__name__": "own_coupling"}
    exec(compile("".join(BLOCKS), str(PAGE), "exec"), found)
    assert issubclass(found["Averaged"], revwire.Coupling)


def test_it_uses_public_names_only():
    nodes = [*ast.walk(ast.parse("".join(BLOCKS)))]
    imported = [f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]
    attributes = [n.attr for n in nodes if isinstance(n, ast.Attribute)]
    assert any(name.startswith("revwire.couplings.") for name in imported)
    assert not [name for name in (*".".join(imported).split("."), *attributes) if name.startswith("_")]


def test_what_it_names_is_exported():
    for name in ("Coefficients", "Coupling", "Rule", "bits_of", "named", "nearest_power", "random_signs"):
        assert name in revwire.couplings.__all__
