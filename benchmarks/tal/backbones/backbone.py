"""From frames to a sequence of features: what stands between a video network and a localizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from benchmarks.tal.normalization import MEAN, STD

_NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


class Backbone(nn.Module):
    """frames (batch, 3, frames, height, width) -> features (batch, channels, steps).

    Frames are normalised, passed through the network, averaged over space, and interpolated to the number of steps;
    several pathways are concatenated along the channels. Where a mask is given, features of invalid steps are set to 0.

    Reversibility comes from outside: ``revwire.convert(backbone, frames, coupling=...)``.

    Args:
        network: gives (batch, channels, time, height, width), or a tuple of these, one per pathway; with attributes
            ``channels`` (the sum over pathways) and ``frame_stride`` (frames that it needs a multiple of).
        steps: length of the result; by default that of the mask, or of the longest pathway.
        clip_frames: pass the video through the network in clips of so many frames, each on its own, and join their
            features in time.
        checkpoint_clips: keep no activations of a clip, and compute it again in backward, so that one clip's are there
            at a time however many clips there are. Batch norms must be frozen then.
        freeze_norms: keep all norms of the network in eval mode and their affine parameters as they are, as published
            recipes do.
        frozen: train nothing of the network.
        mean, std: per channel, in the units of the frames (0 to 255).

    Raises:
        ValueError: ``clip_frames`` is no multiple of the network's ``frame_stride``; or the network joins clips; or
            clips are checkpointed whose batch norms train.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        steps: int | None = None,
        clip_frames: int | None = None,
        checkpoint_clips: bool = False,
        freeze_norms: bool = True,
        frozen: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        super().__init__()
        if clip_frames is not None and (clip_frames < 1 or clip_frames % network.frame_stride):
            raise ValueError(
                f"Backbone: got clips of {clip_frames} frames; expected a multiple of {network.frame_stride}"
            )
        if clip_frames is not None and getattr(network, "joins_clips", False):
            raise ValueError(
                f"Backbone: got clips of {clip_frames} frames, one after the other; expected all at once, for a "
                "network with temporal adapters, which join clips: clip_frames=None (backbone.chunk=null)"
            )
        if (
            checkpoint_clips
            and not (freeze_norms or frozen)
            and any(isinstance(m, _BatchNorm) for m in network.modules())
        ):
            raise ValueError(
                "Backbone: got checkpoint_clips with batch norms that train; they would count each clip twice: "
                "freeze_norms=True"
            )
        self.network = network
        self.channels: int = network.channels
        self.steps = steps
        self.clip_frames = clip_frames
        self.checkpoint_clips = checkpoint_clips
        self.freeze_norms = freeze_norms
        self.frozen = frozen
        self.mean = tuple(mean)
        self.std = tuple(std)
        for parameter in self._frozen_parameters():
            parameter.requires_grad_(False)
        self.train(self.training)

    def forward(self, frames: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class.

        Args:
            frames: (batch, 3, frames, height, width), uint8 or floating point, from 0 to 255.
            mask: (batch, steps), True where a step is valid.

        Returns:
            (batch, channels, steps), in float32 at least.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pathways = self._pathways(frames)
        steps = self.steps or (mask.shape[1] if mask is not None else max(p.shape[2] for p in pathways))
        features = torch.cat([F.interpolate(p, steps, mode="linear", align_corners=False) for p in pathways], 1)
        return features if mask is None else features * mask.unsqueeze(1).to(features.dtype)

    def _normalised(self, frames: Tensor) -> Tensor:
        """In the network's own dtype, but computed in float32 at least."""
        dtype = next(self.network.parameters()).dtype
        mean, std = torch.tensor(
            [self.mean, self.std], dtype=torch.promote_types(dtype, torch.float32), device=frames.device
        )
        return ((frames - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)).to(dtype)

    def _pathways(self, frames: Tensor) -> list[Tensor]:
        """The features of each pathway, averaged over space: (batch, channels, time)."""
        if self.clip_frames is None:
            return self._pooled(frames)
        keeps_nothing = self.checkpoint_clips and torch.is_grad_enabled()
        clips = frames.split(self.clip_frames, 2)
        parts = [
            checkpoint(self._pooled, clip, use_reentrant=False) if keeps_nothing else self._pooled(clip)
            for clip in clips
        ]
        return [torch.cat(clips_of_one, 2) for clips_of_one in zip(*parts, strict=True)]

    def _pooled(self, frames: Tensor) -> list[Tensor]:
        out = self.network(self._normalised(frames))
        pathways = out if isinstance(out, tuple | list) else [out]
        return [p.mean((3, 4), dtype=torch.promote_types(p.dtype, torch.float32)) for p in pathways]

    def train(self, mode: bool = True) -> Backbone:
        """As for any module, but for what is frozen."""
        super().train(mode)
        for module in self.network.modules():
            if self.frozen or (self.freeze_norms and isinstance(module, _NORMS)):
                module.training = False
        return self

    def _frozen_parameters(self) -> list[nn.Parameter]:
        held = [m for m in self.network.modules() if self.frozen or (self.freeze_norms and isinstance(m, _NORMS))]
        return [parameter for module in held for parameter in module.parameters()]
