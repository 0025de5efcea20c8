"""Tables of the memory sweeps, of the planner's predictions, and of seconds against bytes."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

from benchmarks.harness.record import Row

STORED, CHECKPOINT = "stored activations", "checkpoint per block"
BUDGETS_GIB = (2, 8, 32)
_MIB, _GIB = 2**20, 2**30
_AXES = ("depth", "batch", "length")

Table = list[list[str]]


def peaks(rows: list[Row]) -> Table:
    """Peak bytes by method (rows) and case (columns); beside them, their ratio to checkpointing per block in the same
    case.
    """
    cases = sorted({_case(row) for row in rows})
    varied = [i for i in range(4) if len({case[i] for case in cases}) > 1] or [1]
    found = {(row["method"], _case(row)): row for row in rows}
    table = [["peak MiB of a step (× checkpointing)", *(_label(case, varied) for case in cases)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        table.append([method, *(_peak(found.get((method, case)), found.get((CHECKPOINT, case))) for case in cases)])
    return table


def fit(rows: list[Row]) -> Table:
    """Bytes per image or frame, from the smallest and the largest input measured, and the largest input within budgets
    that follows.
    """
    columns = ("network", "method", "peak MiB (at)", "MiB per image or frame", "off the line between")
    table = [[*columns, *(f"largest in {b} GiB" for b in BUDGETS_GIB)]]
    for network in dict.fromkeys(row["network"] for row in rows):
        methods = list(dict.fromkeys(row["method"] for row in rows if row["network"] == network))
        lines = {m: line for m in methods if (line := _line(rows, network, m))}
        for method in methods:
            size, peak = _points(rows, network, method)[-1]
            table.append([network, method, f"{peak / _MIB:.1f} ({size})", *_fitted(method, lines)])
    return table


def _fitted(method: str, lines: dict[str, tuple[float, float, float | None]]) -> list[str]:
    """What follows from the line of a method; empty where too few inputs were measured to have one."""
    if method not in lines:
        return [""] * (2 + len(BUDGETS_GIB))
    base, slope, off = lines[method]
    cells = [_largest(b * _GIB, (base, slope), lines.get(CHECKPOINT), lines.get(STORED)) for b in BUDGETS_GIB]
    return [f"{slope / _MIB:.1f}", "–" if off is None else f"{off:.1%}", *cells]


def planner(rows: list[Row]) -> Table:
    """Predicted and measured peaks (and seconds, where they were measured) by network (rows) and budget (columns)."""
    shares = sorted({row["share"] for row in rows})
    timed = any(row.get("measured_time_ratio") for row in rows)
    head = "predicted MiB (off the measured peak)" + ("; predicted and measured seconds, × all stored" if timed else "")
    table = [[head, *(_share(share) for share in shares), "largest error", "the same blocks checkpointed"]]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = {row["share"]: row for row in rows if row["network"] == network}
        worst = max(abs(_error(row)) for row in mine.values())
        cells = (_predicted(mine[s]) if s in mine else "" for s in shares)
        table.append([network, *cells, f"{worst:.1%}", _rival(next(iter(mine.values())))])
    return table


def _predicted(row: Row) -> str:
    seconds = (
        f"; {row['predicted_time_ratio']:.2f}, {row['measured_time_ratio']:.2f}"
        if row.get("measured_time_ratio")
        else ""
    )
    return f"{row['predicted_bytes'] / _MIB:.1f} ({_error(row):+.1%}){seconds}"


def _rival(row: Row) -> str:
    predicted, done = row.get("checkpoint_predicted_bytes"), row.get("checkpoint_measured_bytes")
    return f"{predicted / _MIB:.1f} ({predicted / done - 1:+.1%})" if predicted and done else ""


def pareto(rows: list[Row]) -> Table:
    """Peak bytes and seconds by method, least bytes first."""
    head = ["method", "peak MiB of a step", "seconds × stored activations", "seconds × checkpoint per block"]
    done = sorted((r for r in rows if r["peak_bytes"] is not None), key=lambda r: r["peak_bytes"])
    cells = [
        [r["method"], f"{r['peak_bytes'] / _MIB:.1f}", *(_quartiles(r[k]) for k in ("to_stored", "to_checkpoint"))]
        for r in done
    ]
    return [head, *cells]


def overhead(rows: list[Row]) -> Table:
    """Microseconds of the machinery per unit, by coupling and direction."""
    head = ["µs per unit: median (quartiles)", "plain block", "with revwire", "of that, arithmetic", "machinery"]
    cells = [
        [
            f"{r['method']}, {r['direction']}",
            *(f"{r[k]['median']:.0f} ({r[k]['low']:.0f}–{r[k]['high']:.0f})" for k in ("plain", "whole")),
            *(f"{r[k]:.0f}" for k in ("arithmetic", "machinery")),
        ]
        for r in rows
    ]
    return [head, *cells]


def hollow(rows: list[Row]) -> Table:
    """Peak bytes with matrix products and without."""
    head = ["network", "method", "peak bytes", "without products"]
    return [head, *([r["network"], r["method"], str(r["peak_bytes"]), str(r["without_products"])] for r in rows)]


def _case(row: Row) -> tuple[str, int, int, int]:
    return row["network"], row["depth"], row["batch"], row["length"]


def _label(case: tuple[str, int, int, int], varied: list[int]) -> str:
    return ", ".join(str(case[i]) if i == 0 else f"{_AXES[i - 1]} {case[i]}" for i in varied)


def _peak(row: Row | None, base: Row | None) -> str:
    """Empty where it was not measured, a dash where it cannot be."""
    if row is None:
        return ""
    if row["peak_bytes"] is None:
        return "–"
    ratio = f" ({row['peak_bytes'] / base['peak_bytes']:.2f}×)" if base and base["peak_bytes"] else ""
    return f"{row['peak_bytes'] / _MIB:.1f}{ratio}"


def _points(rows: list[Row], network: str, method: str) -> list[tuple[int, int]]:
    """(size, peak bytes) of what was measured, smallest first; the size is what varies, the batch or the length."""
    axis = "batch" if len({r["batch"] for r in rows if r["network"] == network}) > 1 else "length"
    return sorted(
        (r[axis], r["peak_bytes"]) for r in rows if (r["network"], r["method"]) == (network, method) and r["peak_bytes"]
    )


def _line(rows: list[Row], network: str, method: str) -> tuple[float, float, float | None] | None:
    """(bytes at size 0, bytes per unit of size, how far the sizes between lie off that line) through the smallest and
    the largest.
    """
    points = _points(rows, network, method)
    if len(points) < 2:
        return None
    (x0, y0), (x1, y1) = points[0], points[-1]
    slope = (y1 - y0) / (x1 - x0)
    base = y0 - slope * x0
    between = [abs(base + slope * x - y) / y for x, y in points[1:-1]]
    return base, slope, max(between) if between else None


def _largest(budget: int, line: tuple[float, float], *others: tuple[float, float, float | None] | None) -> str:
    size = _size(budget, line)
    ratios = [f"{size / other:.1f}×" for o in others if o and (other := _size(budget, (o[0], o[1])))]
    return f"{size} ({', '.join(ratios)})"


def _size(budget: int, line: tuple[float, float]) -> int:
    return max(0, floor((budget - line[0]) / line[1]))


def _share(share: float) -> str:
    return {0.0: "least", 1.0: "all stored"}.get(share, f"{share:.0%} of the way")


def _error(row: Row) -> float:
    return float(row["predicted_bytes"] / row["measured_bytes"] - 1)


def _quartiles(q: Row) -> str:
    return f"{q['median']:.2f} ({q['low']:.2f}–{q['high']:.2f})"


PARETO = ("vit_s_16", "vit_s_16_kept", "vit_s_16__bfloat16_autocast", "gpt", "swin3d_t")
_SWEEPS = ("vit", "couplings", "gpt", "maps", "swin3d", "convnext", "resnet", "slowfast", "large")
TABLES: dict[str, Callable[[list[Row]], Table]] = {
    **{f"memory_{name}": peaks for name in _SWEEPS},
    "memory_fit": fit,
    "memory_hollow": hollow,
    "planner": planner,
    "overhead": overhead,
    **{f"memory_pareto_{name}": pareto for name in PARETO},
}
