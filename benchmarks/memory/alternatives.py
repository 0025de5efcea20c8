"""What a user would otherwise pick, and revwire: each takes a network and an example, and makes of it one that is
trained in another way.

A method raises `Unsuited` where it cannot take a network; the sweep leaves its cell empty, and keeps the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from math import ceil, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import revwire
from benchmarks.memory.handwritten import Missing, reversible_swin
from benchmarks.memory.networks import NETWORKS

STORED, CHECKPOINT, SELECTIVE = "stored activations", "checkpoint per block", "selective checkpoint per block"
RE2TAL, BDIA = "revwire re2tal", "revwire bdia 1/16"
MAIN = (STORED, CHECKPOINT, BDIA, RE2TAL)
Method = Callable[[str, nn.Module, Tensor], nn.Module]

_aten = torch.ops.aten
_DEAR = {
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.convolution.default),
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
}
"""The operators whose results selective checkpointing stores, as PyTorch's own examples do."""


class Unsuited(Exception):  # noqa: N818  (it is no fault)
    """This method cannot take this network."""


def stored(name: str, model: nn.Module, example: Tensor) -> nn.Module:
    """As it comes."""
    return model


def checkpointed(name: str, model: nn.Module, example: Tensor) -> nn.Module:
    """What a user would pick: by the network's own switch, or else non-reentrant around each block."""
    return revwire.rival(model, example).model


class Segment(nn.Sequential):
    """Blocks that are checkpointed together."""

    def forward(self, x: Any) -> Any:
        return checkpoint(super().forward, x, use_reentrant=False)


def segmented(name: str, model: nn.Module, example: Tensor) -> nn.Module:
    """Checkpointing over √n segments of each run of n blocks."""
    for path in NETWORKS[name].containers(model):
        container = model.get_submodule(path)
        blocks = list(container.children())
        size = ceil(sqrt(len(blocks)))
        segments = [Segment(*blocks[i : i + size]) for i in range(0, len(blocks), size)]
        parent, _, last = path.rpartition(".")
        setattr(
            model.get_submodule(parent),
            last,
            type(container)(segments) if isinstance(container, nn.ModuleList) else nn.Sequential(*segments),
        )
    return model


def selective(name: str, model: nn.Module, example: Tensor) -> nn.Module:
    """Selective checkpointing per block: results of matrix products, convolutions and attention are stored, the rest is
    recomputed.
    """

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    for _, _, block in NETWORKS[name].blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return model


def compiled(budget: float) -> Method:
    """``torch.compile`` with an activation memory budget; the graphs that AOTAutograd partitions run without code
    generation.
    """

    def method(name: str, model: nn.Module, example: Tensor) -> nn.Module:
        torch._dynamo.reset()
        torch._functorch.config.activation_memory_budget = budget
        return torch.compile(model, backend="aot_eager_decomp_partition")  # type: ignore[return-value]

    return method


def momentumnet(name: str, model: nn.Module, example: Tensor) -> nn.Module:
    """The package momentumnet's conversion of runs of blocks, γ = 0.9, without backpropagation through what it
    rebuilds.
    """
    from momentumnet import transform_to_momentumnet

    paths = NETWORKS[name].containers(model)
    if not all(isinstance(model.get_submodule(p), nn.Sequential) for p in paths):
        raise Unsuited("its blocks are called from a loop of their own")
    first = name.startswith(("ViT", "GPT", "swin", "convnext"))  # blocks that all keep their shape
    return transform_to_momentumnet(
        model, paths, gamma=0.9, use_backprop=False, keep_first_layer=not first, is_residual=False
    )


def memcnn(name: str, model: nn.Module, example: Tensor) -> nn.Module:
    """The package memcnn's additive coupling of the two branches of each layer, on two streams (averaged at the
    end).
    """
    if not name.startswith(("ViT", "GPT")):
        raise Unsuited("it couples two branches of one width, which only the layers of a transformer have")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from memcnn import AdditiveCoupling, InvertibleModuleWrapper
    (path,) = NETWORKS[name].containers(model)
    blocks = [
        InvertibleModuleWrapper(AdditiveCoupling(*_branches(block), split_dim=-1), keep_input=False)
        for block in model.get_submodule(path).children()
    ]
    setattr(model, path, nn.Sequential(_Doubled(), *blocks, _Averaged()))
    return model


def handwritten(name: str, model: nn.Module, example: Tensor) -> nn.Module:
    """The reversible Video Swin that OpenTAD wrote by hand; see `benchmarks.memory.handwritten`."""
    try:
        return reversible_swin(name)
    except Missing as error:
        raise Unsuited(str(error)) from error


def _branches(block: nn.Module) -> tuple[nn.Module, nn.Module]:
    attend = block.attn if hasattr(block, "attn") else _Attend(block)
    return nn.Sequential(block.norm1, attend), nn.Sequential(block.norm2, block.mlp)


class _Attend(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.attend = block.qkv, block.proj, block.attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], -1)


class _Averaged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return (a + b) / 2


def reversible(**options: Any) -> Method:
    """Rewired by revwire."""

    def method(name: str, model: nn.Module, example: Tensor) -> nn.Module:
        return revwire.convert(model, example, **options, rewire="everywhere")

    return method


def by_windows(coupling: str) -> Method:
    """Rewired by revwire, in as many chunks as Video Swin's windows of eight tokens, of two frames each, take along a
    clip.
    """

    def method(name: str, model: nn.Module, example: Tensor) -> nn.Module:
        if not name.startswith("swin3d"):
            raise Unsuited(f"{name} has no windows along time")
        return revwire.convert(model, example, coupling=coupling, chunks=max(2, example.shape[2] // 16))

    return method


METHODS: dict[str, Method] = {
    STORED: stored,
    CHECKPOINT: checkpointed,
    "checkpoint over √n segments": segmented,
    SELECTIVE: selective,
    "torch.compile, memory budget 0.1": compiled(0.1),
    "momentumnet": momentumnet,
    "memcnn": memcnn,
    "OpenTAD's Re2TAL Swin": handwritten,
    BDIA: reversible(coupling="bdia:1/16"),
    RE2TAL: reversible(coupling="re2tal"),
    "revwire bdia 1/16, 4 chunks": reversible(coupling="bdia:1/16", chunks=4),
    "revwire re2tal, 4 chunks": reversible(coupling="re2tal", chunks=4),
    "revwire bdia 1/16, 16 chunks": reversible(coupling="bdia:1/16", chunks=16),
    "revwire re2tal, 16 chunks": reversible(coupling="re2tal", chunks=16),
    "revwire bdia 1/16, whole blocks": reversible(coupling="bdia:1/16", whole="*"),
    "revwire bdia 1/16, other blocks checkpointed": reversible(coupling="bdia:1/16", checkpoint="stays"),
    "revwire re2tal, other blocks checkpointed": reversible(coupling="re2tal", checkpoint="stays"),
    "revwire bdia 1/16, window by window": by_windows("bdia:1/16"),
    "revwire re2tal, window by window": by_windows("re2tal"),
    "revwire bdia 1/16, planned for least memory": reversible(coupling="bdia:1/16", memory_budget="least"),
    "revwire re2tal, planned for least memory": reversible(coupling="re2tal", memory_budget="least"),
}

_BDIA = ("bdia:1/2", "bdia:1/4", "bdia:1/8", "bdia:1/16", "bdia-random:1/2")
_SPELLINGS = ("re2tal", *_BDIA, "momentum:1/8", "dr2net:7/8,1/8", "midpoint:1/2")
COUPLINGS: dict[str, Method] = {f"revwire {spelling}": reversible(coupling=spelling) for spelling in _SPELLINGS}

NOT_RUN = {
    "save_on_cpu": "moves saved tensors from an accelerator to the CPU: on the CPU there is nowhere to move them"
}
