"""Libraries that no model zoo shares a style with: segmentation, CLIP training, transformer research, medical images,
diffusion, graphs.

A row is: name, what it is fed, and how it is made. Each library is imported only when one of its models is built.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.case import Built, Case

ZOO = "third_party"
WIDTH, LAYERS, HEADS, VOCABULARY, LENGTH = 32, 4, 4, 96, 12


def cases(everything: bool = False) -> list[Case]:
    """Every row of the table; ``everything`` adds nothing to them."""
    return [Case(name, ZOO, partial(_build, name)) for name in _ROWS]


def _build(name: str) -> Built:
    feed, make = _ROWS[name]
    torch.manual_seed(0)
    return Built(make().train(), feed())


def _of(module: str, name: str, *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """Makes ``module.name(*args, **options)``."""

    def make() -> nn.Module:
        model: nn.Module = getattr(import_module(module), name)(*args, **options)
        return model

    return make


# -- what models are fed -----------------------------------------------------------------------------------------------


def _image(channels: int = 3, side: int = 64) -> Tensor:
    return torch.randn(2, channels, side, side)


def _volume(side: int = 32) -> Tensor:
    return torch.randn(1, 1, side, side, side)


def _ids() -> Tensor:
    return torch.randint(5, VOCABULARY, (2, LENGTH))


def _noisy(channels: int = 4, **more: Tensor) -> dict[str, Any]:
    return {"hidden_states": torch.randn(2, channels, 16, 16), "timestep": torch.tensor([3, 500]), **more}


def _graph() -> tuple[Tensor, Tensor]:
    """Features of 40 nodes, and 120 edges between them."""
    return torch.randn(40, 8), torch.randint(0, 40, (2, 120))


# -- models that the library leaves to its user ------------------------------------------------------------------------


class _DeepGraph(nn.Module):
    """Residual graph layers between two linear ones, as the library's example builds them."""

    def __init__(self, block: str) -> None:
        super().__init__()
        library: Any = import_module("torch_geometric.nn")
        self.enter, self.leave = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.layers = nn.ModuleList(
            library.DeepGCNLayer(
                library.GENConv(WIDTH, WIDTH, learn_t=True), nn.LayerNorm(WIDTH), nn.ReLU(), block=block, dropout=0.1
            )
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Features (nodes, 8) and edges (2, count) to features (nodes, 4)."""
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edges)
        out: Tensor = self.leave(x)
        return out


class _GraphTransformer(nn.Module):
    """Layers of local messages and global attention."""

    def __init__(self) -> None:
        super().__init__()
        library: Any = import_module("torch_geometric.nn")
        self.enter = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(
            library.GPSConv(WIDTH, library.SAGEConv(WIDTH, WIDTH), heads=HEADS, dropout=0.1) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Features (nodes, 8) and edges (2, count) to features (nodes, width)."""
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edges)
        return x


def _research(kind: str, wrapper: str = "TransformerWrapper", **options: Any) -> Callable[[], nn.Module]:
    """A model of the transformer library with some of its many options."""

    def make() -> nn.Module:
        library: Any = import_module("x_transformers")
        layers = getattr(library, kind)(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=8, **options)
        outside = (
            {"image_size": 32, "patch_size": 8}
            if wrapper.startswith("ViT")
            else {"num_tokens": VOCABULARY, "max_seq_len": 32}
        )
        model: nn.Module = getattr(library, wrapper)(**outside, attn_layers=layers)
        return model

    return make


_TOWERS: dict[str, Any] = {
    "embed_dim": WIDTH,
    "vision_cfg": {"layers": LAYERS, "width": WIDTH, "head_width": 8, "patch_size": 8, "image_size": 32},
    "text_cfg": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "context_length": LENGTH, "vocab_size": VOCABULARY},
}
_UNET2D: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
}
_SMP, _MONAI, _DIFFUSERS = "segmentation_models_pytorch", "monai.networks.nets", "diffusers"
_ATTENDING = {
    "num_attention_heads": HEADS,
    "attention_head_dim": 8,
    "num_layers": LAYERS,
    "sample_size": 16,
    "patch_size": 2,
}

_ROWS: dict[str, tuple[Callable[[], Any], Callable[[], nn.Module]]] = {
    "smp.Unet(resnet34)": (_image, _of(_SMP, "Unet", "resnet34", encoder_weights=None)),
    "smp.DeepLabV3Plus(resnet50)": (_image, _of(_SMP, "DeepLabV3Plus", "resnet50", encoder_weights=None)),
    "smp.FPN(efficientnet-b0)": (_image, _of(_SMP, "FPN", "efficientnet-b0", encoder_weights=None)),
    "smp.Segformer(mit_b0)": (_image, _of(_SMP, "Segformer", "mit_b0", encoder_weights=None)),
    "smp.Linknet(se_resnet50)": (_image, _of(_SMP, "Linknet", "se_resnet50", encoder_weights=None)),
    "smp.UPerNet(mobilenet_v2)": (_image, _of(_SMP, "UPerNet", "mobilenet_v2", encoder_weights=None)),
    "open_clip.CLIP(vit)": (lambda: (_image(side=32), _ids()), _of("open_clip", "CLIP", **_TOWERS)),
    "open_clip.CLIP(resnet)": (
        lambda: (_image(side=32), _ids()),
        _of(
            "open_clip",
            "CLIP",
            **{**_TOWERS, "vision_cfg": {"layers": (3, 3, 3, 3), "width": 16, "head_width": 16, "image_size": 32}},
        ),
    ),
    "x_transformers.Decoder": (_ids, _research("Decoder")),
    "x_transformers.Decoder(rotary, rmsnorm, swiglu)": (
        _ids,
        _research("Decoder", rotary_pos_emb=True, use_rmsnorm=True, ff_glu=True, ff_swish=True),
    ),
    "x_transformers.Decoder(scaled residual)": (_ids, _research("Decoder", scale_residual=True, alibi_pos_bias=True)),
    "x_transformers.Decoder(gated residual)": (_ids, _research("Decoder", gate_residual=True)),
    "x_transformers.Encoder(post-norm)": (_ids, _research("Encoder", pre_norm=False)),
    "x_transformers.Encoder(sandwich)": (_ids, _research("Encoder", sandwich_norm=True, attn_qk_norm=True)),
    "x_transformers.Encoder(macaron)": (_ids, _research("Encoder", macaron=True)),
    "x_transformers.ViT": (partial(_image, side=32), _research("Encoder", "ViTransformerWrapper")),
    "x_transformers.XTransformer": (
        lambda: (_ids(), _ids()),
        _of(
            "x_transformers",
            "XTransformer",
            dim=WIDTH,
            **{
                f"{s}_{k}": v
                for s in ("enc", "dec")
                for k, v in (("num_tokens", 96), ("depth", 3), ("heads", 4), ("max_seq_len", 32))
            },
        ),
    ),
    "monai.UNet(residual)": (
        _volume,
        _of(_MONAI, "UNet", 3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2),
    ),
    "monai.SwinUNETR": (partial(_volume, 64), _of(_MONAI, "SwinUNETR", 1, 2, feature_size=12, depths=(2, 2, 2, 2))),
    "monai.UNETR": (
        _volume,
        _of(_MONAI, "UNETR", 1, 2, (32, 32, 32), feature_size=8, hidden_size=48, mlp_dim=64, num_heads=4),
    ),
    "monai.SegResNet": (_volume, _of(_MONAI, "SegResNet", 3, 8, 1, 2, blocks_down=(1, 2, 2, 4))),
    "monai.SegResNetDS": (_volume, _of(_MONAI, "SegResNetDS", 3, 8, 1, 2, blocks_down=(2, 2, 3))),
    "monai.DynUNet(residual)": (
        _volume,
        _of(_MONAI, "DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 24], res_block=True),
    ),
    "monai.VNet": (_volume, _of(_MONAI, "VNet", 3, 1, 2)),
    "monai.HighResNet": (_volume, _of(_MONAI, "HighResNet", 3, 1, 2)),
    "monai.ViT": (
        _volume,
        _of(_MONAI, "ViT", 1, (32, 32, 32), (8, 8, 8), hidden_size=48, mlp_dim=64, num_layers=4, num_heads=4),
    ),
    "monai.resnet50": (_volume, _of(_MONAI, "resnet50", spatial_dims=3, n_input_channels=1, num_classes=2)),
    "diffusers.UNet2DModel": (
        lambda: {"sample": _image(4, 16), "timestep": torch.tensor([3, 500])},
        _of(
            _DIFFUSERS,
            "UNet2DModel",
            **_UNET2D,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        ),
    ),
    "diffusers.UNet2DConditionModel": (
        lambda: {
            "sample": _image(4, 16),
            "timestep": torch.tensor([3, 500]),
            "encoder_hidden_states": torch.randn(2, 6, 24),
        },
        _of(
            _DIFFUSERS,
            "UNet2DConditionModel",
            **_UNET2D,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            transformer_layers_per_block=2,
        ),
    ),
    "diffusers.AutoencoderKL": (
        partial(_image, 3, 32),
        _of(
            _DIFFUSERS,
            "AutoencoderKL",
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            norm_num_groups=4,
            layers_per_block=3,
        ),
    ),
    "diffusers.DiTTransformer2DModel": (
        lambda: _noisy(class_labels=torch.tensor([1, 2])),
        _of(_DIFFUSERS, "DiTTransformer2DModel", **_ATTENDING, in_channels=4, num_embeds_ada_norm=10),
    ),
    "diffusers.PixArtTransformer2DModel": (
        lambda: _noisy(encoder_hidden_states=torch.randn(2, 6, 24)),
        _of(
            _DIFFUSERS,
            "PixArtTransformer2DModel",
            **_ATTENDING,
            in_channels=4,
            caption_channels=24,
            cross_attention_dim=32,
            use_additional_conditions=False,
        ),
    ),
    "diffusers.SD3Transformer2DModel": (
        lambda: _noisy(encoder_hidden_states=torch.randn(2, 6, 24), pooled_projections=torch.randn(2, 20)),
        _of(
            _DIFFUSERS,
            "SD3Transformer2DModel",
            **_ATTENDING,
            in_channels=4,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
        ),
    ),
    "diffusers.FluxTransformer2DModel": (
        lambda: {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 6, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": torch.tensor([0.1, 0.5]),
            "img_ids": torch.randn(16, 3),
            "txt_ids": torch.randn(6, 3),
        },
        _of(
            _DIFFUSERS,
            "FluxTransformer2DModel",
            in_channels=4,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=False,
        ),
    ),
    "torch_geometric.DeepGCNLayer(res+)": (_graph, partial(_DeepGraph, "res+")),
    "torch_geometric.DeepGCNLayer(res)": (_graph, partial(_DeepGraph, "res")),
    "torch_geometric.GPSConv": (_graph, _GraphTransformer),
}
