"""The tables of the retention benchmarks: what is left of the pretrained function, straight after conversion and after
fine-tuning, and the bits that a unit keeps.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness.cells import Table
from benchmarks.harness.record import Row
from benchmarks.retention.claims import claims
from benchmarks.retention.seeds import deployments, nats, percent, seeds


def imagenet_sample(rows: list[Row]) -> Table:
    """Top-1 by coupling (rows) and normalisation (columns)."""
    norms = list(dict.fromkeys(row["normalization"] for row in rows))
    table = [["wiring", *(f"top-1, {norm} normalisation (same prediction as before)" for norm in norms)]]
    for wiring in dict.fromkeys(row["wiring"] for row in rows):
        mine = {row["normalization"]: row for row in rows if row["wiring"] == wiring}
        table.append([wiring, *(f"{mine[n]['top1']:.1%} ({mine[n]['agreement']:.1%})" for n in norms)])
    return table


def cifar_conversion(rows: list[Row]) -> Table:
    """Top-1 by coupling (rows) and network (columns)."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    table = [["wiring", *(f"{network}: top-1" for network in networks), "bits per element and unit"]]
    for wiring in dict.fromkeys(row["wiring"] for row in rows):
        mine = {row["network"]: row for row in rows if row["wiring"] == wiring}
        table.append([wiring, *(_share(mine[n]["top1"]) for n in networks), _bits(rows, mine[networks[0]])])
    return table


def sentences(rows: list[Row]) -> Table:
    """Cosine similarity by coupling."""
    head = ["wiring", "mean cosine similarity", "least", "bits per element and unit"]
    return [head, *([r["wiring"], _number(r["mean_cosine"]), _number(r["least_cosine"]), _bits(rows, r)] for r in rows)]


def language_model(rows: list[Row]) -> Table:
    """Validation loss by coupling."""
    before = next(row["loss"] for row in rows if row["wiring"] == "original")
    table = [["wiring", "validation loss (nats per character)", "relative rise", "bits per element and unit"]]
    for r in rows:
        rise = "diverges" if r["loss"] is None else f"{r['loss'] / before - 1:+.2%}"
        table.append([r["wiring"], _number(r["loss"]), rise, _bits(rows, r)])
    return table


def cifar_finetuning(rows: list[Row]) -> Table:
    """Top-1 by network, wiring and deployment (rows) and steps (columns)."""
    steps = sorted({row["steps"] for row in rows})
    head = [
        "network",
        "wiring",
        "deployed",
        *(f"{k} steps" for k in steps),
        f"{steps[-1]} steps, whole test set",
        "seeds",
    ]
    table = [head]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        for wiring in dict.fromkeys(row["wiring"] for row in mine):
            for deployed, prefix in deployments(wiring):
                cells = [percent(seeds(mine, f"{prefix}top1_part", wiring=wiring, steps=k)) for k in steps]
                whole = seeds(mine, f"{prefix}top1", wiring=wiring, steps=steps[-1])
                table.append(
                    [network, wiring, deployed, *cells, percent(whole), str(len(whole.values)) if whole else "0"]
                )
    return table


def language_model_finetuning(rows: list[Row]) -> Table:
    """Validation loss by wiring and deployment (rows) and steps (columns)."""
    steps = sorted({row["steps"] for row in rows})
    table = [["wiring", "deployed", *(f"{k} steps" for k in steps), "seeds"]]
    for wiring in dict.fromkeys(row["wiring"] for row in rows):
        for deployed, prefix in deployments(wiring):
            found = [seeds(rows, f"{prefix}loss", wiring=wiring, steps=k) for k in steps]
            last = found[-1]
            table.append([wiring, deployed, *map(nats, found), str(len(last.values)) if last else "0"])
    return table


def kept_bytes(rows: list[Row]) -> Table:
    """Bits by coupling: declared, and measured."""
    head = ["wiring", "bits per element and unit, declared", "measured"]
    figures = (
        ("–" if r["declared_bits"] is None else str(r["declared_bits"]), f"{r['measured_bits']:.2f}") for r in rows
    )
    return [head, *([r["wiring"], *cells] for r, cells in zip(rows, figures, strict=True))]


def innovation(rows: list[Row]) -> Table:
    """The figure by coupling (rows) and network (columns), and the bits that are kept there."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    units = {row["network"]: row["unit"] for row in rows}
    table = [["coupling", "units", *(f"{network}: {units[network]} (bits)" for network in networks)]]
    for coupling, whole in dict.fromkeys((row["coupling"], row["whole"]) for row in rows):
        mine = {r["network"]: r for r in rows if (r["coupling"], r["whole"]) == (coupling, whole)}
        cells = [_kept(mine[network]) if network in mine else "–" for network in networks]
        table.append([coupling, "whole blocks" if whole else "residual adds", *cells])
    return table


def _kept(row: Row) -> str:
    figure = _number(row["figure"]) if row["unit"] != "top-1" else _share(row["figure"])
    return figure if row["bits"] is None else f"{figure} ({row['bits']:.1f})"


def _share(value: float | None) -> str:
    return "diverges" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "diverges" if value is None else f"{value:.4f}"


def _bits(rows: list[Row], row: Row) -> str:
    """Bits kept, from the bytes of ``bdia:1/2``, which keeps one."""
    one = next(r["kept_bytes"] / r["units"] for r in rows if r["wiring"] == "bdia:1/2")
    return f"{row['kept_bytes'] / row['units'] / one:.0f}" if row["units"] else "–"


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "imagenet_sample": imagenet_sample,
    "cifar_conversion": cifar_conversion,
    "sentences": sentences,
    "language_model": language_model,
    "cifar_finetuning": cifar_finetuning,
    "language_model_finetuning": language_model_finetuning,
    "kept_bytes": kept_bytes,
    "innovation": innovation,
}
SUMMARIES = {"retention": claims}
