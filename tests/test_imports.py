"""Who may import whom: two columns that do not know each other, benchmarks that use public names, a light `import revwire`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GRAPH = (
    *("_trace", "_recorder", "_recording", "_intercept", "_watch", "_memory", "_reads", "_fresh"),
    *("_flow", "_adds", "_chains", "_units", "_plan", "_graph"),
)
RUNTIME = ("_couplings", "_bits", "_numerics", "_bits", "_tape", "_records", "_rewind", "_engine", "_module")
SHARED = ("_replay", "_snapshot")  # the state around a forward pass, which both sides must leave as they found it


def imported(path):
    """Dotted names that a file imports, `from a import b` as a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*stems):
    found = [f for stem in stems for f in [ROOT / "revwire" / f"{stem}.py", *(ROOT / "revwire" / stem).glob("*.py")] if f.exists()]
    return [pytest.param(f, id=f.stem) for f in found]


@pytest.mark.parametrize("path", files(*GRAPH))
def test_the_graph_side_knows_no_runtime(path):
    assert not [n for n in imported(path) if n.startswith(tuple(f"revwire.{m}" for m in RUNTIME))]


@pytest.mark.parametrize("path", files(*RUNTIME, *SHARED))
def test_the_runtime_side_knows_no_graph(path):
    forbidden = ("torch.fx", *(f"revwire.{m}" for m in GRAPH))
    assert not [n for n in imported(path) if n.startswith(forbidden)]


@pytest.mark.parametrize("path", [pytest.param(f, id=f.stem) for f in sorted((ROOT / "benchmarks").rglob("*.py"))])
def test_benchmarks_use_public_names(path):
    names = [n for n in imported(path) if n.startswith("revwire")]
    assert not [n for n in names if any(part.startswith("_") for part in n.split("."))]


def test_importing_revwire_is_light():
    code = "import sys, revwire; print(sorted({'timm', 'torchvision', 'pytorchvideo', 'typer', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
