"""Validation loss of the character model while its training goes on: with stored activations, and reversible; rewired,
and reverted.

python -m benchmarks.retention.language_model_finetuning

Goes on from the model of `language_model` (it trains it, where that has not been done), on the same files. Each budget
of k steps is a run of its own, whose rate falls linearly to zero; 0 is straight after conversion. All wirings of a seed
see the same batches. "rewired" is the network as it was trained, "reverted" has the same weights in the original
architecture. Only the wirings between which the default is chosen run for 1000 steps. The predictors of `innovation`
are fitted once, before the first step, to text of the training files.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from itertools import product

import torch
from rich.progress import track
from torch import Tensor, nn

import revwire
from benchmarks.harness.record import Row, run
from benchmarks.retention.language_model import (
    add_options,
    config,
    loss,
    text,
    trained,
    validation,
    validation_loss,
    windows,
)
from benchmarks.retention.resume import Scratch
from benchmarks.retention.wirings import or_reason, reverted

CANDIDATES = ("stored", "bdia", "innovation")
WIRINGS = (
    *CANDIDATES,
    *("innovation:1/2", "innovation:1", "re2tal", "bdia:1/4", "bdia:1/2", "bdia-random:1/2"),
)
BUDGETS = (0, 50, 200)
CANDIDATES_BUDGETS = (1000,)
RATE, BATCH = 3e-4, 8


def finetuned(model: nn.Module, steps: int, seed: int, codes: Tensor, length: int) -> None:
    """Train the model in place, and leave it in evaluation mode."""
    generator = torch.Generator().manual_seed(100 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, max(steps, 1))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, windows(codes, BATCH, length, generator)).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def converted(model: nn.Module, wiring: str, training: Tensor, length: int) -> nn.Module:
    """The model itself in this wiring."""
    if wiring == "stored":
        return model
    examples = windows(training, 64, length, torch.Generator().manual_seed(5))[:, :-1].split(32)
    fitted = {"calibrate": examples} if wiring.startswith("innovation") else {}
    return revwire.convert(model, examples[0], coupling=wiring, rewire="everywhere", **fitted)


def cases(seeds: Iterable[int], wirings: Iterable[str]) -> list[tuple[int, str, int]]:
    """(seed, wiring, steps) of each run, the short ones first. Before any step, seeds make no difference."""
    wirings, seeds = list(wirings), list(seeds)
    short = [case for case in product(seeds, wirings, BUDGETS) if case[2] or case[0] == seeds[0]]
    return short + list(product(seeds, [w for w in wirings if w in CANDIDATES], CANDIDATES_BUDGETS))


def measured(options: argparse.Namespace, scratch: Scratch) -> list[Row]:
    """One row for each run."""
    training, held_out = text()
    original = trained(options, training)
    batches = validation(options, held_out)

    def figures(wiring: str, seed: int, steps: int) -> Row:
        model = converted(copy.deepcopy(original), wiring, training, options.length)
        finetuned(model, steps, seed, training, options.length)
        found = {"loss": validation_loss(model, batches)}
        return found if wiring == "stored" else {**found, "reverted_loss": validation_loss(reverted(model), batches)}

    def row(seed: int, wiring: str, steps: int) -> Row:
        empty = {"wiring": wiring, "seed": seed, "steps": steps, "loss": None, "reverted_loss": None}
        return {**empty, **or_reason(lambda: figures(wiring, seed, steps))}

    runs = track(cases(options.seeds, options.wirings), "runs")
    return [scratch.row("finetuned.{}.{}.{}".format(*case), lambda case=case: row(*case)) for case in runs]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--wirings", nargs="+", default=list(WIRINGS))
    options = parser.parse_args()
    budgets = {"budgets": list(BUDGETS), "candidates_budgets": list(CANDIDATES_BUDGETS)}
    finetuning = {**budgets, "rate": RATE, "batch": BATCH}
    scratch = Scratch(options.scratch, {"training": config(options), "finetuning": finetuning})
    run("language_model_finetuning", scratch.config, lambda: measured(options, scratch)).publish()


if __name__ == "__main__":
    main()
