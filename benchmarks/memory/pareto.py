"""Seconds of a step against its peak bytes, all methods taking turns. On a machine that does nothing else.

python -m benchmarks.memory.pareto                  # ViT-S/16, depth 12
python -m benchmarks.memory.pareto --keep-memory    # the same without the page faults of freshly allocated memory
python -m benchmarks.memory.pareto --network GPT --length 1024 --batch 1
python -m benchmarks.memory.pareto --network "ViT-S/16, bfloat16 autocast" --batch 16 --rounds 3
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

import revwire
from benchmarks.harness.heap import keep_memory
from benchmarks.harness.record import Row, run
from benchmarks.memory.alternatives import CHECKPOINT, METHODS, SELECTIVE, STORED, Method, Unsuited, reversible
from benchmarks.memory.networks import NETWORKS, network
from benchmarks.memory.steps import in_turn, step
from revwire.measure import peak_bytes

SHARES = (0.25, 0.5, 0.75)
COUPLINGS = {"re2tal": "re2tal", "bdia 1/16": "bdia:1/16"}
RIVALS = {"checkpointing": CHECKPOINT, "selective checkpointing": SELECTIVE}
"""Methods whose bytes a plan gets as its budget, to compare seconds at equal memory; by what the table calls them."""


def measured(name: str, depth: int, batch: int, length: int, rounds: int, skip: tuple[str, ...] = ()) -> list[Row]:
    """One row per method: peak bytes, seconds, and the ratios to stored activations and to checkpointing within each
    round.
    """
    example = NETWORKS[name].example(batch, length)
    models: dict[str, nn.Module] = {}
    rows: dict[str, Row] = {}
    around = NETWORKS[name].around
    rivals = {
        text: peak_bytes(partial(step, METHODS[method](name, network(name, depth), example), example, around))
        for text, method in RIVALS.items()
    }
    methods = {m: make for m, make in METHODS.items() if m not in skip} | _budgets(name, depth, example, rivals)
    for method, make in methods.items():
        rows[method] = {"network": name, "method": method, "peak_bytes": None, "reason": None}
        try:
            with around():
                models[method] = make(name, network(name, depth), example)
            rows[method]["peak_bytes"] = peak_bytes(partial(step, models[method], example, around))
        except (Unsuited, RuntimeError, ValueError, TypeError) as error:
            models.pop(method, None)
            rows[method]["reason"] = f"{type(error).__name__}: {error}"[:200]
    timings = in_turn(models, example, rounds, around)
    for method in models:
        ratios = {"to_stored": timings.ratio(method, STORED), "to_checkpoint": timings.ratio(method, CHECKPOINT)}
        rows[method] |= {"seconds": asdict(timings.seconds(method)), **{k: asdict(v) for k, v in ratios.items()}}
    return list(rows.values())


def _budgets(name: str, depth: int, example: torch.Tensor, rivals: dict[str, int]) -> dict[str, Method]:
    """The planner at budgets between the least and that of stored activations; and at the bytes that ``rivals``
    need.
    """
    with NETWORKS[name].around():
        forecast = revwire.plan(network(name, depth), example, memory_budget="least").forecast
    assert forecast is not None
    low, high = forecast.peak_bytes, forecast.stored.peak_bytes
    shares = {
        f"revwire bdia 1/16, budget {share:.0%}": reversible(memory_budget=int(low + share * (high - low)))
        for share in SHARES
    }
    level = {
        f"revwire {text}, budget of {rival}": reversible(coupling=c, memory_budget=size)
        for rival, size in rivals.items()
        for text, c in COUPLINGS.items()
    }
    return shares | level


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ViT-S/16", choices=list(NETWORKS))
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--keep-memory", action="store_true", help="let the C library keep what is freed; see `benchmarks.harness.heap`"
    )
    parser.add_argument("--skip", nargs="*", default=[], help="methods to leave out")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    name = "memory_pareto_" + "".join(c if c.isalnum() else "_" for c in options.network.lower())
    if options.keep_memory:
        keep_memory()
        name += "_kept"
    sizes = (options.network, options.depth, options.batch, options.length, options.rounds, tuple(options.skip))
    run(name, {"loss": "mean square", **vars(options)}, lambda: measured(*sizes)).publish()


if __name__ == "__main__":
    main()
