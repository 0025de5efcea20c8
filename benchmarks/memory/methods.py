"""The methods that are compared: the same network, the same weights, one line apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revwire

STORED, CHECKPOINT = "stored activations", "checkpoint per block"


def network(depth: int) -> nn.Module:
    """ViT-S/16 of a given depth, in training mode: (batch, 3, 224, 224) → logits (batch, 1000)."""
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224", depth=depth).train()


def stored(model: nn.Module, images: Tensor) -> nn.Module:
    """As it comes."""
    return model


def checkpointed(model: nn.Module, images: Tensor) -> nn.Module:
    """Non-reentrant checkpointing around each block."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def reversible(coupling: str) -> Callable[[nn.Module, Tensor], nn.Module]:
    """Rewired by revwire."""
    return lambda model, images: revwire.convert(model, images, coupling=coupling)


METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    STORED: stored,
    CHECKPOINT: checkpointed,
    "revwire re2tal": reversible("re2tal"),
    "revwire bdia 1/16": reversible("bdia:1/16"),
}


def step(model: nn.Module, images: Tensor) -> None:
    """Forward and backward of a mean-square loss; gradients accumulate, so ``.grad`` stays allocated."""
    model(images).square().mean().backward()
