"""What the planner predicts, against what a step takes afterwards. Claim: within 15 %, on networks and shapes that it
was not built with.

python -m benchmarks.memory.planner            # bytes: exact, whatever else the machine does
python -m benchmarks.memory.planner --seconds  # and seconds, as ratios within a round, on a machine at rest
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn
from torch.utils.checkpoint import checkpoint

import revwire
from benchmarks.harness.record import RESULTS, Record, Row, environment
from benchmarks.memory.networks import NETWORKS, network
from benchmarks.memory.steps import step
from revwire.measure import paired_seconds, peak_bytes

CASES: dict[str, tuple[int, int, int]] = {  # depth, batch, length
    "ViT-S/16": (4, 2, 224),
    "ViT-S/16, bfloat16 autocast": (4, 8, 224),
    "GPT": (4, 2, 200),
    "ViT-S/16, attention maps": (2, 1, 448),
    "swin3d_t": (0, 1, 4),
    "convnext_tiny": (0, 2, 64),
    "davit_tiny, bfloat16 autocast": (0, 2, 64),  # the one that forecasts under autocast were mended by
    "slowfast_r101": (0, 1, 8),
    "inflated ResNet-152": (0, 1, 2),
}
SHARES = (0.5, 1.0, 0.25, 0.75)
"""Budgets beside the least: shares of the way from there to the peak of stored activations."""


def measured(name: str, shares: Sequence[float], rounds: int) -> list[Row]:
    """One row per budget: predicted and measured bytes, predicted seconds over those of stored activations; with
    ``rounds`` measured.
    """
    depth, batch, length = CASES[name]
    rival: Row = {}
    around = NETWORKS[name].around
    example = NETWORKS[name].example(batch, length)
    models: dict[str, nn.Module] = {}
    rows: list[Row] = []
    low = high = 0
    for share in (0.0, *shares):
        budget = int(low + share * (high - low)) if share else "least"
        with around():
            model = revwire.convert(network(name, depth), example, memory_budget=budget)
        plan = revwire.report(model)
        assert plan.forecast is not None
        if not share:
            low, high = plan.forecast.peak_bytes, plan.forecast.stored.peak_bytes
            assert plan.forecast.checkpoint is not None
            rival = {
                "checkpoint_predicted_bytes": plan.forecast.checkpoint.peak_bytes,
                "checkpoint_measured_bytes": peak_bytes(
                    partial(step, checkpointed(network(name, depth), plan.hosts), example, around)
                ),
            }
        modes = [u.mode for u in plan.units]
        rows.append(
            {
                "network": name,
                "share": share,
                "budget": plan.forecast.budget,
                "predicted_bytes": plan.forecast.peak_bytes,
                "measured_bytes": peak_bytes(partial(step, model, example, around)),
                "predicted_time_ratio": plan.forecast.seconds / plan.forecast.stored.seconds if rounds else None,
                "chunks": max(u.chunks for u in plan.units),
                **{mode: modes.count(mode) for mode in ("stored", "selective", "checkpointed", "reversible")},
                **rival,
            }
        )
        models[str(share)] = model
    return _timed(rows, models, example, rounds) if rounds else rows


def checkpointed(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    """`torch.utils.checkpoint` around the modules of these names."""
    for path in paths:
        module = model.get_submodule(path)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


def _timed(rows: list[Row], models: dict[str, nn.Module], example: Any, rounds: int) -> list[Row]:
    """Seconds over those of the budget that holds everything (share 1)."""
    steps = {
        share: partial(step, model, example, NETWORKS[rows[0]["network"]].around) for share, model in models.items()
    }
    timings = paired_seconds(steps, rounds)
    return [{**row, "measured_time_ratio": timings.ratio(str(row["share"]), "1.0").median} for row in rows]


def main() -> None:
    """Measure, and write the record after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", action="store_true", help="time steps too (with share 1 among the shares)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the record goes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    rounds = options.rounds if options.seconds else 0
    config = {"coupling": "the default", "cases": CASES, "shares": list(options.shares), "rounds": rounds}
    record = Record("planner", "ok", None, config, [], environment("cpu"))
    for name in track(
        list(CASES), "networks"
    ):  # on real values: along which dimensions a unit may be cut is found from them
        record = replace(record, results=[*(record.results or []), *measured(name, options.shares, rounds)])
        record.write(options.folder)


if __name__ == "__main__":
    main()
