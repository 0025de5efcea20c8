"""The picture of what a device measured: seconds against peak bytes, a line per network. ``docs/figures/gpu_*.svg``.

python -m benchmarks.gpu.plots
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from benchmarks.harness.cells import MIB
from benchmarks.harness.figures import drawing, saved
from benchmarks.harness.record import PICTURES, RESULTS, Record, read

NAME = "gpu_costs"


def costs(record: Record, folder: Path) -> Path | None:
    """Both over those of checkpointing; None where nothing was measured."""
    rows = [r for r in record.results or [] if r.get("peak_bytes") and r.get("to_checkpointing")]
    base = {r["network"]: r["peak_bytes"] for r in rows if r["method"] == "checkpointing"}
    if not base:
        return None
    figure, axes = drawing((8, 5))
    for network, bytes_ in base.items():
        found = [r for r in rows if r["network"] == network]
        points = [(r["peak_bytes"] / bytes_, r["to_checkpointing"]["median"], r["method"]) for r in found]
        axes.plot(*zip(*((x, y) for x, y, _ in points), strict=True), marker="o", linestyle="", label=network)
        for x, y, method in points:
            axes.annotate(method, (x, y), fontsize=5, xytext=(3, 3), textcoords="offset points")
    axes.set(xlabel="peak bytes of a step × checkpointing", ylabel="seconds of a step × checkpointing", xscale="log")
    device = record.environment["device"]
    axes.set_title(f"{device} (checkpointing: {', '.join(f'{n} {b // MIB} MiB' for n, b in base.items())})", fontsize=6)
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return saved(figure, axes, folder / f"{NAME}.{name}.svg", legend=7)


def main() -> None:
    """Draw one picture per device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--folder", type=Path, default=PICTURES, help="where pictures go")
    options = parser.parse_args()
    for record in read(NAME, options.records):
        print(costs(record, options.folder) or f"{record.environment['device']}: nothing was measured")


if __name__ == "__main__":
    main()
