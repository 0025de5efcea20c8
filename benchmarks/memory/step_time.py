"""Seconds of a training step, all methods taking turns. Claim: at most 1.4 × stored activations.

Checkpointing stops a block's recompute where gradients need no more, before the last layer of its MLP. A reversible
unit needs its branch's result, too, to rebuild its input: what that alone costs is seen in checkpointing that does not
stop early.

python -m benchmarks.memory.step_time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from benchmarks.harness.record import Row, run
from benchmarks.memory.alternatives import CHECKPOINT, MAIN, METHODS, STORED
from benchmarks.memory.networks import network
from benchmarks.memory.steps import in_turn

NETWORK = "ViT-S/16"
WHOLE = "checkpoint per block, without early stop"


def checkpointed_whole(name: str, model: nn.Module, images: Tensor) -> nn.Module:
    """Non-reentrant checkpointing around each block, which recomputes all of it."""
    for block in model.blocks:
        block.forward = partial(_whole, block.forward)
    return model


def _whole(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(forward, x, use_reentrant=False)


def measured(depth: int, batch: int, rounds: int) -> list[Row]:
    """Quartiles of the seconds of each method, and of its ratio to two others within each round."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    methods = {name: METHODS[name] for name in MAIN} | {WHOLE: checkpointed_whole}
    models = {name: method(NETWORK, network(NETWORK, depth), images) for name, method in methods.items()}
    timings = in_turn(models, images, rounds)
    return [
        {
            "method": name,
            "seconds": asdict(timings.seconds(name)),
            "to_stored": asdict(timings.ratio(name, STORED)),
            "to_checkpoint": asdict(timings.ratio(name, CHECKPOINT)),
            "to_whole": asdict(timings.ratio(name, WHOLE)),
        }
        for name in models
    ]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    config = {"model": "timm vit_small_patch16_224", "side": 224, "loss": "mean square", **vars(options)}
    run("step_time", config, lambda: measured(options.depth, options.batch, options.rounds)).publish()


if __name__ == "__main__":
    main()
