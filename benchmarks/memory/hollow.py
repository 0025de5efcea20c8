"""Steps that allocate what they would, and multiply nothing: for peak bytes of networks whose arithmetic would take
hours.

python -m benchmarks.memory.hollow     # what that changes, on a small case of each network: nothing

What a step allocates follows from shapes, not from values. Inside of `products_left_out`, matrix products on the CPU
return zeros of the right shape; everything else runs (convolutions too: they have workspaces of their own). Where such
a kernel allocated something for itself, it would show in the record that the command above writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.harness.record import Row, run
from benchmarks.memory.alternatives import CHECKPOINT, METHODS
from benchmarks.memory.networks import NETWORKS, network
from benchmarks.memory.steps import step
from revwire.measure import peak_bytes


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_zeros(a.shape[0], b.shape[1])


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return a.new_zeros(a.shape[0], b.shape[1])


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])


@contextmanager
def products_left_out() -> Iterator[None]:
    """In this context, matrix products of CPU tensors give zeros."""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name, kernel in {"mm": _mm, "addmm": _addmm, "bmm": _bmm}.items():
            library.impl(name, kernel, "CPU")
        yield
    finally:
        library._destroy()


def difference(step: Callable[[], object]) -> tuple[int, int]:
    """Peak bytes of a step with its products, and without."""
    full = peak_bytes(step)
    with products_left_out():
        return full, peak_bytes(step)


CASES = {
    "ViT-S/16": (2, 224),
    "GPT": (2, 64),
    "swin3d_t": (0, 4),
    "convnext_tiny": (0, 64),
    "inflated ResNet-152": (0, 2),
    "slowfast_r101": (0, 8),
}
"""(depth, length)"""


def measured(name: str, method: str) -> Row:
    """Peak bytes with and without products."""
    depth, length = CASES[name]
    example = NETWORKS[name].example(1, length)
    full, hollow = difference(partial(step, METHODS[method](name, network(name, depth), example), example))
    return {"network": name, "method": method, "peak_bytes": full, "without_products": hollow}


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(CASES), help=", ".join(CASES))
    cases = [(name, method) for name in parser.parse_args().networks for method in (CHECKPOINT, "revwire bdia 1/16")]
    run(
        "memory_hollow",
        {"depth and length": CASES, "batch": 1},
        lambda: [measured(*case) for case in track(cases, "cases")],
    ).publish()


if __name__ == "__main__":
    main()
