"""Seconds and bytes of `revwire.convert` itself, on five large networks. Claim: under 10 s each, and no copy of the
weights.

python -m benchmarks.memory.conversion
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import Any

import timm
import torch
from rich.progress import track
from torch import nn
from torchvision.models import resnet101
from torchvision.models.video import swin3d_t
from transformers import LlamaConfig, LlamaModel

import revwire
from benchmarks.harness.record import Row, run
from revwire.measure import peak_bytes


def _llama() -> nn.Module:
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "vocab_size": 32000,
    }
    return LlamaModel(LlamaConfig(**sizes))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "timm vit_base_patch16_224": (
        lambda: timm.create_model("vit_base_patch16_224"),
        lambda: torch.randn(2, 3, 224, 224),
    ),
    "timm swin_tiny_patch4_window7_224": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        lambda: torch.randn(2, 3, 224, 224),
    ),
    "torchvision swin3d_t": (lambda: swin3d_t(weights=None), lambda: torch.randn(1, 3, 8, 112, 112)),
    "torchvision resnet101": (lambda: resnet101(weights=None), lambda: torch.randn(2, 3, 224, 224)),
    "Llama, 24 layers of width 512": (
        _llama,
        lambda: {"input_ids": torch.randint(0, 32000, (1, 64)), "use_cache": False},
    ),
}


def measured(name: str) -> Row:
    """Seconds of a conversion, its peak bytes above rest, and the bytes of the weights."""
    make, example = CASES[name]
    model = make().train()
    inputs = example()
    weights = sum(p.nbytes for p in model.parameters())
    before = [id(p) for p in model.parameters()]
    start = perf_counter()
    revwire.convert(model, inputs)
    seconds = perf_counter() - start
    plan = revwire.report(model)
    kept = before == [id(p) for p in model.parameters()]
    revwire.revert(model)
    peak = peak_bytes(lambda: revwire.revert(revwire.convert(model, inputs)))
    row = {"model": name, "seconds": seconds, "peak_bytes": peak, "weight_bytes": weights, "same_parameters": kept}
    return {**row, "units": len(plan.units), "coverage": plan.coverage}


def main() -> None:
    """Measure, and write the record."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    run("conversion", {"mode": "train"}, lambda: [measured(name) for name in track(list(CASES), "models")]).publish()


if __name__ == "__main__":
    main()
