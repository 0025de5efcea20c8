"""The tables of the sweep over model zoos: one line per zoo, one line per model, what fails on top."""

from __future__ import annotations

import re
from collections import Counter

from benchmarks.harness.cells import Table, mib
from benchmarks.harness.record import Row, read

ZOOS = ("zoo_timm_models", "zoo_torchvision_models", "zoo_pytorchvideo_models", "zoo_huggingface", "zoo_third_party")
COUPLINGS = ("bdia", "re2tal")
CHECKS = (
    "bit_exact_bdia",
    "gradients_equal_bdia",
    "bit_exact_re2tal",
    "gradients_equal_re2tal",
    "revert_equal",
    "output_kept",
    "keys_kept",
)
SHORT = {
    "projection shortcut": "projection shortcut",
    "stands alone": "stands alone",
    "shortcut changes shape": "changes shape",
}
"""What a reason of the plan is called in the table, by what it contains; others stand as they are."""


def summary() -> Table:
    """One line per zoo."""
    head = ["zoo", "models", "adds found", "in chains", "of these outermost", "rewired", "share", "in closed blocks"]
    table = [[*head, "bit-exact and gradients bit-equal", "reverted equal", "failures"]]
    for record in (record for zoo in ZOOS for record in read(zoo)):
        rows = record.results or []
        outer = sum(map(_outermost, rows))
        rewired = outer - sum(row["missing"] or 0 for row in rows)
        found, chained = (sum(row[key] or 0 for row in rows) for key in ("adds", "adds_in_chains"))
        exact = sum(all(row[check] for check in CHECKS[:4]) for row in rows)
        equal = sum(bool(row["revert_equal"]) for row in rows)
        figures = [len(rows), found, chained, outer, rewired, f"{rewired / outer:.1%}" if outer else "–", _closed(rows)]
        cells = [
            *figures,
            f"{exact} of {len(rows)}",
            f"{equal} of {len(rows)}",
            sum(bool(row["failures"]) for row in rows),
        ]
        table.append([record.name.removeprefix("zoo_").removesuffix("_models").replace("_", " "), *map(str, cells)])
    return table


def models(rows: list[Row]) -> Table:
    """One line per model; what fails, is not exact, or is not rewired stands on top."""
    head = [
        "model",
        "adds",
        "in chains (nested)",
        "units / chains",
        "patterns",
        "not rewired",
        "exact",
        "reverts, keeps its form",
    ]
    table = [[*head, "saved MiB: stored → revwire (checkpoint)", "peak MiB", "convert s", "what stays, and failures"]]
    return table + [_model(row) for row in sorted(rows, key=_order)]


def _order(row: Row) -> tuple[bool, bool, int, str]:
    return not row["failures"], all(row[check] for check in CHECKS), -(row["missing"] or 0), row["model"]


def _closed(rows: list[Row]) -> str:
    """How many adds lie in blocks that are rewired as a whole; not known of records from before they were counted."""
    known = all("closed" in row for row in rows)
    return str(sum(row["closed"] or 0 for row in rows)) if known else _text(None)


def _outermost(row: Row) -> int:
    return (row["adds_in_chains"] or 0) - (row["adds_nested"] or 0)


def _model(row: Row) -> list[str]:
    found = _text(row["adds"]), f"{_text(row['adds_in_chains'])} ({_text(row['adds_nested'])})"
    patterns = ", ".join(f"{n} {pattern}" for pattern, n in (row["patterns"] or {}).items())
    form = [row[key] for key in ("revert_equal", "output_kept", "keys_kept", "eval_forward")]
    checks = _exact(row), "yes" if all(form) else _text(None if None in form else False)
    cells = (
        row["model"],
        *found,
        f"{_text(row['units'])} / {_text(row['chains'])}",
        patterns,
        _text(row["missing"]),
        *checks,
    )
    seconds = "–" if row["convert_seconds"] is None else f"{row['convert_seconds']:.1f}"
    return [*cells, _bytes(row, "saved"), _bytes(row, "peak"), seconds, _remarks(row)]


def _text(value: object) -> str:
    return next((text for known, text in ((None, "–"), (True, "yes"), (False, "**no**")) if value is known), str(value))


def _exact(row: Row) -> str:
    """Both couplings: reconstruction and gradients to the bit, or the larger of the two errors."""
    return ", ".join(f"{coupling} {_exactness(row, coupling)}" for coupling in COUPLINGS if not _plainly(row)) or "yes"


def _plainly(row: Row) -> bool:
    return all(row[f"{check}_{coupling}"] for check in ("bit_exact", "gradients_equal") for coupling in COUPLINGS)


def _exactness(row: Row, coupling: str) -> str:
    if row[f"bit_exact_{coupling}"] is None:
        return "–"
    if row[f"bit_exact_{coupling}"] and row[f"gradients_equal_{coupling}"]:
        return "yes"
    return f"**{max(row[f'{kind}_error_{coupling}'] for kind in ('reconstruction', 'gradient')):.1g}**"


def _bytes(row: Row, kind: str) -> str:
    stored, revwire, checkpoint = (row[f"{method}_{kind}_bytes"] for method in ("stored", "revwire", "checkpoint"))
    if revwire is None:
        return mib(stored)
    return f"{mib(stored)} → {mib(revwire)} ({mib(checkpoint)})"


def _remarks(row: Row) -> str:
    reasons: Counter[str] = Counter()
    for skipped in row["skipped"] or []:
        reasons[_short(skipped["reason"])] += skipped["times"]
    failures = [f"**{stage}: {reason}**" for stage, reason in row["failures"].items()]
    varying = sorted({name for coupling in COUPLINGS for name in row[f"unstable_{coupling}"] or []})
    closed = [f"{row['closed']} in closed blocks"] if row.get("closed") else []
    notes = [f"gradients vary with stored activations too: {', '.join(varying)}"] if varying else []
    text = "; ".join([*failures, *notes, *closed, *(f"{n} {reason}" for reason, n in reasons.items())])
    return text.replace("|", "\\|")


def _short(reason: str) -> str:
    known = next((short for part, short in SHORT.items() if part in reason), None)
    return known or re.sub(r"\S*\d\S*", "…", reason.partition(";")[0])


def fuzzed(rows: list[Row]) -> Table:
    """What became of models that nobody wrote."""
    head = ["models", "with rewired blocks", "original finished three steps", "another result", "seeds of these"]
    return [
        head,
        *(
            [
                *(str(row[key]) for key in ("seeds", "rewired", "finished three calls")),
                str(sum(fault["count"] for fault in row["faults"])),
                ", ".join(str(seed) for fault in row["faults"] for seed in fault["seeds"]) or "–",
            ]
            for row in rows
        ),
    ]


TABLES = {**dict.fromkeys(ZOOS, models), "fuzz": fuzzed}
SUMMARIES = {"zoo": summary}
