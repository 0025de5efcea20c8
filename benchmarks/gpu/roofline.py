"""An estimate, not a measurement: seconds of a training step on an H200 by its roofline, beside checkpointing's.

python -m benchmarks.gpu.roofline

A step runs on the CPU, on the path of a CUDA tensor (`counting`), under bfloat16 autocast. Each launch takes as long as
its bytes or its operations need at the device's rates, whichever is longer, and never less than `LAUNCH` seconds. What
Python takes is not in it, nor what caches save or bad access patterns cost. Steps of two and of three samples are
counted; from these follows each launch at the batch of the estimate.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torchvision.models.video import swin3d_t

import revwire
from benchmarks.gpu.counting import INTERPRETED, Work, work_of
from benchmarks.harness.record import RESULTS, Record, Row, environment, read
from benchmarks.memory.steps import step

NAME = "gpu_roofline"
LAUNCH = 2e-6
CHECKPOINTING, RE2TAL, BDIA = "checkpointing", "revwire re2tal", "revwire bdia 1/16"


@dataclass(frozen=True)
class Rates:
    """Of a device: bytes, and operations in bfloat16, per second."""

    bytes: float
    flops: float


RATES = {"at the peak": Rates(4.8e12, 989e12), "as attained": Rates(0.85 * 4.8e12, 0.65 * 989e12)}
"""An H200 SXM: by its data sheet, and the parts of it that well-sized kernels usually reach."""


@dataclass(frozen=True)
class Subject:
    """A network, what it is given by its batch, the batch of the estimate, and the most that the ratio may be."""

    build: Callable[[], nn.Module]
    example: Callable[[int], Tensor]
    batch: int
    target: float


def _noise(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


SUBJECTS = {
    "ViT-B/16": Subject(partial(timm.create_model, "vit_base_patch16_224"), _noise(3, 224, 224), 64, 1.08),
    "Swin3D-T, 16 frames": Subject(partial(swin3d_t, weights=None), _noise(3, 16, 224, 224), 16, 1.12),
}

METHODS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    CHECKPOINTING: lambda model, x: revwire.rival(model, x).model,
    RE2TAL: lambda model, x: revwire.convert(model, x, coupling="re2tal", rewire="everywhere"),
    BDIA: lambda model, x: revwire.convert(model, x, coupling="bdia:1/16", rewire="everywhere"),
}

Pair = tuple[Work, Work]
"""The same launch in steps of two batches, `COUNTED`."""

COUNTED = 2, 3
"""Of one sample, a step has fewer launches: nothing is summed over the batch."""


def autocast() -> torch.autocast:
    """What the networks train under."""
    return torch.autocast("cpu", torch.bfloat16)


def launches(subject: Subject, method: str) -> tuple[list[Pair], int]:
    """Those of a step, and the number of rewired units.

    Raises:
        RuntimeError: steps of two batches launch different things.
    """
    torch.manual_seed(0)
    examples, model = [subject.example(batch) for batch in COUNTED], subject.build().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with autocast():
            changed = METHODS[method](model, examples[0])
        few, more = (work_of(partial(step, changed, x, autocast)) for x in examples)
    if [w.name for w in few] != [w.name for w in more]:
        raise RuntimeError(f"{method}: steps of two batches launch different things")
    units = 0 if method == CHECKPOINTING else len(revwire.report(model).units)
    return list(zip(few, more, strict=True)), units


def at(pair: Pair, batch: int) -> Work:
    """A launch in a step of a batch: what grows with it does so by the sample."""
    few, more = pair
    further = (batch - COUNTED[0]) / (COUNTED[1] - COUNTED[0])
    return Work(few.name, *(round(a + further * (b - a)) for a, b in zip(few[1:], more[1:], strict=True)))


def seconds(work: list[Work], rates: Rates) -> float:
    """Of launches one after the other."""
    return sum(max(w.bytes / rates.bytes, w.flops / rates.flops, LAUNCH) for w in work)


def measured(network: str, method: str, base: Row | None) -> Row:
    """The row of a network and a method; ``base`` is that of checkpointing, None for itself."""
    subject = SUBJECTS[network]
    pairs, units = launches(subject, method)
    work = [at(pair, subject.batch) for pair in pairs]
    row: Row = {"network": network, "batch": subject.batch, "method": method, "units": units}
    row |= {"launches": len(work), "kernels": sum(w.name.startswith("kernel") for w in work)}
    row |= {"bytes": sum(w.bytes for w in work), "flops": sum(w.flops for w in work)}
    row |= {"waits": sum(w.waits for w in work), "target": subject.target if base else None}
    for name, rates in RATES.items():
        estimate = seconds(work, rates)
        row |= {
            f"seconds {name}": estimate,
            f"to_checkpointing {name}": estimate / (base or {}).get(f"seconds {name}", estimate),
        }
    return row


def main() -> None:
    """Count, writing the record after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help=f"of {', '.join(SUBJECTS)}; other rows stay")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the record goes")
    options = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in INTERPRETED.items()):
        os.environ.update(INTERPRETED)  # Triton must find its variable when it is imported
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.roofline", *sys.argv[1:]])
    rates = {name: vars(rates) for name, rates in RATES.items()}
    config = {"what": "an estimate", "device": "H200", "rates": rates, "launch_seconds": LAUNCH, "dtype": "bfloat16"}
    names = [name for name in SUBJECTS if fnmatch(name, options.only)]
    there = [row for record in read(NAME, options.folder)[:1] for row in record.results or []]
    rows: list[Row] = [row for row in there if row["network"] in SUBJECTS and row["network"] not in names]
    for network in names:
        base = None
        for method in METHODS:
            rows.append(measured(network, method, base))
            base = base or rows[-1]
            Record(NAME, "ok", None, config, rows, environment()).write(options.folder)
            found = {key: value for key, value in rows[-1].items() if key.startswith("to_")}
            print(network, method, found, f"target {rows[-1]['target']}", flush=True)


if __name__ == "__main__":
    main()
