"""What the planner predicts, against what a step takes afterwards. Claim: within 15 %, on networks and shapes that it was not built with.

python -m benchmarks.memory.planner            # bytes only: exact, whatever else the machine does
python -m benchmarks.memory.planner --seconds  # and seconds, as ratios within a round: on a machine that does nothing else
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import nn

import revwire
from benchmarks.harness.record import Row, run
from benchmarks.memory.alternatives import step
from benchmarks.memory.networks import NETWORKS, network
from revwire.measure import paired_seconds, peak_bytes

CASES: dict[str, tuple[int, int, int]] = {  # depth, batch, length
    "ViT-S/16": (8, 2, 224),
    "GPT": (6, 2, 300),
    "swin3d_t": (0, 1, 8),
    "convnext_tiny": (0, 2, 128),
    "inflated ResNet-152": (0, 1, 4),
    "slowfast_r101": (0, 1, 16),
}
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Budgets: shares of the way from the least peak to that of stored activations."""


def measured(name: str, rounds: int) -> list[Row]:
    """One row per budget: predicted and measured bytes, predicted seconds over those of stored activations; with ``rounds`` measured."""
    depth, batch, length = CASES[name]
    example = NETWORKS[name].example(batch, length)
    forecast = revwire.plan(network(name, depth), example, memory_budget="least").forecast
    assert forecast is not None
    low, high = forecast.peak_bytes, forecast.stored.peak_bytes
    models: dict[str, nn.Module] = {}
    rows = []
    for share in SHARES:
        model = revwire.convert(network(name, depth), example, memory_budget=int(low * 1.001 + share * (high - low)))
        plan = revwire.report(model)
        modes = [u.mode for u in plan.units]
        rows.append(
            {
                "network": name,
                "share": share,
                "budget": plan.forecast.budget,
                "predicted_bytes": plan.forecast.peak_bytes,
                "measured_bytes": peak_bytes(partial(step, model, example)),
                "predicted_time_ratio": plan.forecast.seconds / plan.forecast.stored.seconds,
                **{mode: modes.count(mode) for mode in ("stored", "checkpointed", "reversible")},
            }
        )
        models[str(share)] = model
    return _timed(rows, models, example, rounds) if rounds else rows


def _timed(rows: list[Row], models: dict[str, nn.Module], example: Any, rounds: int) -> list[Row]:
    timings = paired_seconds({share: partial(step, model, example) for share, model in models.items()}, rounds)
    return [{**row, "measured_time_ratio": timings.ratio(str(row["share"]), "1.0").median} for row in rows]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", action="store_true", help="time steps too")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rounds = options.rounds if options.seconds else 0
    config = {"coupling": "the default", "cases": {n: dict(zip(("depth", "batch", "length"), c, strict=True)) for n, c in CASES.items()}}
    record = run("planner", {**config, "rounds": rounds}, lambda: [r for n in track(list(CASES), "networks") for r in measured(n, rounds)])
    print(record.write(), record.status, record.reason or "")


if __name__ == "__main__":
    main()
