"""What the machinery costs, beside the arithmetic: microseconds per unit on branches that do almost nothing, forward
and backward.

python -m benchmarks.memory.overhead

A chain of small blocks x + linear(norm(x)) takes turns with the same blocks as they were, and with the same under
`torch.utils.checkpoint`, two by two: a transformer's block, which checkpointing wraps once, has two units. *Machinery*
is what is left of the difference when the arithmetic of the streams (called by itself on states of the same shape) is
taken away, and, in backward, one more evaluation of the branch, which every method that recomputes pays. On one thread,
on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revwire
from benchmarks.harness.record import Row, run
from revwire.measure import Quartiles, arithmetic_seconds

WIDTH, BATCH, UNITS = 16, 16, 64
PER_PAIR = "checkpoint per two blocks"
COUPLINGS = {c.name: c for c in (revwire.Re2TAL(), revwire.Bdia(1 / 16))}


class Block(nn.Module):
    """x + linear(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class Pair(nn.Sequential):
    """Two blocks in one checkpoint, as one calls it for a transformer's block."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def timed(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass, per block."""
    start = perf_counter()
    loss = model(x).square().mean()
    middle = perf_counter()
    loss.backward()
    return (middle - start) / UNITS, (perf_counter() - middle) / UNITS


def measured(rounds: int) -> list[Row]:
    """One row per method and direction, in microseconds."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, WIDTH)
    plain = nn.Sequential(*(Block() for _ in range(UNITS))).train()
    blocks = list(copy.deepcopy(plain))
    models = {
        "plain": plain,
        PER_PAIR: nn.Sequential(*(Pair(*blocks[i : i + 2]) for i in range(0, UNITS, 2))),
        **{c: revwire.convert(copy.deepcopy(plain), x, coupling=c, rewire="everywhere") for c in COUPLINGS},
    }
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(-5, rounds):
        for name, model in models.items():
            seconds = timed(model, x.clone().requires_grad_())
            if turn >= 0:
                samples[name].append(seconds)
    times = {name: [Quartiles.of([1e6 * s[i] for s in found]) for i in (0, 1)] for name, found in samples.items()}
    rows: list[Row] = []
    arithmetic = {PER_PAIR: (0.0, 0.0), **{c: arithmetic_seconds(COUPLINGS[c], x) for c in COUPLINGS}}
    for method, both in arithmetic.items():
        for i, seconds in enumerate(both):
            again = times["plain"][0].median if i else 0.0
            rest = times[method][i].median - times["plain"][i].median - again - 1e6 * seconds
            rows.append(
                {
                    "method": method,
                    "direction": ("forward", "backward")[i],
                    "plain": asdict(times["plain"][i]),
                    "whole": asdict(times[method][i]),
                    "arithmetic": 1e6 * seconds,
                    "machinery": rest,
                }
            )
    return rows


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = {"width": WIDTH, "batch": BATCH, "units": UNITS, **vars(options)}
    run("overhead", config, lambda: measured(options.rounds)).publish()


if __name__ == "__main__":
    main()
