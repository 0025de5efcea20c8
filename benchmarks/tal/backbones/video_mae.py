"""Hugging Face's VideoMAE as a backbone, whole or with adapters alone that train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth


class VideoMAE(nn.Module):
    """Hugging Face's `VideoMAEModel`: (batch, 3, frames, height, width) -> (batch, channels, time, rows, columns) of
    its tokens.

    A video goes through in clips of ``frames`` frames, side by side as a batch; tokens attend within their clip, and
    adapters look beyond it. Each clip on its own, one after the other, is ``backbone.chunk``.

    Args:
        frames: of a clip.
        side: pixels of the frames on which the weights were trained: for others the table of positions is resized.
        layers, channels, heads, hidden: ViT-B by default, ``hidden`` (of an MLP) four times the channels.
        patch, tubelet: pixels and frames that make a token.
        adapters: ``"all"``, or the numbers of the blocks that have an `adapters.Adapter`; with any, nothing else of the
            network trains.
        ratio: an adapter's narrow channels to all.
        drop_path: rate of the last block; it rises linearly from 0. One draw for each clip, in frozen blocks too.
        eps: of the norms. VideoMAE was trained with 1e-6, though Hugging Face's files say 1e-12.
    """

    def __init__(
        self,
        frames: int = 16,
        side: int = 224,
        layers: int = 12,
        channels: int = 768,
        heads: int = 12,
        patch: int = 16,
        tubelet: int = 2,
        hidden: int | None = None,
        adapters: Literal["all"] | Sequence[int] = (),
        ratio: float = 0.25,
        drop_path: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        from transformers import VideoMAEConfig, VideoMAEModel  # optional, and slow to import

        from benchmarks.tal.backbones.adapters import AdaptedLayer

        config = VideoMAEConfig(
            image_size=side,
            patch_size=patch,
            num_frames=frames,
            tubelet_size=tubelet,
            num_hidden_layers=layers,
            hidden_size=channels,
            num_attention_heads=heads,
            intermediate_size=hidden or 4 * channels,
            layer_norm_eps=eps,
        )
        self.adapters = tuple(range(layers)) if adapters == "all" else tuple(adapters)
        if not set(self.adapters) <= set(range(layers)):
            raise ValueError(f"VideoMAE: got adapters in blocks {adapters}; expected numbers below {layers}, or 'all'")
        self.model = VideoMAEModel(config)
        for number, rate in enumerate(torch.linspace(0, drop_path, layers, device="cpu").tolist()):
            layer = AdaptedLayer(config, ratio if number in self.adapters else None)
            layer.load_state_dict(self.model.encoder.layer[number].state_dict(), strict=False)
            # Where Hugging Face's layers drop numbers at the end of a branch they may drop the branch as well.
            layer.attention.output.dropout = StochasticDepth(rate, "row")
            layer.output.dropout = StochasticDepth(rate, "row")
            self.model.encoder.layer[number] = layer
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not self.adapters or ".adapter." in name)
        table = self.model.embeddings.position_embeddings.unflatten(1, (frames // tubelet, side // patch, -1))
        self.register_buffer("positions", table, persistent=False)  # (1, times, rows, columns, channels)
        self.channels = channels
        self.frame_stride = frames
        self.joins_clips = bool(self.adapters)
        self.clips_apart = not self.joins_clips

    def forward(self, frames: Tensor) -> Tensor:
        if frames.shape[2] % self.frame_stride:
            raise ValueError(f"VideoMAE: got {frames.shape[2]} frames; expected a multiple of {self.frame_stride}")
        clips = frames.unflatten(2, (-1, self.frame_stride)).transpose(1, 2)  # (batch, clips, 3, frames, ..)
        x = self.model.embeddings.patch_embeddings.projection(clips.flatten(0, 1))
        times, rows, columns = x.shape[2:]
        x = x.flatten(2).transpose(1, 2) + self._positions(rows, columns)
        grid = (clips.shape[1] * times, rows, columns)
        for layer in self.model.encoder.layer:
            x = layer(x, grid)
        return x.reshape(len(frames), *grid, -1).permute(0, 4, 1, 2, 3)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """(1, tokens of a clip, channels)."""
        table = self.positions
        if table.shape[2:4] != (rows, columns):
            of_time = table[0].permute(0, 3, 1, 2)
            table = F.interpolate(of_time, (rows, columns), mode="bicubic").permute(0, 2, 3, 1)[None]
        return table.flatten(1, 3)
