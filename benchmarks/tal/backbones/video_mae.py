"""Hugging Face's VideoMAE as a backbone."""

from __future__ import annotations

from torch import Tensor, nn


class VideoMAE(nn.Module):
    """Hugging Face's `VideoMAEModel`: (batch, 3, frames, height, width) -> (batch, channels, time, rows, columns) of
    its tokens.

    Its positions are those of ``frames`` frames: longer videos go through in clips (``backbone.chunk``).

    Args:
        frames, side: of a clip.
        layers, channels, heads: ViT-B by default; L has 24, 1024 and 16, H has 32, 1280 and 16.
        patch, tubelet: pixels and frames that make a token.
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
    ) -> None:
        super().__init__()
        from transformers import VideoMAEConfig, VideoMAEModel  # optional, and slow to import

        self.model = VideoMAEModel(
            VideoMAEConfig(
                image_size=side,
                patch_size=patch,
                num_frames=frames,
                tubelet_size=tubelet,
                num_hidden_layers=layers,
                hidden_size=channels,
                num_attention_heads=heads,
                intermediate_size=4 * channels,
            )
        )
        self.channels = channels
        self.frame_stride = frames
        self.grid = (frames // tubelet, side // patch, side // patch)

    def forward(self, frames: Tensor) -> Tensor:
        tokens = self.model(pixel_values=frames.transpose(1, 2)).last_hidden_state
        return tokens.transpose(1, 2).unflatten(2, self.grid)
