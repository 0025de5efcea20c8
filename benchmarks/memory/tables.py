"""Tables of bytes and seconds: of methods side by side, of what the planner predicts, of a conversion."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

from benchmarks.harness.cells import Table, mib, quartiles
from benchmarks.harness.record import Row
from benchmarks.memory.decisions import decisions

STORED, CHECKPOINT = "stored activations", "checkpoint per block"
BUDGETS_GIB = (2, 8, 32)
_GIB = 2**30
_AXES = ("depth", "batch", "length")


def vit_depth(rows: list[Row]) -> Table:
    """Peak memory by method (rows) and depth (columns)."""
    depths = sorted({row["depth"] for row in rows})
    found = {(row["method"], row["depth"]): row["peak_bytes"] for row in rows}
    base = {depth: found[CHECKPOINT, depth] for depth in depths}
    table = [["peak MiB of a step (× checkpointing)", *(f"depth {depth}" for depth in depths)]]
    for method in dict.fromkeys(row["method"] for row in rows):
        table.append([method, *(f"{mib(found[method, d])} ({found[method, d] / base[d]:.2f}×)" for d in depths)])
    return table


def step_time(rows: list[Row]) -> Table:
    """Seconds of a step, and paired ratios."""
    ratios = {
        "to_stored": "× stored activations",
        "to_checkpoint": "× checkpoint per block",
        "to_whole": "× checkpoint without early stop",
    }
    head = ["training step", "seconds: median (quartiles)", *ratios.values()]
    return [head, *([row["method"], *(quartiles(row[k], 3) for k in ("seconds", *ratios))] for row in rows)]


def conversion(rows: list[Row]) -> Table:
    """Seconds and bytes of a conversion by model."""
    head = ["model", "seconds", "units", "peak MiB above rest", "MiB of weights"]
    sizes = "peak_bytes", "weight_bytes"
    return [head, *([r["model"], f"{r['seconds']:.1f}", str(r["units"]), *(mib(r[k]) for k in sizes)] for r in rows)]


def default(rows: list[Row]) -> Table:
    """The plain call against stored activations and the checkpointing that a user would pick, by model."""
    head = [
        *(
            "model",
            "units, checkpoints",
            "checkpointing",
            "peak MiB: stored",
            "checkpointing",
            "revwire",
            "× checkpointing",
        ),
        *("seconds × checkpointing", "seconds × stored", "forecasts off by", "convert s (planning)"),
    ]
    return [head, *([row["model"], *_default(row)] for row in rows)]


KNOWN = {
    "timm vit_small_patch16_224": "ViT-S/16 (timm)",
    "timm convnext_tiny": "ConvNeXt-T (timm)",
    "timm resnet50": "ResNet-50 (timm)",
    "timm caformer_s18": "CAFormer-S18 (timm)",
    "timm swin_tiny": "Swin-T (timm)",
    "torchvision swin3d_t, 32 frames": "Video Swin-T (torchvision)",
    "pytorchvideo slowfast_r50": "SlowFast-R50 (pytorchvideo)",
    "Hugging Face BERT": "BERT",
    "Hugging Face Whisper": "Whisper",
    "Hugging Face Llama": "Llama",
    "Hugging Face Qwen2, LoRA": "Qwen2 with LoRA",
}
"""The models of the short table, the one that loses included."""


def known(rows: list[Row]) -> Table:
    """The plain call on networks that people know: peak and seconds beside checkpointing."""
    found = {row["model"]: row for row in rows if not row["reason"]}
    head = ["network", "stored, MiB", "its own checkpointing, MiB", "revwire, MiB"]
    table = [[*head, "× checkpointing: peak", "× checkpointing: seconds"]]
    for model, name in KNOWN.items():
        if row := found.get(model):
            sizes = [row[f"{variant}_bytes"] for variant in ("stored", "rival", "plain")]
            ratios = sizes[2] / sizes[1], row["to_rival"]["median"]
            table.append([name, *map(mib, sizes), *(f"{ratio:.2f}" for ratio in ratios)])
    return table


def _default(row: Row) -> list[str]:
    if row["reason"]:
        return ["–"] * 9 + [f"failed: {row['reason']}".replace("|", "\\|")]
    how = "own switch" if not row["blocks"] else f"{row['blocks']} blocks"
    sizes = [row[f"{variant}_bytes"] for variant in ("stored", "rival", "plain")]
    forecasts = [row[f"{variant}_forecast"] for variant in ("stored", "rival", "plain")]
    off = ", ".join("–" if f is None else f"{f / size - 1:+.1%}" for f, size in zip(forecasts, sizes, strict=True))
    return [
        *(f"{row['units']}, {row['checkpointed']}", how, *map(mib, sizes), f"{sizes[2] / sizes[1]:.2f}"),
        *(quartiles(row[k], 2) for k in ("to_rival", "to_stored")),
        off,
        f"{row['convert_seconds']:.1f} ({row['plan_seconds']:.1f})",
    ]


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
            table.append([network, method, f"{mib(peak)} ({size})", *_fitted(method, lines)])
    return table


def _fitted(method: str, lines: dict[str, tuple[float, float, float | None]]) -> list[str]:
    """What follows from the line of a method; empty where too few inputs were measured to have one."""
    if method not in lines:
        return [""] * (2 + len(BUDGETS_GIB))
    base, slope, off = lines[method]
    cells = [_largest(b * _GIB, (base, slope), lines.get(CHECKPOINT), lines.get(STORED)) for b in BUDGETS_GIB]
    return [f"{slope / 2**20:.1f}", "–" if off is None else f"{off:.1%}", *cells]


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
    return f"{mib(row['predicted_bytes'])} ({_error(row):+.1%}){seconds}"


def _rival(row: Row) -> str:
    predicted, done = row.get("checkpoint_predicted_bytes"), row.get("checkpoint_measured_bytes")
    return f"{mib(predicted)} ({predicted / done - 1:+.1%})" if predicted and done else ""


def pareto(rows: list[Row]) -> Table:
    """Peak bytes and seconds by method, least bytes first."""
    head = ["method", "peak MiB of a step", "seconds × stored activations", "seconds × checkpoint per block"]
    done = sorted((r for r in rows if r["peak_bytes"] is not None), key=lambda r: r["peak_bytes"])
    ratios = "to_stored", "to_checkpoint"
    return [head, *([r["method"], mib(r["peak_bytes"]), *(quartiles(r[k], 2) for k in ratios)] for r in done)]


def overhead(rows: list[Row]) -> Table:
    """Microseconds of the machinery per unit, by method and direction."""
    head = ["µs per unit: median (quartiles)", "plain block", "with the method", "of that, arithmetic", "machinery"]
    cells = [
        [
            f"{r['method']}, {r['direction']}",
            *(quartiles(r[k], 0) for k in ("plain", "whole")),
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
    return f"{mib(row['peak_bytes'])}{ratio}"


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


PARETO = ("vit_s_16", "vit_s_16_kept", "vit_s_16__bfloat16_autocast", "gpt", "swin3d_t")
_SWEEPS = ("vit", "couplings", "gpt", "maps", "swin3d", "convnext", "resnet", "slowfast", "large")
VIEWS = {"known": ("default", known)}
SUMMARIES = {"decisions": decisions}
TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "vit_depth": vit_depth,
    "step_time": step_time,
    "conversion": conversion,
    "default": default,
    **{f"memory_{name}": peaks for name in _SWEEPS},
    "memory_fit": fit,
    "memory_hollow": hollow,
    "planner": planner,
    "overhead": overhead,
    **{f"memory_pareto_{name}": pareto for name in PARETO},
}
