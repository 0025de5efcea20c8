"""Plots from the records of the sweeps: ``docs/figures/*.svg``.

python -m benchmarks.memory.plots
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.cells import MIB
from benchmarks.harness.figures import drawing, saved
from benchmarks.harness.record import PICTURES, Record, read
from benchmarks.memory.alternatives import BDIA, CHECKPOINT, STORED
from benchmarks.memory.tables import BUDGETS_GIB, PARETO, fit

SIZE = 7, 4.5
AXES = {
    "memory_vit": "depth",
    "memory_gpt": "length",
    "memory_swin3d": "length",
    "memory_slowfast": "length",
    "memory_resnet": "length",
}
LABELS = {"memory_vit": "blocks", "memory_gpt": "tokens"}
INK = {"light": "#24292f", "dark": "#e6edf3"}
COLOURS = {STORED: "#8b949e", CHECKPOINT: "#d9822b", BDIA: "#2f81f7"}
NAMES = {STORED: "stored", CHECKPOINT: "checkpointing", BDIA: "revwire"}


def by_depth(record: Record, ground: str) -> Path:
    """The README's picture: peak bytes of a ViT against its depth, for a light or a dark ground."""
    rows = [r for r in record.results or [] if r["batch"] == 2 and r["peak_bytes"]]
    figure, axes = drawing((7, 3.6))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    ink = INK[ground]
    for method, name in NAMES.items():
        points = sorted((r["depth"], r["peak_bytes"] / MIB) for r in rows if r["method"] == method)
        (depth, peak) = points[-1]
        colour = COLOURS[method]
        axes.plot(*zip(*points, strict=True), marker="o", linewidth=3 if method == BDIA else 2, color=colour)
        axes.annotate(
            f"{name}: {peak:.0f} MiB", (depth, peak), (8, -4), textcoords="offset points", color=colour, weight="bold"
        )
    axes.set(
        xlabel="blocks of a ViT-S/16 (two images, float32)", ylabel="peak MiB of a training step (log)", yscale="log"
    )
    axes.set_xlim(0, 140)
    axes.set_xticks(sorted({r["depth"] for r in rows}))
    axes.set_yticks([10, 30, 100, 300], ["10", "30", "100", "300"])
    axes.minorticks_off()
    for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_color(ink)
    axes.tick_params(colors=ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink)
    return saved(figure, axes, PICTURES / f"depth_{ground}.svg", legend=None)


def by_axis(record: Record) -> Path | None:
    """Peak bytes against depth, tokens or frames, one line per method."""
    axis, rows = AXES[record.name], [r for r in record.results or [] if r["peak_bytes"]]
    figure, axes = drawing(SIZE)
    for method in dict.fromkeys(r["method"] for r in rows):
        points = sorted((r[axis], r["peak_bytes"] / MIB) for r in rows if r["method"] == method)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", label=method)
    if not axes.lines:
        return None
    axes.set(
        xlabel=LABELS.get(record.name, "frames"),
        ylabel="peak MiB of a step",
        xscale="log",
        yscale="log",
        title=rows[0]["network"],
    )
    ticks = sorted({r[axis] for r in rows})
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    return saved(figure, axes, _path(record), legend=7)


def pareto(record: Record) -> Path:
    """Seconds of a step (over those of stored activations) against peak bytes."""
    figure, axes = drawing(SIZE)
    for r in (r for r in record.results or [] if r["peak_bytes"]):
        q = r["to_stored"]
        spread = [[q["median"] - q["low"]], [q["high"] - q["median"]]]
        axes.errorbar(r["peak_bytes"] / MIB, q["median"], yerr=spread, marker="o", linestyle="", label=r["method"])
    axes.set(xlabel="peak MiB of a step", ylabel="seconds of a step × stored activations", xscale="log")
    return saved(figure, axes, _path(record), legend=7)


def largest(record: Record) -> Path:
    """The largest input within each budget."""
    figure, axes = drawing(SIZE)
    for network, method, _, slope, _, *cells in fit(record.results or [])[1:]:
        if not slope:
            continue
        axes.plot(BUDGETS_GIB, [int(cell.split()[0]) for cell in cells], marker="o", label=f"{network}: {method}")
    axes.set(xlabel="budget, GiB", ylabel="images (ViT-B) or frames (Swin3D-B)", xscale="log", yscale="log")
    axes.set_xticks(BUDGETS_GIB, [str(b) for b in BUDGETS_GIB])
    axes.minorticks_off()
    return saved(figure, axes, _path(record), legend=7)


def _path(record: Record) -> Path:
    return PICTURES / f"{record.name}.svg"


def main() -> None:
    """Draw what there are records of."""
    for record in read("memory_vit")[:1]:
        for ground in INK:
            print(record.name, by_depth(record, ground))
    for name in (*AXES, "memory_fit", *(f"memory_pareto_{n}" for n in PARETO)):
        draw = by_axis if name in AXES else largest if name == "memory_fit" else pareto
        for record in read(name)[:1]:
            if record.results:
                print(name, draw(record))


if __name__ == "__main__":
    main()
