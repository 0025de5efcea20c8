"""Who may import whom: one order of packages, no circle among files, and public names only at the ends."""

import ast
import importlib
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from modules import HOUSE, MODULES, ROOT, imported, needed, syntax

import revwire

ORDER = (
    *("_errors", "_structures", "_torch", "couplings", "_streams", "_surroundings", "measure"),
    *("_capture", "_runtime", "_search", "_programs", "_splitting", "_paper", "_plan", "_forwards", "_budget", "_api"),
    *("revwire", "testing", "lightning", "huggingface", "demo", "cli"),
)
"""From the ground up: a package imports from itself and from those before it. `revwire` is its own `__init__`."""


def package_of(module):
    return module.split(".")[1] if "." in module else module


def files(*folders):
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in found]


def test_every_package_has_its_place():
    assert {package_of(module) for module in MODULES} <= set(ORDER)


@pytest.mark.parametrize("path", files("revwire"))
def test_imports_go_down(path):
    (mine,) = (package_of(module) for module, file in MODULES.items() if file == path)
    assert not [module for module in needed(path) if ORDER.index(package_of(module)) > ORDER.index(mine)]


def test_no_file_imports_itself_by_way_of_others():
    graph = {module: set(needed(path)) - {module} for module, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" ← ".join(error.args[1]))


def is_private(name):
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


def private_names(path, own):
    """Private names of revwire that a file imports or looks up; those of ``own``, its package, are its own affair."""
    names = {name for name in imported(path) if name.split(".")[0] == "revwire" and not name.startswith(f"{own}.")}
    looked_up = {ast.unparse(node) for node in ast.walk(syntax(path)) if isinstance(node, ast.Attribute)}
    return sorted(filter(is_private, names | {name for name in looked_up if name.startswith("revwire.")}))


@pytest.mark.parametrize("path", files("benchmarks"))
def test_benchmarks_use_public_names(path):
    assert private_names(path, "benchmarks") == []


@pytest.mark.parametrize("path", files("revwire/cli", "revwire/demo"))
def test_the_command_line_and_the_demo_use_public_names(path):
    assert private_names(path, f"revwire.{path.parent.name}") == []


def test_private_names_are_found_however_they_are_reached(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "import revwire._plan.plan\nfrom revwire.measure import peak_bytes, _trace\nimport revwire.cli._own\ndef "
        "late():\n    from revwire._api import verify\n    return revwire._errors.x, revwire.__version__\n"
    )
    assert private_names(path, "revwire.cli") == [
        *("revwire._api.verify", "revwire._errors", "revwire._errors.x", "revwire._plan.plan", "revwire.measure._trace")
    ]


def test_importing_revwire_is_light():
    heavy = {"timm", "torchvision", "pytorchvideo", "typer", "rich", "transformers", "lightning"}
    code = (
        "import sys, revwire; [getattr(revwire, name) for name in revwire.__all__]; "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_each_package_has_a_folder_of_tests():
    packages = {path.parent.name.strip("_") for path in HOUSE.glob("*/__init__.py")}
    assert packages <= {path.name for path in (ROOT / "tests").iterdir()}


def test_public_names_are_where_they_are_said_to_be():
    (block,) = (node for node in syntax(HOUSE / "__init__.py").body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert set(told) == set(revwire.__all__) <= set(dir(revwire))
    for name, home in told.items():
        assert getattr(revwire, name) is getattr(importlib.import_module(home), name)
    with pytest.raises(AttributeError, match="module 'revwire' has no attribute 'nothing'"):
        revwire.nothing  # noqa: B018
