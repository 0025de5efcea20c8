"""torchvision's and pytorchvideo's own models as backbones: their features before pooling and classification.

Their modules are kept as they are, below ``model``, so that their published weights load into ``.model`` by key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torchvision.models import video

from benchmarks.tal.backbones.slowfast import SlowFast
from benchmarks.tal.backbones.video_mae import VideoMAE
from benchmarks.tal.backbones.video_swin import VideoSwin


class TorchvisionSwin(nn.Module):
    """`swin3d_t`, `swin3d_s` or `swin3d_b`: (batch, 3, frames, height, width) -> (batch, channels, frames / 2, height /
    32, width / 32).

    Args:
        name: of the function in `torchvision.models.video`.
        state: weights of that model, with or without its classifier.
    """

    frame_stride = 2

    def __init__(self, name: str, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model = getattr(video, name)(weights=None)
        self.channels: int = self.model.num_features
        self.model.head = nn.Identity()
        _load_without(self.model, state, "head.")

    def forward(self, frames: Tensor) -> Tensor:
        x = self.model.features(self.model.pos_drop(self.model.patch_embed(frames)))
        return self.model.norm(x).permute(0, 4, 1, 2, 3)


class PytorchvideoSlowFast(nn.Module):
    """`slowfast_r50` or `slowfast_r101`: (batch, 3, frames, height, width) -> (slow, fast), at a quarter of the frames,
    and at all of them.

    Args:
        name: of the function in `pytorchvideo.models.hub`.
        state: weights of that model, with or without its classifier.
    """

    frame_stride = 4
    channels = 2304

    def __init__(self, name: str, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        from pytorchvideo.models import hub  # imports much, and is optional

        self.model = getattr(hub, name)(pretrained=False)
        del self.model.blocks[5:]  # the pooling and the classifier
        _load_without(self.model, state, "blocks.6.")

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        if frames.shape[2] % self.frame_stride:
            raise ValueError(f"SlowFast: got {frames.shape[2]} frames; expected a multiple of {self.frame_stride}")
        pathways = [frames[:, :, :: self.frame_stride], frames]
        for block in self.model.blocks:
            pathways = block(pathways)
        slow, fast = pathways
        return slow, fast


def _load_without(model: nn.Module, state: Mapping[str, Tensor] | None, left_out: str) -> None:
    if state is not None:
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith(left_out)})


def _torchvision(name: str) -> Callable[..., nn.Module]:
    return partial(TorchvisionSwin, name)


def _pytorchvideo(name: str) -> Callable[..., nn.Module]:
    return partial(PytorchvideoSlowFast, name)


def _video_swin(dim: int, depth: int, heads: int) -> Callable[..., nn.Module]:
    heads_of = tuple(heads * 2**stage for stage in range(4))
    return partial(VideoSwin, embed_dim=dim, depths=(2, 2, depth, 2), num_heads=heads_of)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "swin3d_t": _torchvision("swin3d_t"),
    "swin3d_s": _torchvision("swin3d_s"),
    "swin3d_b": _torchvision("swin3d_b"),
    "slowfast_r50": _pytorchvideo("slowfast_r50"),
    "slowfast_r101": _pytorchvideo("slowfast_r101"),
    "video_swin_t": _video_swin(96, 6, 3),
    "video_swin_s": _video_swin(96, 18, 3),
    "video_swin_b": _video_swin(128, 18, 4),
    "slowfast_50": partial(SlowFast, depth=50),
    "slowfast_101": partial(SlowFast, depth=101),
    "videomae_s": partial(VideoMAE, layers=12, channels=384, heads=6),
    "videomae_b": VideoMAE,
    "videomae_l": partial(VideoMAE, layers=24, channels=1024, heads=16),
    "videomae_h": partial(VideoMAE, layers=32, channels=1280, heads=16),
    "videomae_v2_g": partial(VideoMAE, layers=40, channels=1408, heads=16, patch=14, hidden=6144),
}
"""By the name in a configuration: torchvision's, pytorchvideo's, mmaction2's, which Re2TAL rewires, Hugging Face's."""
