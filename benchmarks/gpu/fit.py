"""The largest batch, and the longest input, of which a step fits on the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.gpu.bits import first_line
from benchmarks.gpu.costs import CHECKPOINT, METHODS, PLAIN, RE2TAL, STORED, peaks, settled
from benchmarks.gpu.subjects import Setting, Subject, subject
from benchmarks.harness.record import Row
from benchmarks.memory.steps import step

AXES = {"ViT-L/16": "batch", "Llama-like, 8k tokens": "length"}
SMALL_ROOM = 8 * 2**20
"""Bytes above rest in a dry run."""

CLOSE, TRIES = 1 / 32, 9


@dataclass(frozen=True)
class Largest:
    """The largest size that was run, its peak bytes, and the smallest that did not fit (None: none was met)."""

    size: int | None
    peak_bytes: int | None
    too_large: int | None


def rows(setting: Setting, done: set[str]) -> Iterator[Row]:
    """A row per network and method."""
    for network, axis in AXES.items():
        for method in (PLAIN, CHECKPOINT, RE2TAL, STORED):
            case = f"{network}, {method}"
            if case not in done:
                row: Row = {"case": case, "network": network, "axis": axis, "method": method}
                yield row | _measured(subject(network, setting), axis, method, setting)


def _measured(found: Subject, axis: str, method: str, setting: Setting) -> Row:
    row: Row = dict.fromkeys(("largest", "peak_bytes", "too_large", "reason"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = found.input(setting.device)
            with found.around(setting.device):
                model = METHODS[method](found.made(setting.device), x)
        attempt = _attempt(model, found, axis, setting)
        room = SMALL_ROOM if setting.tiny else torch.cuda.mem_get_info(setting.device)[0]
        largest = search(attempt, getattr(found, axis), room)
        row |= {"largest": largest.size, "peak_bytes": largest.peak_bytes, "too_large": largest.too_large}
    except Exception as error:  # noqa: BLE001 - a record says why, and the next method is measured
        row["reason"] = first_line(error)
    settled(setting.device)
    return row


def _attempt(model: nn.Module, found: Subject, axis: str, setting: Setting) -> Callable[[int], int | None]:
    """size → peak bytes of a step; None: it does not fit."""
    device = setting.device

    def attempt(size: int) -> int | None:
        settled(device)
        try:
            x = found.input(device, **{axis: size})
            peak = peaks(lambda: step(model, x, lambda: found.around(device)), device)["peak_bytes"]
        except torch.OutOfMemoryError:
            return None
        return int(peak) if not setting.tiny or peak <= SMALL_ROOM else None

    return attempt


def search(attempt: Callable[[int], int | None], first: int, room: int) -> Largest:
    """Where bytes grow by the size: from the line through two sizes, and then between the largest that fitted and the
    smallest that did not, to within `CLOSE`, in at most `TRIES` steps.
    """
    fitted: dict[int, int] = {}
    low, high, size = 0, None, first
    for _ in range(TRIES):
        peak = attempt(size)
        if peak is None:
            high = size
        else:
            fitted[size], low = peak, max(low, size)
        if high is not None and high - low <= max(1, low * CLOSE):
            break
        size = _next(fitted, low, high, room)
    return Largest(low or None, fitted.get(low), high)


def _next(fitted: dict[int, int], low: int, high: int | None, room: int) -> int:
    if not low:
        return max(1, (high or 2) // 2)
    if len(fitted) == 1:
        guess = 2 * low
    else:
        (x0, y0), (x1, y1) = sorted(fitted.items())[-2:]
        guess = int(x1 + 0.97 * (room - y1) * (x1 - x0) / (y1 - y0)) if y1 > y0 else 2 * low
    if high is None:
        return max(guess, low + max(1, int(low * CLOSE)))
    return guess if low < guess < high else (low + high) // 2
