"""Top-1 of CIFAR-10 ResNets straight after conversion, without any fine-tuning, on the whole test set.

python -m benchmarks.retention.cifar_conversion --data-root DATA

All figures but the first and the last row of a network are of the rewired network in evaluation mode; "reverted" is the
original architecture again. A wiring under which the streams leave their range has no figure, but the reason.
The images are lossy JPEG copies, so compare within this table only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from rich.progress import track
from torch import Tensor, nn

from benchmarks.harness import data
from benchmarks.harness.record import Row, run
from benchmarks.retention.cifar import ARCHIVES, NORMALIZE, WEIGHTS, accuracy, images, pretrained
from benchmarks.retention.wirings import COUPLINGS, kept, or_reason, wirings


def measured(models: Iterator[tuple[int, str, nn.Module]], total: int, pictures: Tensor, labels: Tensor) -> list[Row]:
    """One row for each network and wiring."""
    rows: list[Row] = []
    for depth, wiring, model in track(models, "networks", total=total):
        units, held = kept(model)
        row = {"network": f"ResNet-{depth}", "wiring": wiring, "units": units, "kept_bytes": held}
        rows.append({**row, "top1": None, **or_reason(lambda model=model: {"top1": accuracy(model, pictures, labels)})})
    return rows


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_option(parser)
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    options = parser.parse_args()
    root = options.data_root
    torch.manual_seed(0)
    pictures, labels = images(data.file(root, ARCHIVES["test"], "the CIFAR-10 test images"))
    paths = {depth: data.file(root, WEIGHTS[depth], f"ResNet-{depth} weights") for depth in options.depths}
    example = NORMALIZE(pictures[:64].float() / 255)
    models = (
        (d, name, m)
        for d, path in paths.items()
        for name, m in wirings(lambda d=d, path=path: pretrained(d, path), example)
    )
    config = {"data": ARCHIVES["test"], "images": len(labels), "example_batch": 64, "depths": options.depths}
    run(
        "cifar_conversion", config, lambda: measured(models, len(paths) * (len(COUPLINGS) + 2), pictures, labels)
    ).publish()


if __name__ == "__main__":
    main()
