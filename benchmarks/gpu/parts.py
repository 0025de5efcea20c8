"""The parts of `python -m benchmarks.gpu`: what each measures, into which record it goes, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from benchmarks.gpu import bits, conformance, costs, fit, launches
from benchmarks.gpu.subjects import Setting
from benchmarks.harness.record import Row

Measure = Callable[[Setting, set[str]], Iterator[Row]]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        record: the name of the record that its rows go to.
        seconds: that it may take at most.
        measure: the setting, and the cases that are there already → a row per further case, as soon as it is done; each
            has a ``case`` and a ``reason`` (None: it was measured).
    """

    record: str
    seconds: float
    measure: Measure


PARTS: dict[str, Part] = {
    "bits": Part("gpu_bits", 120, bits.rows),
    "costs: ViT-L/16": Part("gpu_costs", 75, partial(costs.rows, "ViT-L/16")),
    "launches": Part("gpu_launches", 40, launches.rows),
    "conformance": Part("gpu_conformance", 100, conformance.rows),
    "costs: Llama-like, 8k tokens": Part("gpu_costs", 60, partial(costs.rows, "Llama-like, 8k tokens")),
    "costs: Swin3D-B": Part("gpu_costs", 90, partial(costs.rows, "Swin3D-B")),
    "costs: clips": Part("gpu_costs", 60, costs.clips),
    "costs: Llama-like, 32k tokens": Part("gpu_costs", 75, partial(costs.rows, "Llama-like, 32k tokens")),
    "fit": Part("gpu_fit", 100, fit.rows),
}
"""In the order in which they are run: what matters most comes first, as the time may end."""
