"""CIFAR-10 as JPEG files, and the small residual networks whose weights the data root holds. For the benchmarks beside
it.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2

ARCHIVES = {"train": "images/cifar10_jpeg_train_50000.tar.gz", "test": "images/cifar10_jpeg_test_10000.tar.gz"}
WEIGHTS = {20: "weights/resnet20-12fca82f.th", 56: "weights/resnet56-4bfd9763.th"}
NORMALIZE = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Block(nn.Module):
    """relu(x + F(x)), F = convolution, norm, relu, convolution, norm; where the width grows, every other pixel, padded
    with zeros.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grows = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1 + (self.grows > 0), 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, h, w) → (batch, outputs, h', w')."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.grows:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grows // 2, self.grows // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """The CIFAR networks of He et al. (arXiv 1512.03385, section 4.2) of depth 6n + 2, with identity shortcuts (option
    A).
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) → logits (batch, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block(inputs if i == 0 else outputs, outputs) for i in range(blocks)))


def pretrained(depth: int, path: Path) -> ResNet:
    """The network with the weights of a checkpoint whose keys begin with ``module.``, in evaluation mode."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = ResNet(depth)
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model.eval()


def images(path: Path) -> tuple[Tensor, Tensor]:
    """(images (n, 3, 32, 32) uint8, labels (n,)) of an archive ``split/class/name.jpg``; classes in alphabetical order,
    as in CIFAR-10.
    """
    pictures, classes = [], []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                raw = archive.extractfile(member).read()
                pictures.append(decode_jpeg(torch.frombuffer(bytearray(raw), dtype=torch.uint8), ImageReadMode.RGB))
                classes.append(member.name.split("/")[1])
    order = sorted(set(classes))
    return torch.stack(pictures), torch.tensor([order.index(c) for c in classes])


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor, batch: int = 100) -> float:
    """Top-1 share in evaluation mode; the model's mode is left as found."""
    return outcomes(model, pictures, labels, batch).double().mean().item()


@torch.no_grad()
def outcomes(model: nn.Module, pictures: Tensor, labels: Tensor, batch: int = 100) -> Tensor:
    """Whether each image gets its label, in evaluation mode: (n,) bool; the model's mode is left as found."""
    training = model.training
    model.eval()
    parts = zip(pictures.split(batch), labels.split(batch), strict=True)
    right = torch.cat([model(NORMALIZE(x.float() / 255)).argmax(1) == y for x, y in parts])
    model.train(training)
    return right
