"""Peak memory of a training step against depth. Claim: with revwire it does not grow, but for the kept bits.

python -m benchmarks.memory.vit_depth
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from rich.progress import track

from benchmarks.harness.record import Row, run
from benchmarks.memory.alternatives import MAIN, METHODS
from benchmarks.memory.networks import network
from benchmarks.memory.steps import step
from revwire.measure import peak_bytes, saved_bytes

NETWORK = "ViT-S/16"


def measured(method: str, depth: int, batch: int) -> Row:
    """Bytes above rest, ``.grad`` allocated: peak of a step, and what its forward pass leaves behind."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model = METHODS[method](NETWORK, network(NETWORK, depth), images)
    peak = peak_bytes(partial(step, model, images))
    saved = saved_bytes(lambda: model(images).square().mean())
    return {"method": method, "depth": depth, "peak_bytes": peak, "saved_bytes": saved}


def main() -> None:
    """Measure all methods at all depths, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    cases = [(method, depth) for depth in options.depths for method in MAIN]
    config = {"model": "timm vit_small_patch16_224", "side": 224, "loss": "mean square", **vars(options)}
    run(
        "vit_depth", config, lambda: [measured(m, d, options.batch) for m, d in track(cases, "ViT-S by depth")]
    ).publish()


if __name__ == "__main__":
    main()
