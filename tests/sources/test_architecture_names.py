"""Who may import whom: two columns that do not know each other, benchmarks that use public names; and no names of
models.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    found = [
        f
        for stem in stems
        for f in [ROOT / "revwire" / f"{stem}.py", *(ROOT / "revwire" / stem).glob("*.py")]
        if f.exists()
    ]
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
    code = (
        "import sys, revwire; "
        "print(sorted({'timm', 'torchvision', 'pytorchvideo', 'typer', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- no architecture's name --------------------------------------------------------------------------------------------

ORDINARY = {
    "auto": "a mode of an option, here and in Python",
    "bit": "the unit of the kept remainders",
    "nest": "residuals nest",
    "transform": "torch.func transforms",
    "utils": "torch.utils",
    "video": "what a long chain's input may be",
}
"""Names of model files that are words of English or of PyTorch, and what they mean in the sources."""

MAY_NAME_MODELS = ("demo", "cli")


def folder(package, *below):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]).joinpath(*below)


def timm_names():
    return set(pytest.importorskip("timm").list_modules())


def torchvision_names():
    found = [f for f in folder("torchvision", "models").rglob("*") if f.is_dir() or f.suffix == ".py"]
    return {f.stem for f in found if not f.name.startswith("_")}


def transformers_names():
    return {f.name for f in folder("transformers", "models").iterdir() if f.is_dir() and not f.name.startswith("_")}


def words(line):
    """Names in a line, as they stand, and their parts: of ``MyLayer_b4``, `mylayer_b4`, `mylayer`, `my`, `layer` and
    `b4`.
    """
    for name in re.findall(r"\w+", line):
        parts = [p for p in name.split("_") if p]
        humps = [h for p in parts for h in re.findall(r"[A-Z]+[a-z0-9]*|[a-z0-9]+", p)]
        yield from {w.lower() for w in (name, *parts, *humps)}


def sources():
    for path in sorted((ROOT / "revwire").rglob("*.py")):
        if path.relative_to(ROOT / "revwire").parts[0].removesuffix(".py") not in MAY_NAME_MODELS:
            yield path


@pytest.mark.parametrize("names", [timm_names, torchvision_names, transformers_names])
def test_no_architecture_is_named(names):
    forbidden = names() - ORDINARY.keys()
    assert len(forbidden) > 30
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word!r} in {line.strip()!r}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in words(line)
        if word in forbidden
    ]
    assert not found, "names of architectures stand in the sources:\n" + "\n".join(found)


def test_names_are_found_in_every_spelling():
    assert {"swin", "resnet", "vit", "b4"} <= {
        w for line in ("import swin", "class ResNet_v2", "x.my_vit", "MyLayer_b4") for w in words(line)
    }


def test_dropped_names_are_needed():
    used = {w for path in sources() for w in words(path.read_text())}
    assert used >= ORDINARY.keys(), f"no longer needed: {sorted(ORDINARY.keys() - used)}"
