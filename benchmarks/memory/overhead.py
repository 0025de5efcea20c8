"""What the machinery costs, beside the arithmetic: microseconds per unit on branches that do almost nothing, forward and backward.

python -m benchmarks.memory.overhead

A chain of small blocks x + linear(norm(x)) takes turns with the same blocks as they were. *Machinery* is what is left of the difference
when the arithmetic of the streams (called by itself on states of the same shape) is taken away, and, in backward, one more evaluation of
the branch, which every method that recomputes pays. On one thread, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import asdict
from time import perf_counter

import torch
from torch import Tensor, nn

import revwire
from benchmarks.harness.record import Row, run
from revwire._couplings import Rule
from revwire._numerics import FixedStreams
from revwire.measure import Quartiles

WIDTH, BATCH, UNITS = 16, 16, 64
COUPLINGS = {c.name: c for c in (revwire.Re2TAL(), revwire.Bdia(1 / 16))}


class Block(nn.Module):
    """x + linear(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def timed(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds of a forward and of a backward pass, per block."""
    start = perf_counter()
    loss = model(x).square().mean()
    middle = perf_counter()
    loss.backward()
    return (middle - start) / UNITS, (perf_counter() - middle) / UNITS


def _best(call: Callable[[], object], times: int = 2000) -> float:
    """The seconds of a call, in the fastest of some runs."""
    return min(_seconds(call, times) for _ in range(5)) / times


def _seconds(call: Callable[[], object], times: int) -> float:
    start = perf_counter()
    for _ in range(times):
        call()
    return perf_counter() - start


def arithmetic(coupling: str, x: Tensor) -> tuple[float, float]:
    """Seconds of one step of the streams, and of reading a state and going back."""
    streams = FixedStreams.for_range(8.0, torch.float32)
    rule = Rule.of(COUPLINGS[coupling].coefficients)
    state, f = streams.enter(x), torch.randn_like(x)
    done = streams.step(state, x, f, rule)
    forward = _best(lambda: streams.step(state, x, f, rule))
    return forward, _best(lambda: (streams.read(state), streams.unstep(done.state, x, f, rule, done.bits)))


def measured(rounds: int) -> list[Row]:
    """One row per coupling and direction, in microseconds."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, WIDTH)
    plain = nn.Sequential(*(Block() for _ in range(UNITS))).train()
    models = {"plain": plain, **{c: revwire.convert(copy.deepcopy(plain), x, coupling=c) for c in COUPLINGS}}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for turn in range(-5, rounds):
        for name, model in models.items():
            seconds = timed(model, x.clone().requires_grad_())
            if turn >= 0:
                samples[name].append(seconds)
    times = {name: [Quartiles.of([1e6 * s[i] for s in found]) for i in (0, 1)] for name, found in samples.items()}
    rows: list[Row] = []
    for coupling in COUPLINGS:
        for i, seconds in enumerate(arithmetic(coupling, x)):
            again = times["plain"][0].median if i else 0.0
            rest = times[coupling][i].median - times["plain"][i].median - again - 1e6 * seconds
            rows.append(
                {
                    "method": coupling,
                    "direction": ("forward", "backward")[i],
                    "plain": asdict(times["plain"][i]),
                    "whole": asdict(times[coupling][i]),
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
    record = run("overhead", config, lambda: measured(options.rounds))
    print(record.write(), record.status, record.reason or "")


if __name__ == "__main__":
    main()
