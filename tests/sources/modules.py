"""The modules of revwire as they are written: their files, their syntax, and what each imports."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOUSE = ROOT / "revwire"


def name_of(path):
    """The dotted name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(HOUSE.rglob("*.py"))}


def syntax(path):
    return ast.parse(path.read_text(), path.name)


def imported(path):
    """Dotted names that a file imports, `from a import b` as a.b: anywhere in it, type-only ones and those inside of
    functions too.
    """
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def needed(path):
    """Modules of revwire that a file imports, or imports names from."""
    for name in imported(path):
        found = name if name in MODULES else name.rpartition(".")[0]
        if found in MODULES:
            yield found
