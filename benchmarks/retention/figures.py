"""The figures of the retention benchmarks, from the committed records: ``docs/figures/*.png``.

python -m benchmarks.retention.figures

Needs matplotlib. A panel whose record is missing is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.harness.record import PICTURES, Row, read
from benchmarks.retention.seeds import seeds

COLOURS = {"stored": "black", "bdia": "tab:blue", "re2tal": "tab:red", "scratch": "tab:gray", "momentum": "tab:green"}
OTHERS = {"bdia-random": "tab:cyan", "dr2net": "tab:orange", "midpoint": "tab:purple"}


def rows_of(name: str) -> list[Row]:
    """The rows of the newest record of an experiment; none where it is missing or failed."""
    records = [record for record in read(name) if record.results]
    return max(records, key=lambda r: r.environment["date"]).results or [] if records else []


def networks() -> dict[str, tuple[list[Row], Callable[[Row], float | None]]]:
    """By network: its rows of the conversion benchmarks, and the share of the pretrained function's quality that a row
    kept.
    """
    found: dict[str, tuple[list[Row], Callable[[Row], float | None]]] = {}
    cifar = rows_of("cifar_conversion")
    for network in dict.fromkeys(row["network"] for row in cifar):
        found[f"{network}\n(top-1 / top-1 before)"] = _kept([r for r in cifar if r["network"] == network], "top1")
    images = [row for row in rows_of("imagenet_sample") if row["normalization"] == "ImageNet"]
    if images:
        found["EfficientNet-Lite0\n(top-1 / top-1 before)"] = _kept(images, "top1")
    if texts := rows_of("language_model"):
        found["character model, pre-norm\n(loss before / loss)"] = _kept(texts, "loss", inverse=True)
    if encoded := rows_of("sentences"):
        found["all-MiniLM-L6-v2, post-norm\n(mean cosine)"] = _kept(encoded, "mean_cosine")
    return found


def _kept(rows: list[Row], key: str, inverse: bool = False) -> tuple[list[Row], Callable[[Row], float | None]]:
    before = next(row[key] for row in rows if row["wiring"] == "original")

    def share(row: Row) -> float | None:
        if row[key] is None:
            return None
        return float(before / row[key] if inverse else row[key] / before)

    return rows, share


def _family(wiring: str) -> tuple[str, list[float]]:
    name, _, numbers = wiring.partition(":")
    return name, [float(Fraction(n)) for n in numbers.split(",")] if numbers else []


def against_gamma(axes: Axes, rows: list[Row], share: Callable[[Row], float | None]) -> None:
    """Lines over γ for `bdia` and `momentum`; `re2tal` and the original as levels."""
    for family in ("bdia", "momentum"):
        points = sorted(
            (numbers[0], share(row))
            for row in rows
            for name, numbers in [_family(row["wiring"])]
            if name == family and numbers and share(row) is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[family], label=family, markersize=4)
    papers = next((share(row) for row in rows if row["wiring"] == "re2tal"), None)
    if papers is not None:
        axes.axhline(papers, color=COLOURS["re2tal"], linestyle="--", label="re2tal (the paper)")
    axes.axhline(1, color="black", linewidth=0.8, label="original, and after revert")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("γ")
    axes.set_ylim(-0.1, 1.1)


def against_bytes(axes: Axes, rows: list[Row], share: Callable[[Row], float | None]) -> None:
    """A point for each coupling: bytes kept per element and unit, and what is left of the function."""
    fewest = min((row["kept_bytes"] for row in rows if row["wiring"] == "bdia:1/2"), default=None)
    for row in rows:
        name, numbers = _family(row["wiring"])
        kept, colour = share(row), COLOURS.get(name, OTHERS.get(name))
        if colour is None or kept is None or not (numbers or name == "re2tal") or not fewest:
            continue
        axes.plot(row["kept_bytes"] / fewest / 8, kept, "o", color=colour, markersize=5, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("bytes kept per element and unit")
    axes.set_ylim(-0.1, 1.1)


def against_steps(axes: Axes, rows: list[Row], key: str) -> None:
    """Lines over fine-tuning steps, with the deviation over the seeds; dashed: reverted."""
    for wiring in ("scratch", "re2tal", "stored", "bdia"):
        for prefix, style in (("", "-"), ("reverted_", "--")):
            steps = sorted({row["steps"] for row in rows if row["wiring"] == wiring})
            found = [(k, s) for k in steps if (s := seeds(rows, prefix + key, wiring=wiring, steps=k))]
            if not found:
                continue
            label = wiring if wiring in ("stored", "scratch") else f"{wiring}, {'reverted' if prefix else 'rewired'}"
            means, deviations = [s.mean for _, s in found], [s.deviation for _, s in found]
            axes.errorbar(
                [k for k, _ in found],
                means,
                deviations,
                fmt="o" + style,
                color=COLOURS[wiring],
                label=label,
                markersize=3,
            )
    axes.set_xscale("symlog", linthresh=50)
    axes.set_xticks(sorted({row["steps"] for row in rows}), [str(k) for k in sorted({row["steps"] for row in rows})])
    axes.set_xlabel("fine-tuning steps")


def drawn(panels: Sequence[tuple[str, Callable[[Axes], None]]], path: Path, title: str) -> None:
    """A figure with its panels in a row, and one legend."""
    figure, grid = plt.subplots(1, len(panels), figsize=(max(7.2, 3.6 * len(panels)), 4.0), squeeze=False)
    for axes, (name, draw) in zip(grid[0], panels, strict=True):
        draw(axes)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
    handles: dict[str, object] = {}
    for axes in grid[0]:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)})
    figure.suptitle(title, fontsize=10)
    figure.legend(
        list(handles.values()), list(handles), loc="lower center", ncol=3 if len(panels) < 3 else 6, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.14 if len(panels) < 3 else 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    print(path)


def main() -> None:
    """Draw all three."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    kept = networks()
    title = "Rewired, in evaluation mode, straight after conversion, no training"
    gamma = [(name, lambda axes, r=rows, s=share: against_gamma(axes, r, s)) for name, (rows, share) in kept.items()]
    drawn(gamma, PICTURES / "accuracy_against_gamma.png", title)
    counted = [
        (name, lambda axes, r=rows, s=share: against_bytes(axes, r, s))
        for name, (rows, share) in kept.items()
        if "kept_bytes" in rows[0]
    ]
    drawn(counted, PICTURES / "accuracy_against_bytes.png", title)
    cifar, texts = rows_of("cifar_finetuning"), rows_of("language_model_finetuning")
    panels = []
    for network in dict.fromkeys(row["network"] for row in cifar):
        mine = [row for row in cifar if row["network"] == network]
        panels.append(
            (f"{network}: top-1, a fifth of the test set", lambda axes, m=mine: against_steps(axes, m, "top1_part"))
        )
    if texts:
        panels.append(("character model: validation loss", lambda axes: against_steps(axes, texts, "loss")))
    if panels:
        drawn(
            panels,
            PICTURES / "accuracy_against_steps.png",
            "While fine-tuning: rewired (solid) and reverted (dashed), mean ± deviation",
        )


if __name__ == "__main__":
    main()
