"""The recipes of docs/recipes run, and the document shows them as they are."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
from table import DOCUMENT, RECIPES, ROOT, with_recipes

from processes import needs_gloo

NEEDS = {
    "timm_train": ("timm", "torchvision"),
    "lightning_trainer": ("lightning", "timm"),
    "lightning_callback": ("lightning", "timm"),
    "hf_trainer": ("transformers", "accelerate"),
    "hf_callback": ("transformers", "accelerate", "peft"),
    "accelerate_loop": ("accelerate", "timm"),
    "peft_lora": ("peft", "timm"),
    "compiled_branches": ("timm",),
}
UNDER_TORCHRUN = ("ddp", "fsdp2")


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("ignore")  # of the packages that are shown
def test_a_recipe_learns(name: str) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"needs {package}")
    module = loaded(name)
    losses = module.main(backend="aot_eager") if name == "compiled_branches" else module.main()
    assert losses[-1] < losses[0], losses


@needs_gloo
@pytest.mark.parametrize("name", UNDER_TORCHRUN)
def test_a_recipe_learns_under_torchrun(name: str) -> None:
    pytest.importorskip("timm", reason="needs timm")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(RECIPES / f"{name}.py"),
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_document_shows_every_recipe_as_it_is() -> None:
    text = DOCUMENT.read_text()
    shown = set(re.findall(r"<!-- recipe: (\w+) -->", text))
    assert shown == {*NEEDS, *UNDER_TORCHRUN} == {path.stem for path in RECIPES.glob("*.py")}
    assert with_recipes(text) == text, "run pytest tests/stacks --stacks-table=write"
