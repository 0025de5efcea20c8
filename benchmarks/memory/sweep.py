"""Peak bytes of a training step: network × depth × input length × method. One record per sweep, written after every
case.

python -m benchmarks.memory.sweep                    # every sweep; or their names
python -m benchmarks.memory.sweep memory_vit --resume

Bytes are those of PyTorch's allocator above rest, with ``.grad`` allocated: they do not depend on what else the machine
does, nor on values, so matrix products are left out; `python -m benchmarks.memory.hollow` measures on small cases what
that changes. A case that a method cannot take, or that fails, is null and a reason.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from rich.progress import track

from benchmarks.harness.record import RESULTS, Record, Row, environment, read
from benchmarks.memory.alternatives import (
    BDIA,
    CHECKPOINT,
    COUPLINGS,
    MAIN,
    METHODS,
    NOT_RUN,
    RE2TAL,
    SELECTIVE,
    STORED,
    Unsuited,
)
from benchmarks.memory.hollow import products_left_out
from benchmarks.memory.networks import NETWORKS, network
from benchmarks.memory.steps import step
from revwire.measure import peak_bytes

CASE = ("network", "depth", "batch", "length", "method")
_EVERY = {**COUPLINGS, **METHODS}
HANDWRITTEN = "OpenTAD's Re2TAL Swin"
SEGMENTS, COMPILED = "checkpoint over √n segments", "torch.compile, memory budget 0.1"
LEAST = tuple(m for m in METHODS if m.endswith("least memory"))
CHUNKED = tuple(m for m in METHODS if m.endswith(" 4 chunks"))
SIXTEEN = tuple(m for m in METHODS if m.endswith(" 16 chunks"))
OTHERS = tuple(m for m in METHODS if m.endswith("other blocks checkpointed"))
WHOLE = "revwire bdia 1/16, whole blocks"
WINDOWS = tuple(m for m in METHODS if m.endswith("window by window"))


@dataclass(frozen=True)
class Grid:
    """Cases of a sweep: all methods at all depths, batches and lengths, on one network."""

    network: str
    methods: tuple[str, ...]
    depths: tuple[int, ...] = (12,)
    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (224,)

    def cases(self) -> Iterator[Row]:
        """One row per case, not measured yet."""
        for values in product([self.network], self.depths, self.batches, self.lengths, self.methods):
            yield dict(zip(CASE, values, strict=True))


SWEEPS: dict[str, tuple[Grid, ...]] = {
    "memory_vit": (
        Grid("ViT-S/16", (CHECKPOINT, BDIA, RE2TAL, STORED), depths=(24, 12), batches=(2,)),
        Grid("ViT-S/16", (CHECKPOINT, BDIA, RE2TAL), depths=(48, 6, 96), batches=(2,)),
        Grid("ViT-S/16", (SEGMENTS, SELECTIVE, "momentumnet", "memcnn"), depths=(12, 24), batches=(2,)),
        Grid("ViT-S/16", CHUNKED, depths=(24, 12, 48), batches=(2,)),
        Grid("ViT-S/16", (CHECKPOINT, BDIA, RE2TAL, *CHUNKED), depths=(24, 48), batches=(8,)),
        Grid("ViT-S/16", (COMPILED, *LEAST), depths=(12,), batches=(2,)),
        Grid("ViT-S/16", (SEGMENTS, STORED), depths=(48, 6), batches=(2,)),
        Grid("ViT-S/16", (COMPILED,), depths=(24,), batches=(2,)),
        Grid("ViT-S/16", (WHOLE,), depths=(96, 48, 24, 12), batches=(2,)),
    ),
    "memory_couplings": (Grid("ViT-S/16", (STORED, CHECKPOINT, *COUPLINGS), batches=(1,)),),
    "memory_gpt": (
        Grid("GPT", (CHECKPOINT, BDIA, RE2TAL, STORED), lengths=(1024, 2048)),
        Grid("GPT", (SEGMENTS, SELECTIVE, "momentumnet", "memcnn", *CHUNKED, *LEAST), lengths=(1024,)),
        Grid("GPT", (CHECKPOINT, BDIA, RE2TAL, STORED), lengths=(4096, 8192, 16384)),
    ),
    "memory_fit": (
        Grid("ViT-B/16", MAIN, batches=(1, 2)),
        Grid("swin3d_b", MAIN, lengths=(16,)),  # with fewer frames the windows are shorter, and bytes off the line
        Grid("ViT-B/16", MAIN, batches=(3,)),
        Grid("ViT-B/16", CHUNKED, batches=(4, 8, 12)),
        Grid("swin3d_b", MAIN, lengths=(32, 24)),
        Grid("swin3d_b", WINDOWS, lengths=(32, 64, 48)),
    ),
    "memory_swin3d": (
        Grid("swin3d_t", MAIN, lengths=(32, 16)),
        Grid("swin3d_t", (CHECKPOINT, BDIA, RE2TAL, *CHUNKED), batches=(4,), lengths=(32,)),
        Grid("swin3d_t", (SEGMENTS, SELECTIVE, "momentumnet", *LEAST), lengths=(16,)),
        Grid("swin3d_t", MAIN, lengths=(64,)),
        Grid("swin3d_t", WINDOWS, lengths=(32, 64)),
        Grid("swin3d_t", (HANDWRITTEN,), lengths=(16, 32, 64)),
        Grid("swin3d_t", MAIN, lengths=(128, 256, 512)),
        Grid("swin3d_t", WINDOWS, lengths=(128, 256)),
    ),
    "memory_convnext": (
        Grid("convnext_tiny", MAIN, lengths=(224, 320)),
        Grid("convnext_tiny", (SEGMENTS, SELECTIVE, "momentumnet", *LEAST), lengths=(224,)),
    ),
    "memory_resnet": (
        Grid("inflated ResNet-152", (*MAIN, *OTHERS), lengths=(8, 16)),
        Grid("inflated ResNet-152", (SEGMENTS, SELECTIVE, "momentumnet", *LEAST), lengths=(8,)),
    ),
    "memory_slowfast": (
        Grid("slowfast_r101", (*MAIN, *OTHERS), lengths=(16, 32)),
        Grid("slowfast_r101", (SEGMENTS, SELECTIVE, "momentumnet", *LEAST), lengths=(16,)),
    ),
    "memory_maps": (
        Grid("ViT-S/16, attention maps", (*MAIN, *CHUNKED, *SIXTEEN), lengths=(448, 224, 672)),
        Grid("ViT-S/16, attention maps", (SEGMENTS, SELECTIVE, *LEAST), lengths=(448,)),
        Grid("ViT-S/16, attention maps", (CHECKPOINT, BDIA, RE2TAL, *SIXTEEN), lengths=(896,)),
    ),
    "memory_large": (Grid("ViT-L/16", (CHECKPOINT, SEGMENTS, BDIA, RE2TAL), depths=(24,)),),
}
"""Ordered so that a run that is cut short has the cases that matter most. `--resume` goes on."""


def measured(case: Row) -> Row:
    """The case with the peak bytes of a step; null, and a reason, where there is none."""
    example = NETWORKS[case["network"]].example(case["batch"], case["length"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _EVERY[case["method"]](case["network"], network(case["network"], case["depth"]), example)
            with products_left_out():
                peak = peak_bytes(partial(step, model, example))
            return {**case, "peak_bytes": peak, "reason": None}
    except (Unsuited, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        return {**case, "peak_bytes": None, "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}


def cases_of(name: str) -> list[Row]:
    """The cases of a sweep, not measured yet, in the order in which they are."""
    return [case for grid in SWEEPS[name] for case in grid.cases()]


def key(row: Row) -> tuple[object, ...]:
    """What a row is known by: its case, without what was measured."""
    return tuple(row[axis] for axis in CASE)


def sweep(name: str, resume: bool, folder: Path) -> Record:
    """Measure what is missing, writing the record after every case."""
    order = {key(case): i for i, case in enumerate(cases_of(name))}
    rows = [r for record in read(name, folder)[:1] for r in record.results or [] if resume and key(r) in order]
    done = set(map(key, rows))
    config = {
        "loss": "mean square",
        "axes": {g.network: NETWORKS[g.network].axis for g in SWEEPS[name]},
        "cases": len(cases_of(name)),
        "not_run": NOT_RUN,
    }
    record = Record(name, "ok", None, config, rows, environment("cpu"))
    for case in track([c for c in cases_of(name) if key(c) not in done], name):
        found = [*(record.results or []), measured(case)]
        record = replace(record, results=sorted(found, key=lambda r: order[key(r)]))
        record.write(folder)
        gc.collect()
    return record


def main() -> None:
    """Measure the sweeps that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", default=list(SWEEPS), help=", ".join(SWEEPS))
    parser.add_argument(
        "--resume", action="store_true", help="keep what the record of this device has, and measure the rest"
    )
    parser.add_argument(
        "--folder", type=Path, default=RESULTS, help="where records go while they grow, if not to their place"
    )
    options = parser.parse_args()
    for name in options.sweeps:
        record = sweep(name, options.resume, options.folder)
        print(name, len(record.results or []), "cases")


if __name__ == "__main__":
    main()
