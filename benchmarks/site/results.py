"""The data of the results page: what the records say, as four tables that a browser can filter, sort and plot.

``mkdocs build`` writes it to ``results/data.js``; ``python -m benchmarks.site.results`` prints it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.harness.cells import MIB
from benchmarks.harness.record import RESULTS, Record, Row, read
from benchmarks.memory.decisions import CHECKPOINT
from benchmarks.zoo.tables import CHECKS, ZOOS

Line = list[Any]
_SIZES = ("depth", "batch", "length")
_RETAINED = {
    "cifar_conversion": ("wiring", "top1", "top-1"),
    "imagenet_sample": ("wiring", "top1", "top-1"),
    "language_model": ("wiring", "loss", "nats per character"),
    "sentences": ("wiring", "mean_cosine", "mean cosine"),
    "innovation": ("coupling", "figure", None),
}
"""Records of what a function keeps: which column is the coupling, which the figure, and its unit (None: a column)."""
_NETWORKS = {
    "imagenet_sample": "EfficientNet-Lite0",
    "language_model": "character model",
    "sentences": "all-MiniLM-L6-v2",
}


def tables() -> list[dict[str, Any]]:
    """All tables: a name, columns, lines, and what is plotted against what.

    A table's ``facet`` is the column of which one value is shown at a time; ``all`` says whether all may be.
    """
    return [
        {
            "name": "Peak memory",
            "columns": ["network", "method", "varied", "size", "peak MiB", "× checkpointing", "device"],
            "lines": list(_peaks()),
            "plot": {"x": "size", "y": "peak MiB", "group": "method", "log": True, "joined": True},
            "facet": "network",
            "all": False,
        },
        {
            "name": "Seconds",
            "columns": ["network", "method", "peak MiB", "× checkpointing", "seconds × checkpointing", "device"],
            "lines": [*_pareto(), *_default(), *_gpu()],
            "plot": {"x": "× checkpointing", "y": "seconds × checkpointing", "group": "method", "log": False},
            "facet": "network",
            "all": True,
        },
        {
            "name": "What the function keeps",
            "columns": ["network", "coupling", "bits per element and unit", "figure", "unit", "device"],
            "lines": list(_retained()),
            "plot": {"x": "bits per element and unit", "y": "figure", "group": "coupling", "log": False},
            "facet": "network",
            "all": False,
        },
        {
            "name": "Coverage",
            "columns": [
                *("zoo", "model", "adds", "units", "chains", "not rewired", "exact"),
                *("stored, peak MiB", "checkpointing, peak MiB", "revwire, peak MiB"),
            ],
            "lines": list(_coverage()),
            "plot": {"x": "checkpointing, peak MiB", "y": "revwire, peak MiB", "group": "zoo", "log": True},
            "facet": "zoo",
            "all": True,
        },
    ]


def script() -> str:
    """A script that gives the page its data: it can be read from a file, too, where a browser fetches none."""
    return f"window.REVWIRE_RESULTS = {json.dumps(tables(), ensure_ascii=False, separators=(',', ':'))};\n"


def _records(pattern: str) -> Iterator[Record]:
    for name in sorted({path.name.split(".")[0] for path in RESULTS.glob(f"{pattern}.*.json")}):
        yield from (record for record in read(name) if record.results)


def _device(record: Record) -> str:
    return str(record.environment["device"]).removeprefix("cpu ")


def _round(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def _mib(count: int | None) -> float | None:
    return None if count is None else round(count / MIB, 1)


def _peaks() -> Iterator[Line]:
    """Of the sweeps over sizes; one column says what was varied."""
    for record in _records("memory_*"):
        rows = [row for row in record.results or [] if "depth" in row]
        for network in dict.fromkeys(row["network"] for row in rows):
            mine = [row for row in rows if row["network"] == network]
            varied = max(_SIZES, key=lambda axis: len({row[axis] for row in mine}))
            base = {_case(row): row["peak_bytes"] for row in mine if row["method"] == CHECKPOINT}
            others = [axis for axis in _SIZES if axis != varied and len({row[axis] for row in mine}) > 1]
            for row in mine:
                named = ", ".join([network, *(f"{axis} {row[axis]}" for axis in others)])
                ratio = row["peak_bytes"] / base[_case(row)] if row["peak_bytes"] and base.get(_case(row)) else None
                title = f"{named} ({record.name.removeprefix('memory_')})"
                figures = [row[varied], _mib(row["peak_bytes"]), _round(ratio)]
                yield [title, row["method"], varied, *figures, _device(record)]


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[axis] for axis in _SIZES)


def _pareto() -> Iterator[Line]:
    for record in _records("memory_pareto_*"):
        rows = [row for row in record.results or [] if row["peak_bytes"] and row["to_checkpoint"]]
        base = next(row["peak_bytes"] for row in rows if row["method"] == CHECKPOINT)
        for row in rows:
            name = f"{row['network']} ({record.name.removeprefix('memory_pareto_')})"
            ratios = _round(row["peak_bytes"] / base), _round(row["to_checkpoint"]["median"])
            yield [name, row["method"], _mib(row["peak_bytes"]), *ratios, _device(record)]


def _default() -> Iterator[Line]:
    """The plain call; stored activations and checkpointing by the network's own switch, beside it."""
    for record in _records("default"):
        for row in (row for row in record.results or [] if not row["reason"]):
            seconds = {name: row[f"{name}_seconds"]["median"] for name in ("stored", "rival", "plain")}
            for name, method in {"stored": "stored activations", "rival": row["rival"], "plain": "revwire"}.items():
                ratio = row["to_rival"]["median"] if name == "plain" else seconds[name] / seconds["rival"]
                size = row[f"{name}_bytes"]
                figures = _mib(size), _round(size / row["rival_bytes"]), _round(ratio)
                yield [row["model"], method, *figures, _device(record)]


def _gpu() -> Iterator[Line]:
    for record in _records("gpu_costs"):
        rows = [row for row in record.results or [] if row.get("peak_bytes") and row.get("to_checkpointing")]
        base = {row["network"]: row["peak_bytes"] for row in rows if row["method"] == "checkpointing"}
        for row in (row for row in rows if row["network"] in base):
            ratios = row["peak_bytes"] / base[row["network"]], row["to_checkpointing"]["median"]
            yield [row["network"], row["method"], _mib(row["peak_bytes"]), *map(_round, ratios), _device(record)]


def _retained() -> Iterator[Line]:
    bits = {row["wiring"]: row["declared_bits"] for record in read("kept_bytes")[:1] for row in record.results or []}
    for name, (coupling, figure, unit) in _RETAINED.items():
        for record in _records(name):
            for row in record.results or []:
                network = row.get("network", _NETWORKS.get(name))
                more = (
                    [row["normalization"]] if "normalization" in row else ["whole blocks"] if row.get("whole") else []
                )
                kept = row["bits"] if "bits" in row else bits.get(row[coupling])
                values = _round(kept, 2), _round(row[figure], 4), unit or row["unit"]
                title = f"{', '.join([network, *more])} ({name})"
                yield [title, row[coupling], *values, _device(record)]


def _coverage() -> Iterator[Line]:
    for record in (record for zoo in ZOOS for record in read(zoo)):
        for row in record.results or []:
            zoo = record.name.removeprefix("zoo_").removesuffix("_models").replace("_", " ")
            exact = "yes" if all(row[check] for check in CHECKS[:4]) else "no"
            found = [row[key] for key in ("adds", "units", "chains", "missing")]
            sizes = [_mib(row[f"{method}_peak_bytes"]) for method in ("stored", "checkpoint", "revwire")]
            yield [zoo, row["model"], *found, exact, *sizes]


if __name__ == "__main__":
    print(script())
