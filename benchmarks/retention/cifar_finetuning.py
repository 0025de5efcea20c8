"""Top-1 of CIFAR-10 ResNets while they are fine-tuned: with stored activations, and reversible; rewired, and reverted.

python -m benchmarks.retention.cifar_finetuning --data-root DATA

Each budget of k steps is a run of its own, whose rate falls to zero over its k steps; 0 is straight after conversion.
All wirings of a seed see the same batches. "rewired" is the network as it was trained; "reverted" has the same weights
in the original architecture. "scratch" is the original architecture with stored activations, from random weights. The
largest budget is measured on the whole test set; all budgets on every fifth image of it. The images are lossy JPEG
copies: compare within this table.

Rows are kept in ``--scratch`` as they come, so a run that was ended goes on. ``--write`` makes the record of what is
there, and runs nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import revwire
from benchmarks.harness import data
from benchmarks.harness.record import Row, run
from benchmarks.retention.cifar import ARCHIVES, NORMALIZE, WEIGHTS, ResNet, images, outcomes, pretrained
from benchmarks.retention.resume import Scratch, add_option
from benchmarks.retention.wirings import or_reason, reverted

WIRINGS = ("stored", "bdia", "re2tal", "scratch", "bdia-random:1/2", "momentum:1/8")
BATCH = {20: 32, 56: 16}
BUDGETS = (0, 50, 200, 1000)
RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
PART = 5  # every so many images of the test set make the part on which all budgets are measured


@dataclass(frozen=True)
class Case:
    """One run: a network in a wiring, fine-tuned for some steps with the batches of a seed."""

    depth: int
    seed: int
    wiring: str
    steps: int

    @property
    def name(self) -> str:
        return f"resnet{self.depth}.seed{self.seed}.{self.wiring}.{self.steps}"


@dataclass(frozen=True)
class Data:
    """The images and labels of both splits, and the data root."""

    root: Path
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, root: Path) -> Data:
        train, test = (
            images(data.file(root, ARCHIVES[split], f"the CIFAR-10 {split} images")) for split in ("train", "test")
        )
        return cls(root, train, test)


def network(case: Case, source: Data) -> nn.Module:
    """The network in its wiring, with the pretrained weights but for "scratch"."""
    torch.manual_seed(case.seed)
    if case.wiring == "scratch":
        return ResNet(case.depth)
    model = pretrained(case.depth, data.file(source.root, WEIGHTS[case.depth], f"ResNet-{case.depth} weights"))
    example = NORMALIZE(source.test[0][:64].float() / 255)
    return (
        model if case.wiring == "stored" else revwire.convert(model, example, coupling=case.wiring, rewire="everywhere")
    )


def batches(case: Case, source: Data) -> Iterator[tuple[Tensor, Tensor]]:
    """As many batches as the case has steps: shuffled, flipped, and cropped from four pixels of padding, all by the
    seed.
    """
    generator = torch.Generator().manual_seed(case.seed)
    pictures, labels = source.train
    size = BATCH[case.depth]
    order = torch.randperm(len(labels), generator=generator)
    for step in range(case.steps):
        chosen = order[step * size : (step + 1) * size]
        yield NORMALIZE(augmented(pictures[chosen].float() / 255, generator)), labels[chosen]


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of (batch, 3, 32, 32) flipped or not, and moved by up to four pixels."""
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = F.pad(torch.where(flips[:, None, None, None], x.flip(-1), x), (4, 4, 4, 4))
    corners = torch.randint(9, (len(x), 2), generator=generator).tolist()
    return torch.stack([image[:, i : i + 32, j : j + 32] for image, (i, j) in zip(x, corners, strict=True)])


def finetuned(case: Case, source: Data) -> nn.Module:
    """The network after its steps: SGD whose rate falls to zero along a half cosine."""
    model = network(case, source).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(case.steps, 1))
    for x, y in batches(case, source):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measured(case: Case, source: Data) -> Row:
    """Top-1 rewired and reverted, on the part and, after the largest budget, on the whole test set; or the reason why
    there is none.
    """
    figures = ("top1_part", "top1", "reverted_top1_part", "reverted_top1")
    row = {
        "network": f"ResNet-{case.depth}",
        "wiring": case.wiring,
        "seed": case.seed,
        "steps": case.steps,
        **dict.fromkeys(figures),
    }
    return {**row, **or_reason(lambda: _figures(case, source))}


def _figures(case: Case, source: Data) -> Row:
    model = finetuned(case, source)
    whole = case.steps == BUDGETS[-1]
    found = _top1(model, source, whole)
    if case.wiring in ("stored", "scratch"):
        return found
    back = _top1(reverted(model), source, whole)
    return {**found, **{f"reverted_{key}": value for key, value in back.items()}}


def _top1(model: nn.Module, source: Data, whole: bool) -> Row:
    pictures, labels = source.test if whole else (t[::PART] for t in source.test)
    right = outcomes(model, pictures, labels).double()
    part = right[::PART] if whole else right
    return {"top1_part": part.mean().item(), "top1": right.mean().item() if whole else None}


def finished(cases: list[Case], source: Data, scratch: Scratch, jobs: int) -> Iterator[Row]:
    """The rows as they come, so many runs at a time, each on one thread; the processes share the images."""

    def row(case: Case) -> Row:
        return scratch.row(case.name, lambda: measured(case, source))

    if jobs == 1:
        yield from map(row, cases)
        return
    torch.set_num_threads(1)
    _Forked.row = row
    with get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_Forked.run, cases)


class _Forked:
    """What the processes of a pool find when they are forked: a function with its images, which would be copied if it
    were sent.
    """

    row: Callable[[Case], Row]

    @staticmethod
    def run(case: Case) -> Row:
        """One row, in a process of the pool."""
        return _Forked.row(case)


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_option(parser)
    add_option(parser, "cifar_finetuning")
    parser.add_argument("--depths", type=int, nargs="+", default=list(BATCH))
    parser.add_argument("--wirings", nargs="+", default=list(WIRINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--write", action="store_true", help="write the record of the rows that are measured already")
    options = parser.parse_args()
    chosen = {
        "data": ARCHIVES,
        "batch": {str(k): v for k, v in BATCH.items()},
        "rate": RATE,
        "momentum": MOMENTUM,
        "decay": DECAY,
    }
    scratch = Scratch(options.scratch, {**chosen, "budgets": BUDGETS, "part": f"every {PART}th image of the test set"})
    cases = [
        Case(depth, seed, wiring, steps)
        for depth, seed, wiring, steps in product(options.depths, options.seeds, options.wirings, BUDGETS)
        if steps or not seed or wiring == "scratch"  # before any step, a seed makes a difference only to random weights
    ]
    if not options.write:
        source = Data.of(options.data_root)
        for _ in track(finished(cases, source, scratch, options.jobs), "runs", total=len(cases)):
            pass
    rows = [row for case in cases if (row := scratch.kept(case.name))]
    run("cifar_finetuning", scratch.config, lambda: rows).publish()


if __name__ == "__main__":
    main()
