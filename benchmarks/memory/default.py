"""The plain call, ``convert(model, x)``, on models that users train: against stored activations, and against the
checkpointing that they would pick (`revwire.rival`). Peak bytes of a step, and paired seconds.

python -m benchmarks.memory.default                     # every model; or --only GLOB
python -m benchmarks.memory.default --resume            # what the record of this device does not have yet
"""

from __future__ import annotations

import argparse
import copy
import gc
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import revwire
from benchmarks.harness.record import RESULTS, Record, Row, environment, read
from benchmarks.memory.models import MODELS, made
from revwire.measure import paired_seconds, peak_bytes

NAME = "default"
STORED, RIVAL, PLAIN = "stored", "rival", "plain"
LOSS = "none: gradients of ones"
MOST_SECONDS = 20
"""For the timed rounds of a model: one that is slow has fewer."""


def measured(name: str, rounds: int) -> Row:
    """The row of a model; figures that are missing are null, and there is a reason."""
    row: Row = dict.fromkeys(
        (
            *(f"{variant}_bytes" for variant in (STORED, RIVAL, PLAIN)),
            *(f"{variant}_seconds" for variant in (STORED, RIVAL, PLAIN)),
            *("to_stored", "to_rival", "rival", "blocks", "units", "coverage", "checkpointed"),
            *(f"{variant}_forecast" for variant in (STORED, RIVAL, PLAIN)),
            *("convert_seconds", "plan_seconds", "rounds", "reason"),
        )
    )
    row = {"model": name, **row}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _fill(row, *made(name), rounds)
    except Exception as error:  # noqa: BLE001 - a record says why, and the next model is measured
        row["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def _fill(row: Row, model: nn.Module, example: Any, rounds: int) -> None:
    rival = revwire.rival(model, example)
    row.update(rival=rival.name, blocks=len(rival.blocks))
    row["plan_seconds"] = _seconds(lambda: revwire.plan(model, example))
    plain = copy.deepcopy(model)
    row["convert_seconds"] = _seconds(lambda: revwire.convert(plain, example))
    plan = revwire.report(plain)
    row.update(units=len(plan.units), coverage=plan.coverage, checkpointed=len(plan.checkpointed))
    if plan.peaks:
        found = plan.peaks.stored, plan.peaks.checkpointing, plan.peaks.planned
        row.update({f"{variant}_forecast": n for variant, n in zip((STORED, RIVAL, PLAIN), found, strict=True)})
    steps = {
        variant: partial(step, net, example) for variant, net in ((STORED, model), (RIVAL, rival.model), (PLAIN, plain))
    }
    for net in (model, plain):
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    row.update({f"{variant}_bytes": peak_bytes(run) for variant, run in steps.items()})
    row["rounds"] = min(rounds, max(1, int(MOST_SECONDS / _seconds(lambda: [run() for run in steps.values()]))))
    timings = paired_seconds(steps, row["rounds"])
    row.update({f"{variant}_seconds": asdict(timings.seconds(variant)) for variant in steps})
    row.update({f"to_{base}": asdict(timings.ratio(PLAIN, base)) for base in (STORED, RIVAL)})


class _Handed(torch.autograd.Function):
    """A loss that keeps nothing of what it is given, whose gradient is there once: what is measured is the model alone,
    as a plan forecasts it.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.like = t.new_empty(()).expand(t.shape)
        return torch.zeros((), device=t.device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return torch.ones(ctx.like.shape, dtype=ctx.like.dtype, device=ctx.like.device)


def step(model: nn.Module, example: Any) -> None:
    """Forward and backward of the model alone: each output is given a gradient of ones, and nobody holds it."""
    _loss(model, example).backward()


def _loss(model: nn.Module, example: Any) -> Tensor:
    given = tree_map(lambda leaf: leaf, example)  # a model may write to the list of its pathways
    out = model(**given) if isinstance(given, dict) else model(*given if isinstance(given, tuple) else [given])
    found = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([_Handed.apply(t) for t in found]).sum()


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def sweep(names: list[str], rounds: int, resume: bool, folder: Path) -> Record:
    """Measure what is missing, writing the record after every model."""
    order = {name: i for i, name in enumerate(MODELS)}
    there = [record for record in read(NAME, folder)[:1] if resume and record.config["loss"] == LOSS]
    rows = [r for record in there for r in record.results or [] if r["model"] in order]
    done = {row["model"] for row in rows}
    config = {"loss": LOSS, "mode": "train", "rounds": rounds, "call": "revwire.convert(model, example)"}
    record = Record(NAME, "ok", None, config, rows, environment("cpu"))
    for name in track([n for n in names if n not in done], "models"):
        found = [*(record.results or []), measured(name, rounds)]
        record = replace(record, results=sorted(found, key=lambda row: order[row["model"]]))
        record.write(folder)
        gc.collect()
    return record


def main() -> None:
    """Measure the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="keep what the record of this device has")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the record goes")
    options = parser.parse_args()
    names = [name for name in MODELS if fnmatch(name, options.only)]
    record = sweep(names, options.rounds, options.resume, options.folder)
    for row in record.results or []:
        print(row["model"], row["reason"] or "ok")


if __name__ == "__main__":
    main()
