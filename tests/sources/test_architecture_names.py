"""No architecture is named in the sources: what is rewired is found by what it computes."""

import importlib.util
import re
from pathlib import Path

import pytest
from modules import HOUSE, ROOT

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
    for path in sorted(HOUSE.rglob("*.py")):
        if path.relative_to(HOUSE).parts[0].removesuffix(".py") not in MAY_NAME_MODELS:
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
