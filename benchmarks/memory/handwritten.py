"""The reversible Video Swin that OpenTAD wrote by hand for Re2TAL, run from its own source, which is not part of this
repository.

git clone https://github.com/sming256/OpenTAD
pip install mmcv-lite==2.1.0 mmengine einops opencv-python-headless && pip install --no-deps mmaction2
OPENTAD=OpenTAD python -m benchmarks.memory.sweep memory_swin3d --resume
"""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

VARIABLE = "OPENTAD"
_SOURCE = "opentad/models/backbones/re2tal_swin.py"
_SIZES: dict[str, dict[str, Any]] = {
    "swin3d_t": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin3d_b": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
}


class Missing(Exception):  # noqa: N818  (it is no fault)
    """The source, or what it imports, is not there."""


def reversible_swin(name: str) -> nn.Module:
    """The backbone of the sizes of torchvision's ``swin3d_t`` or ``swin3d_b``, in train mode: (batch, 3, frames,
    height, width) → features.

    Raises:
        Missing: the network is another one, or cannot be built here; says what to install.
    """
    if name not in _SIZES:
        raise Missing(f"{name} is no Video Swin")
    network: nn.Module = _source().SwinTransformer3D_inv(
        patch_size=(2, 4, 4), window_size=(8, 7, 7), patch_norm=True, drop_path_rate=0.1, **_SIZES[name]
    )
    network.train()
    return network


@lru_cache(maxsize=1)  # its classes can be registered once
def _source() -> ModuleType:
    path = Path(os.environ.get(VARIABLE, "")) / _SOURCE
    if not os.environ.get(VARIABLE) or not path.exists():
        raise Missing(f"its source is not here: set {VARIABLE} to a checkout of github.com/sming256/OpenTAD")
    try:
        _backbones_only()
        spec = spec_from_file_location("re2tal_swin", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Missing(
            f"{error}: it needs mmcv-lite==2.1.0, mmengine, mmaction2, einops and opencv-python-headless"
        ) from error
    return module


def _backbones_only() -> None:
    """MMAction2 1.2.0 lacks a package that its ``mmaction.models`` imports; the backbones import without that."""
    found = find_spec("mmaction")
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'mmaction'")
    for name in ("models", "models.backbones"):
        package = ModuleType(f"mmaction.{name}")
        package.__path__ = [str(Path(found.submodule_search_locations[0], *name.split(".")))]
        sys.modules.setdefault(package.__name__, package)
