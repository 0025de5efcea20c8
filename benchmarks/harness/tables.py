"""From records to tables: ``python -m benchmarks.harness.tables`` renews every table in the Markdown files, ``--check``
only compares.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``; what is between them is never written by hand.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import coverage, memory_tables, retention, tal_tables
from benchmarks.harness.record import RESULTS, Record, Row, read

ROOT = RESULTS.parents[1]
DOCUMENTS = (
    "README.md",
    "benchmarks/README.md",
    "docs/coverage.md",
    "docs/choosing-a-coupling.md",
    "docs/performance.md",
    "benchmarks/tal/README.md",
)
ZOOS = ("zoo_timm_models", "zoo_torchvision_models", "zoo_pytorchvideo_models", "zoo_huggingface", "zoo_third_party")
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
_MIB = 2**20


def vit_depth(rows: list[Row]) -> list[list[str]]:
    """Peak memory by method (rows) and depth (columns)."""
    depths = sorted({row["depth"] for row in rows})
    peaks = {(row["method"], row["depth"]): row["peak_bytes"] for row in rows}
    base = {depth: peaks["checkpoint per block", depth] for depth in depths}
    table = [["peak MiB of a step (× checkpointing)", *(f"depth {depth}" for depth in depths)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = [f"{peaks[method, d] / _MIB:.1f} ({peaks[method, d] / base[d]:.2f}×)" for d in depths]
        table.append([method, *cells])
    return table


def step_time(rows: list[Row]) -> list[list[str]]:
    """Seconds of a step, and paired ratios."""
    ratios = {
        "to_stored": "× stored activations",
        "to_checkpoint": "× checkpoint per block",
        "to_whole": "× checkpoint without early stop",
    }
    head = ["training step", "seconds: median (quartiles)", *ratios.values()]
    return [head, *([row["method"], *(_quartiles(row[k]) for k in ("seconds", *ratios))] for row in rows)]


def imagenet_sample(rows: list[Row]) -> list[list[str]]:
    """Top-1 by coupling (rows) and normalisation (columns)."""
    norms = list(dict.fromkeys(row["normalization"] for row in rows))
    table = [["wiring", *(f"top-1, {norm} normalisation (same prediction as before)" for norm in norms)]]
    for wiring in dict.fromkeys(row["wiring"] for row in rows):
        mine = {row["normalization"]: row for row in rows if row["wiring"] == wiring}
        table.append([wiring, *(f"{mine[n]['top1']:.1%} ({mine[n]['agreement']:.1%})" for n in norms)])
    return table


def cifar_conversion(rows: list[Row]) -> list[list[str]]:
    """Top-1 by coupling (rows) and network (columns)."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    table = [["wiring", *(f"{network}: top-1" for network in networks), "bits per element and unit"]]
    for wiring in dict.fromkeys(row["wiring"] for row in rows):
        mine = {row["network"]: row for row in rows if row["wiring"] == wiring}
        table.append([wiring, *(_share(mine[n]["top1"]) for n in networks), _bits(rows, mine[networks[0]])])
    return table


def sentences(rows: list[Row]) -> list[list[str]]:
    """Cosine similarity by coupling."""
    head = ["wiring", "mean cosine similarity", "least", "bits per element and unit"]
    return [head, *([r["wiring"], _number(r["mean_cosine"]), _number(r["least_cosine"]), _bits(rows, r)] for r in rows)]


def language_model(rows: list[Row]) -> list[list[str]]:
    """Validation loss by coupling."""
    before = next(row["loss"] for row in rows if row["wiring"] == "original")
    table = [["wiring", "validation loss (nats per character)", "relative rise", "bits per element and unit"]]
    for r in rows:
        rise = "diverges" if r["loss"] is None else f"{r['loss'] / before - 1:+.2%}"
        table.append([r["wiring"], _number(r["loss"]), rise, _bits(rows, r)])
    return table


def conversion(rows: list[Row]) -> list[list[str]]:
    """Seconds and bytes of a conversion by model."""
    head = ["model", "seconds", "units", "peak MiB above rest", "MiB of weights"]
    figures = ((r["model"], f"{r['seconds']:.1f}", str(r["units"]), r["peak_bytes"], r["weight_bytes"]) for r in rows)
    return [head, *([*texts, f"{peak / _MIB:.1f}", f"{weights / _MIB:.1f}"] for *texts, peak, weights in figures)]


def _share(value: float | None) -> str:
    return "diverges" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "diverges" if value is None else f"{value:.4f}"


def _bits(rows: list[Row], row: Row) -> str:
    """Bits kept, from the bytes of ``bdia:1/2``, which keeps one."""
    one = next(r["kept_bytes"] / r["units"] for r in rows if r["wiring"] == "bdia:1/2")
    return f"{row['kept_bytes'] / row['units'] / one:.0f}" if row["units"] else "–"


TABLES: dict[str, Callable[[list[Row]], list[list[str]]]] = {
    "vit_depth": vit_depth,
    "step_time": step_time,
    "imagenet_sample": imagenet_sample,
    "cifar_conversion": cifar_conversion,
    "sentences": sentences,
    "conversion": conversion,
    "language_model": language_model,
    **dict.fromkeys(ZOOS, coverage.models),
    **retention.TABLES,
    **memory_tables.TABLES,
    **tal_tables.TABLES,
}


def _quartiles(q: Row) -> str:
    return f"{q['median']:.3f} ({q['low']:.3f}–{q['high']:.3f})"


def render(name: str) -> str:
    """The tables of an experiment, one per device, each with its conditions below it; ``zoo`` and ``retention`` are
    summaries.
    """
    if name == "zoo":
        return _summary()
    if name == "tal_recipes":
        return "\n".join([*_lines(tal_tables.recipes()), ""])
    if name == "retention":
        return "\n".join([*_lines(retention.claims()), ""])
    records = read(name)
    return "\n".join(_render(record) for record in records) if records else "not measured yet\n"


def _render(record: Record) -> str:
    e = record.environment
    under = f"{e['device'].removeprefix('cpu ')}, {e['threads']} threads, PyTorch {e['versions']['torch']}, {e['date']}"
    if record.results is None:
        return f"failed: {record.reason}\n\n*{under}*\n"
    return "\n".join([*_lines(TABLES[record.name](record.results)), "", f"*{under}*", ""])


def _summary() -> str:
    records = [record for name in ZOOS for record in read(name)]
    return "\n".join([*_lines(coverage.summary(records)), ""]) if records else "not measured yet\n"


def _lines(table: list[list[str]]) -> list[str]:
    head, *rows = table
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def renewed(text: str) -> str:
    """A document with its tables made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{render(block[2])}\n{block[4]}", text)


def main() -> None:
    """Renew or check the tables of all documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table is not what the records say")
    check = parser.parse_args().check
    stale = []
    for path in (Path(ROOT, name) for name in DOCUMENTS):
        text = path.read_text()
        if renewed(text) != text:
            stale.append(path.name)
            if not check:
                path.write_text(renewed(text))
    print(f"{'out of date' if check else 'renewed'}: {', '.join(stale) or 'nothing'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
