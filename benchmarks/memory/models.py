"""The models of `benchmarks.memory.default`: what users train, on small inputs. Random weights, in train mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.sweep import find

Made = tuple[nn.Module, Any]
Make = Callable[[], Made]

_LAYERS: dict[str, Any] = {"num_hidden_layers": 6, "hidden_size": 192, "num_attention_heads": 3}
_TEXT: dict[str, Any] = {**_LAYERS, "intermediate_size": 768, "vocab_size": 1000}
_SPEECH: dict[str, Any] = {
    f"{side}_{what}": n
    for side in ("encoder", "decoder")
    for what, n in (("layers", 4), ("attention_heads", 3), ("ffn_dim", 768))
}


def _images(batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side)


def _clip(frames: int, side: int) -> Tensor:
    return torch.randn(1, 3, frames, side, side)


def _tokens(batch: int = 2, length: int = 128) -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 1000, (batch, length)), "use_cache": False}


def _timm(name: str, batch: int, side: int, **options: Any) -> Made:
    import timm

    return timm.create_model(name, **options), _images(batch, side)


def _torchvision(name: str, frames: int, side: int) -> Made:
    from torchvision.models import video

    return getattr(video, name)(weights=None), _clip(frames, side)


def _of_the_zoo(zoo: str, name: str) -> Made:
    built = find(zoo, name).build()
    return built.model, built.example


def _huggingface(name: str, options: dict[str, Any], feed: Callable[[], dict[str, Any]]) -> Made:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)), feed()


def _adapted() -> Made:
    """Low-rank adapters on a frozen language model."""
    import peft

    model, example = _huggingface("Qwen2ForCausalLM", {**_TEXT, "num_key_value_heads": 3}, _tokens)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])), example


def _video_mae() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 8, 3, 112, 112)}


def _speech() -> dict[str, Any]:
    return {
        "input_features": torch.randn(1, 80, 600),
        "decoder_input_ids": torch.randint(5, 1000, (1, 32)),
        "use_cache": False,
    }


def _text() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 1000, (2, 128))}


MODELS: dict[str, Make] = {
    "timm vit_small_patch16_224": partial(_timm, "vit_small_patch16_224", 2, 160, img_size=160),
    "timm convnext_tiny": partial(_timm, "convnext_tiny", 2, 128),
    "timm resnet50": partial(_timm, "resnet50", 2, 128),
    "timm efficientnet_b0": partial(_timm, "efficientnet_b0", 2, 128),
    "timm swin_tiny": partial(_timm, "swin_tiny_patch4_window7_224", 1, 224),
    "timm maxvit_tiny": partial(_timm, "maxvit_tiny_tf_224", 1, 224),
    "timm caformer_s18": partial(_timm, "caformer_s18", 2, 128),
    "torchvision swin3d_t, 16 frames": partial(_torchvision, "swin3d_t", 16, 64),
    "torchvision swin3d_t, 32 frames": partial(_torchvision, "swin3d_t", 32, 64),
    "torchvision r2plus1d_18": partial(_torchvision, "r2plus1d_18", 8, 64),
    "torchvision r3d_18": partial(_torchvision, "r3d_18", 8, 64),
    "torchvision mvit_v2_s": partial(_of_the_zoo, "torchvision_models", "mvit_v2_s"),
    "pytorchvideo slowfast_r50": partial(_of_the_zoo, "pytorchvideo_models", "slowfast_r50"),
    "pytorchvideo x3d_m": partial(_of_the_zoo, "pytorchvideo_models", "x3d_m"),
    "Hugging Face ViT": partial(
        _huggingface,
        "ViTModel",
        {**_LAYERS, "intermediate_size": 768, "image_size": 112, "patch_size": 8},
        lambda: {"pixel_values": _images(2, 112)},
    ),
    "Hugging Face VideoMAE": partial(
        _huggingface,
        "VideoMAEModel",
        {**_LAYERS, "intermediate_size": 768, "image_size": 112, "num_frames": 8},
        _video_mae,
    ),
    "Hugging Face Whisper": partial(
        _huggingface,
        "WhisperModel",
        {
            **_SPEECH,
            "d_model": 192,
            "vocab_size": 1000,
            "max_source_positions": 300,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        _speech,
    ),
    "Hugging Face BERT": partial(_huggingface, "BertModel", _TEXT, _text),
    "Hugging Face Llama": partial(_huggingface, "LlamaForCausalLM", _TEXT, _tokens),
    "Hugging Face Qwen2, LoRA": _adapted,
}


def made(name: str) -> Made:
    """A model by name, always with the same weights, and an example for it.

    Raises:
        ImportError: its library is not installed.
    """
    torch.manual_seed(0)
    model, example = MODELS[name]()
    return model.train(), example
