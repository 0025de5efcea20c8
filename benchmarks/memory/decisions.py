"""Should a network be rewired? One line for each kind of network, from the records of the sweeps."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.harness.cells import Table, mib
from benchmarks.harness.record import read

CHECKPOINT = "checkpoint per block"
LITTLE = 0.9
"""A peak that is less than this share of checkpointing's is worth a rewiring."""


class Case(NamedTuple):
    """A kind of network, and the measured case that stands for it."""

    network: str
    call: str
    record: str
    method: str
    where: dict[str, Any]


CASES = (
    Case(
        "many equal blocks: ViT-S, 24 blocks",
        '`rewire="everywhere"`',
        "memory_vit",
        "revwire bdia 1/16",
        {"depth": 24, "batch": 2},
    ),
    Case("the same, 96 blocks", '`rewire="everywhere"`', "memory_vit", "revwire bdia 1/16", {"depth": 96, "batch": 2}),
    Case(
        "long sequences: GPT, 16,384 tokens",
        '`rewire="everywhere"`',
        "memory_gpt",
        "revwire bdia 1/16",
        {"length": 16384},
    ),
    Case(
        "attention that makes its map: ViT-S at 672 pixels",
        "`chunks=16`",
        "memory_maps",
        "revwire bdia 1/16, 16 chunks",
        {"length": 672},
    ),
    Case(
        "windows of a long clip: Video Swin-T, 128 frames",
        '`rewire="everywhere"`',
        "memory_swin3d",
        "revwire bdia 1/16",
        {"length": 128, "batch": 1},
    ),
    Case(
        "the same, window by window",
        "`chunks=8`, one for each 16 frames",
        "memory_swin3d",
        "revwire bdia 1/16, window by window",
        {"length": 128, "batch": 1},
    ),
    Case(
        "stages that change shape: inflated ResNet-152",
        '`rewire="everywhere"`',
        "memory_resnet",
        "revwire bdia 1/16",
        {"length": 16},
    ),
    Case(
        "the same, other blocks checkpointed",
        '`rewire="everywhere", checkpoint="stays"`',
        "memory_resnet",
        "revwire bdia 1/16, other blocks checkpointed",
        {"length": 16},
    ),
    Case(
        "few blocks per stage: ConvNeXt-T",
        '`rewire="everywhere"`',
        "memory_convnext",
        "revwire bdia 1/16",
        {"length": 224},
    ),
)


def decisions() -> Table:
    """Peaks beside checkpointing's, and what follows from that."""
    table = [["network", "call", "checkpointing, MiB", "revwire, MiB", "× checkpointing", "worth it?"]]
    for case in CASES:
        rows = [row for record in read(case.record)[:1] for row in record.results or []]
        found = {row["method"]: row["peak_bytes"] for row in rows if case.where.items() <= row.items()}
        if found.get(case.method) and found.get(CHECKPOINT):
            sizes = found[CHECKPOINT], found[case.method]
            ratio = sizes[1] / sizes[0]
            table.append([case.network, case.call, *map(mib, sizes), f"{ratio:.2f}", _verdict(ratio)])
    return table


def _verdict(ratio: float) -> str:
    return "yes" if ratio < LITTLE else "hardly" if ratio < 1 else "no: checkpoint it"
