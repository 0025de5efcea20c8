"""Bits that a further unit keeps per element of its stream, measured, beside what its coupling declares.

python -m benchmarks.retention.kept_bytes

Two networks of residual units that differ in depth only; what the deeper one keeps more between forward and backward,
by unit and element. Besides the bits of its coupling a unit keeps a fingerprint and where its weights stood: less than
a kilobyte, however large the stream is; with random signs, three numbers a sample. For comparison: what the same units
keep with stored activations.
"""

from __future__ import annotations

import argparse

import torch
from rich.progress import track
from torch import Tensor, nn

import revwire
from benchmarks.harness.record import Row, run
from benchmarks.retention.wirings import COUPLINGS
from revwire.measure import saved_bytes

DEPTHS = 4, 12
SHAPE = 256, 64, 64  # (batch, tokens, width)


class Unit(nn.Module):
    """x + gelu(linear(norm(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) → the same."""
        return x + nn.functional.gelu(self.mix(self.norm(x)))


def held(coupling: str | None, depth: int) -> int:
    """Bytes between forward and backward; None: stored activations."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Unit(SHAPE[-1]) for _ in range(depth)))
    x = torch.randn(SHAPE, requires_grad=True)
    if coupling is not None:
        revwire.convert(model, x.detach(), coupling=coupling, rewire="everywhere")
    return saved_bytes(lambda: model(x))


def measured() -> list[Row]:
    """One row for each coupling, and one for stored activations."""
    elements = SHAPE[0] * SHAPE[1] * SHAPE[2]
    rows = []
    for coupling in track((*COUPLINGS, None), "couplings"):
        fewer, more = (held(coupling, depth) for depth in DEPTHS)
        bits = 8 * (more - fewer) / (DEPTHS[1] - DEPTHS[0]) / elements
        rows.append(
            {"wiring": coupling or "stored activations", "declared_bits": _declared(coupling), "measured_bits": bits}
        )
    return rows


def _declared(coupling: str | None) -> int | None:
    if coupling is None:
        return None
    x = torch.randn(1, 2, 4)
    return revwire.plan(nn.Sequential(Unit(4), Unit(4)), x, coupling=coupling, rewire="everywhere").chains[0].bits


def main() -> None:
    """Measure, and write the record."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    run("kept_bytes", {"depths": DEPTHS, "shape": SHAPE}, measured).publish()


if __name__ == "__main__":
    main()
