"""The largest batch, and the longest input, of which a step fits on the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from math import inf
from time import perf_counter

import torch
from torch import nn

import revwire
from benchmarks.gpu.costs import CHECKPOINT, METHODS, PLAIN, RE2TAL, STORED
from benchmarks.gpu.device import first_line, peaks, settled
from benchmarks.gpu.subjects import Setting, Subject, subject
from benchmarks.harness.record import Row
from benchmarks.memory.steps import step

AXES = {"ViT-L/16": "batch", "Llama-like, 8k tokens": "length"}
ORDER = PLAIN, CHECKPOINT, RE2TAL, STORED
SMALL_ROOM = 600 * 2**10
"""Bytes above rest in a dry run."""

CLOSE, TRIES, GROWTH, MOST_SECONDS = 1 / 32, 9, 4, 12.0
"""How near the two sizes come; the most that are tried, the most that one grows by, and the most that one may take."""


@dataclass(frozen=True)
class Largest:
    """What was found.

    Attributes:
        largest: the largest size that was run; None: none was.
        peak_bytes: of it.
        too_large: the smallest that did not fit; None: none was met, or in too many seconds.
        expected: the largest that should fit, by the line through the two largest that were run.
    """

    largest: int | None
    peak_bytes: int | None
    too_large: int | None
    expected: int | None


def rows(setting: Setting, done: set[str]) -> Iterator[Row]:
    """A row per network and method."""
    for network, axis in AXES.items():
        for method in ORDER[:2] if setting.tiny else ORDER:
            case = f"{network}, {method}"
            if case not in done:
                row: Row = {"case": case, "network": network, "axis": axis, "method": method}
                yield row | _measured(subject(network, setting), axis, method, setting)


def _measured(found: Subject, axis: str, method: str, setting: Setting) -> Row:
    row: Row = dict.fromkeys(("largest", "peak_bytes", "too_large", "expected", "because", "reason"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = found.input(setting.device)
            with found.around(setting.device):
                model = METHODS[method](found.made(setting.device), x)
        why: list[str] = []
        attempt = _attempt(model, found, axis, setting, why)
        room = SMALL_ROOM if setting.tiny else torch.cuda.mem_get_info(setting.device)[0]
        most = inf if setting.tiny else MOST_SECONDS
        row |= asdict(search(attempt, getattr(found, axis), room, most)) | {"because": why[-1] if why else None}
    except Exception as error:  # noqa: BLE001 - a record says why, and the next method is measured
        row["reason"] = first_line(error)
    settled(setting.device)
    return row


def _attempt(
    model: nn.Module, found: Subject, axis: str, setting: Setting, why: list[str]
) -> Callable[[int], int | None]:
    """size → peak bytes of a step; None: it does not fit, and ``why`` has one reason more."""
    device, warm = setting.device, False

    def attempt(size: int) -> int | None:
        nonlocal warm
        settled(device)
        try:
            x = found.input(device, **{axis: size})
            peak = peaks(lambda: step(model, x, lambda: found.around(device)), device, warm=warm)["peak_bytes"]
        except (RuntimeError, revwire.RevwireError) as error:  # libraries say in several ways that memory is missing
            why.append(first_line(error))
            return None
        warm = True
        if setting.tiny and peak > SMALL_ROOM:
            why.append("more than a dry run has")
            return None
        return int(peak)

    return attempt


def search(attempt: Callable[[int], int | None], first: int, room: int, most: float = MOST_SECONDS) -> Largest:
    """Where bytes grow by the size: from the line through two sizes, and then between the largest that fitted and the
    smallest that did not, to within `CLOSE`, in at most `TRIES` steps. Ends where one would take more than ``most``
    seconds, should it take the square of the size.
    """
    fitted: dict[int, int] = {}
    low, high, size, pace = 0, None, first, 0.0
    for _ in range(TRIES):
        if pace * size**2 > most:
            break
        start = perf_counter()
        peak = attempt(size)
        if peak is None:
            high = size
        else:
            fitted[size], low = peak, max(low, size)
            pace = (perf_counter() - start) / size**2 if len(fitted) > 1 else 0.0  # what is first compiles, too
        if high is not None and high - low <= max(1, low * CLOSE):
            break
        size = _next(fitted, low, high, room)
    return Largest(low or None, fitted.get(low), high, _expected(fitted, room))


def _expected(fitted: dict[int, int], room: int) -> int | None:
    """Where the line through the two largest sizes meets the room."""
    if len(fitted) < 2:
        return None
    (x0, y0), (x1, y1) = sorted(fitted.items())[-2:]
    return int(x1 + (room - y1) * (x1 - x0) / (y1 - y0)) if y1 > y0 else None


def _next(fitted: dict[int, int], low: int, high: int | None, room: int) -> int:
    if not low:
        return max(1, (high or 2) // 2)
    expected = _expected(fitted, room)
    guess = min(GROWTH * low, int(low + 0.97 * (expected - low)) if expected else 2 * low)
    if high is None:
        return max(guess, low + max(1, int(low * CLOSE)))
    return guess if low < guess < high else (low + high) // 2
