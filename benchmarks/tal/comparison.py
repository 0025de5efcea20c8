"""One experiment, five ways to keep activations, several seeds: each run a process of its own, and one record of all.

Runs that are there already, of the very same configuration, are not repeated: a comparison that was ended goes on where
it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.harness.record import Record, Row, run
from benchmarks.tal import costs, loading
from benchmarks.tal.config import Config, load

ROOT = Path(__file__).parents[2]

VARIANTS: dict[str, tuple[str, ...]] = {
    "stored": ("memory=stored",),
    "checkpoint": ("memory=checkpoint",),
    "re2tal": ("memory=re2tal",),
    "bdia": ("memory=bdia",),
    "frozen": ("memory=stored", "backbone.frozen=true"),
}
"""What each variant changes; ``frozen`` trains the localizer alone, on features of a backbone with random or given
weights.
"""


def compare(source: str, overrides: Sequence[str], seeds: int, jobs: int, rounds: int) -> Record:
    """Run all variants with all seeds, ``jobs`` at a time, then measure what a step costs; the record is named after
    the configuration.
    """
    base = load(source, overrides)
    loading.draw(base)
    names = [(variant, seed) for seed in range(seeds) for variant in VARIANTS]
    chosen = {
        "config": dataclasses.asdict(base),
        "seeds": seeds,
        "variants": {name: list(change) for name, change in VARIANTS.items()},
    }

    def measure() -> list[Row]:
        with Progress() as bar, ThreadPoolExecutor(jobs) as pool:
            task = bar.add_task("runs", total=len(names))
            found = list(pool.map(lambda name: _counted(bar, task, _run(source, overrides, *name)), names))
        variants = {name: load(source, [*overrides, *change]) for name, change in VARIANTS.items()}
        classes = 1 if base.class_agnostic else len(loading.truth(base).classes)
        cost = costs.measured(
            variants, classes=classes, batch=base.training.batch, rounds=rounds, device=costs.device(base)
        )
        return [{**row, "cost": next(c for c in cost if c["memory"] == row["variant"])} for row in found]

    return run(f"tal_{base.name}", chosen, measure, costs.device(base).type)


def _run(source: str, overrides: Sequence[str], variant: str, seed: int) -> Row:
    """One run in its own process, or what is there of it.

    Raises:
        RuntimeError: it failed; says what it printed last.
    """
    changes = [*overrides, *VARIANTS[variant], f"seed={seed}"]
    config = load(source, changes)
    found = _result(config)
    if found is None:
        command = [sys.executable, "-m", "benchmarks.tal", "train", "--config", source, "--quiet", *changes]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found = _result(config)
        if done.returncode or found is None:
            said = done.stderr.strip().splitlines()
            raise RuntimeError(f"{variant}, seed {seed}: {said[-1] if said else 'no result'}")
    keys = ("seed", "steps", "batch", "frames", "crop", "figures", "tested_clips")
    return {"variant": variant, **{key: found[key] for key in keys}}


def _result(config: Config) -> dict[str, Any] | None:
    """The row of a run of this very configuration, if there is one."""
    for path in config.folder.glob("result.*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["config"] == json.loads(json.dumps(dataclasses.asdict(config))) and record["results"]:
            return record["results"][0]
    return None


def _counted(bar: Progress, task: Any, row: Row) -> Row:
    bar.advance(task)
    return row
