"""Tables of what was measured on a GPU, and of what was counted for one."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness.cells import Table, mib, quartiles
from benchmarks.harness.record import Row


def costs(rows: list[Row]) -> Table:
    """Peaks and seconds of a step by network and method."""
    head = ["network (batch × length)", "method", "peak MiB: allocated", "reserved", "× checkpointing"]
    head += ["seconds of a step", "× checkpointing"]
    table = [head]
    base = {row["network"]: row["peak_bytes"] for row in rows if row.get("method") == "checkpointing"}
    for row in rows:
        if "method" not in row:
            table.append([row["part"].removeprefix("costs: "), *_failed(row, 6)])
            continue
        name = f"{row['network']} ({row['batch']} × {row['length']})"
        if row["reason"]:
            table.append([name, row["method"], *_failed(row, 5)])
            continue
        least = base.get(row["network"])
        ratio = f"{row['peak_bytes'] / least:.2f}" if least else "–"
        seconds = [quartiles(row[k], 3) if row[k] else "–" for k in ("seconds", "to_checkpointing")]
        table.append([name, row["method"], mib(row["peak_bytes"]), mib(row["reserved_bytes"]), ratio, *seconds])
    return table


def bits(rows: list[Row]) -> Table:
    """Exactness by network and precision."""
    head = ["network", "precision", "attention", "units", "`verify`", "vary by themselves"]
    table = [[*head, "three steps", "with cudnn.benchmark"]]
    for row in rows:
        if "network" not in row:
            table.append([row["case"], *_failed(row, 7)])
            continue
        name = [row["network"], row["precision"], row["attention"]]
        if row["reason"]:
            table.append([*name, *_failed(row, 5)])
            continue
        found = "bit-exact" if row["bit_exact"] else f"states {row['reconstruction_error']:.1e}, gradients "
        found += "" if row["bit_exact"] else f"{row['gradient_error']:.1e}"
        varying = f"{row['unstable']} gradients"
        table.append([*name, str(row["units"]), found, varying, row["steps"], row["steps_cudnn_benchmark"]])
    return table


def conformance(rows: list[Row]) -> Table:
    """Passed and failed by file of tests, or by network."""
    table = [["what", "passed", "failed", "skipped"]]
    for row in rows:
        if "passed" in row and not row["reason"]:
            failed = ", ".join(row["failed"]).replace("|", "\\|") or "0"
            table.append([row["case"], str(row["passed"]), failed, str(row["skipped"])])
        else:
            table.append([row["case"], *_failed(row, 3)])
    return table


def fit(rows: list[Row]) -> Table:
    """The largest sizes by network and method."""
    table = [["network", "method", "largest that ran", "smallest that did not fit", "expected by the line", "peak MiB"]]
    for row in rows:
        if "network" not in row or row["reason"]:
            table.append([row.get("network", row["case"]), row.get("method", ""), *_failed(row, 4)])
            continue
        sizes = ["–" if row[k] is None else f"{row['axis']} {row[k]}" for k in ("largest", "too_large", "expected")]
        table.append([row["network"], row["method"], *sizes, mib(row["peak_bytes"])])
    return table


def launches(rows: list[Row]) -> Table:
    """Launches and waits per unit, counted on a CPU and seen by the profiler."""
    keys = ("launches_per_unit", "waits_per_unit", "waits_per_step")
    head = ["method", *(f"{key.replace('_', ' ')}: counted" for key in keys)]
    table = [[*head, *(f"{key.replace('_', ' ')}: profiled" for key in keys)]]
    for row in rows:
        seen = [row.get(how) or dict.fromkeys(keys) for how in ("counted", "profiled")]
        table.append([row["case"], *("–" if s[key] is None else f"{s[key]:g}" for s in seen for key in keys)])
    return table


def roofline(rows: list[Row]) -> Table:
    """An estimate of a step beside checkpointing's."""
    head = ["estimate, no measurement: network (batch)", "method", "launches", "GB moved", "TFLOP"]
    rates = [key.removeprefix("seconds ") for key in rows[0] if key.startswith("seconds ")]
    table = [[*head, *(f"ms {rate} (× checkpointing)" for rate in rates), "target", "met"]]
    for row in rows:
        cells = [f"{1e3 * row[f'seconds {r}']:.1f} ({row[f'to_checkpointing {r}']:.3f})" for r in rates]
        target = row["target"]
        met = "–" if target is None else ", ".join(_met(row[f"to_checkpointing {r}"], target) for r in rates)
        sizes = [f"{row['bytes'] / 1e9:.1f}", f"{row['flops'] / 1e12:.2f}"]
        name = f"{row['network']} ({row['batch']})"
        table.append([name, row["method"], str(row["launches"]), *sizes, *cells, f"{target or '–'}", met])
    return table


def _met(ratio: float, target: float) -> str:
    return "yes" if ratio <= target else "no"


def _failed(row: Row, cells: int) -> list[str]:
    """Why there are no figures, in the last of so many cells."""
    return ["–"] * (cells - 1) + [f"failed: {row['reason']}".replace("|", "\\|")]


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "gpu_bits": bits,
    "gpu_conformance": conformance,
    "gpu_costs": costs,
    "gpu_fit": fit,
    "gpu_launches": launches,
    "gpu_roofline": roofline,
}
