"""Validation loss of the character model while its training goes on: with stored activations, and reversible; rewired,
and reverted.

python -m benchmarks.retention.language_model_finetuning

Goes on from the model of `language_model` (it trains it, where that has not been done), on the same files. Each budget
of k steps is a run of its own, whose rate falls linearly to zero; 0 is straight after conversion. All wirings of a seed
see the same batches. "rewired" is the network as it was trained, "reverted" has the same weights in the original
architecture.
"""

from __future__ import annotations

import argparse
import copy
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

WIRINGS = ("stored", "bdia", "re2tal")
BUDGETS = (0, 50, 200)
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


def measured(options: argparse.Namespace, scratch: Scratch) -> list[Row]:
    """One row for each run."""
    training, held_out = text()
    original = trained(options, training)
    batches = validation(options, held_out)

    def figures(wiring: str, seed: int, steps: int) -> Row:
        model = copy.deepcopy(original)
        if wiring != "stored":
            revwire.convert(model, batches[0][:, :-1], coupling=wiring, rewire="everywhere")
        finetuned(model, steps, seed, training, options.length)
        found = {"loss": validation_loss(model, batches)}
        return found if wiring == "stored" else {**found, "reverted_loss": validation_loss(reverted(model), batches)}

    def row(seed: int, wiring: str, steps: int) -> Row:
        empty = {"wiring": wiring, "seed": seed, "steps": steps, "loss": None, "reverted_loss": None}
        return {**empty, **or_reason(lambda: figures(wiring, seed, steps))}

    cases = [
        c for c in product(options.seeds, options.wirings, BUDGETS) if c[2] or not c[0]
    ]  # before any step, seeds make no difference
    return [
        scratch.row("finetuned.{}.{}.{}".format(*case), lambda case=case: row(*case)) for case in track(cases, "runs")
    ]


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--wirings", nargs="+", default=list(WIRINGS))
    options = parser.parse_args()
    finetuning = {"budgets": list(BUDGETS), "rate": RATE, "batch": BATCH}
    scratch = Scratch(options.scratch, {"training": config(options), "finetuning": finetuning})
    run("language_model_finetuning", scratch.config, lambda: measured(options, scratch)).publish()


if __name__ == "__main__":
    main()
