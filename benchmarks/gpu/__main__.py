"""All that is to be measured on a GPU, in ten minutes at most: exactness, seconds and peaks, launches, what fits.

python -m benchmarks.gpu                      # on the first device; what its records have already is not run again
python -m benchmarks.gpu --only 'costs*'      # some parts; --again runs them anew
python -m benchmarks.gpu --dry-run            # every part on the CPU, on tiny networks, into a folder of its own

Each part has its own time, runs in its own process, and writes its rows to the record of the device as soon as each is
done. One that takes longer is stopped, and recorded as such. Where the ten minutes end first, the same command goes on
later. Tables come from the records by `benchmarks.harness.tables`, the picture by `benchmarks.gpu.plots`.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic

import torch

from benchmarks.gpu import stage
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.subjects import Setting
from benchmarks.harness.record import RESULTS, Record, Row, read

ENDED = "done", "stopped"
"""What becomes of a part that is not run again."""

LEAST_SECONDS = 5.0
"""A part is not begun with less left."""


@dataclass
class Book:
    """The records of one device, in a folder."""

    folder: Path
    environment: Row
    dry: bool

    def record(self, name: str) -> Record:
        """The record of this name and device, or an empty one."""
        device = self.environment["device"]
        there = [r for r in read(name, self.folder) if r.environment["device"] == device]
        config = {"parts": {}, "dry_run": self.dry}
        return there[0] if there else Record(name, "ok", None, config, [], self.environment)

    def state(self, part: str) -> str | None:
        """What became of a part: "done", "stopped", or None where it is not ended."""
        found = self.record(PARTS[part].record).config["parts"].get(part)
        return found["state"] if found else None

    def cases(self, part: str) -> set[str]:
        """The cases of a part that are there."""
        return {r["case"] for r in self.record(PARTS[part].record).results or [] if r["part"] == part}

    def add(self, part: str, row: Row) -> None:
        """Write a row of a part; one of the same case is replaced."""
        record, row = self.record(PARTS[part].record), {"part": part, **row}
        others = [r for r in record.results or [] if (r["part"], r["case"]) != (part, row["case"])]
        replace(record, results=[*others, row], environment=self.environment).write(self.folder)

    def forget(self, part: str) -> None:
        """Take all of a part out."""
        record = self.record(PARTS[part].record)
        parts = {name: state for name, state in record.config["parts"].items() if name != part}
        rest = [r for r in record.results or [] if r["part"] != part]
        replace(record, results=rest, config={**record.config, "parts": parts}).write(self.folder)

    def end(self, part: str, state: str, seconds: float) -> None:
        """Write what became of a part."""
        record = self.record(PARTS[part].record)
        parts = {**record.config["parts"], part: {"state": state, "seconds": round(seconds, 1)}}
        replace(record, config={**record.config, "parts": parts}).write(self.folder)


def run(part: str, book: Book, setting: Setting, left: float) -> str:
    """Run what is missing of a part, in its own time (a dry run asks for none) and in what is ``left`` of all; what
    became of it.
    """
    start, limit = monotonic(), left if setting.tiny else min(PARTS[part].seconds, left)
    try:
        for row in stage.rows(part, setting, book.cases(part), limit):
            book.add(part, row)
    except stage.Stopped as reason:
        if limit == left and monotonic() - start >= limit:
            return "not finished: the time of all parts is over; the same command goes on"
        book.add(part, {"case": part, "reason": str(reason)})
        book.end(part, "stopped", monotonic() - start)
        return str(reason)
    book.end(part, "done", monotonic() - start)
    return "done"


def opened(folder: Path, setting: Setting) -> Book:
    """The records of the device in a folder.

    Raises:
        SystemExit: the device does not answer.
    """
    try:
        (environment,) = stage.rows(stage.ENVIRONMENT, setting, set(), 60)
    except stage.Stopped as reason:
        raise SystemExit(f"benchmarks.gpu: {setting.device}: {reason}") from None
    return Book(folder, environment, setting.tiny)


def options() -> argparse.Namespace:
    """Those of the command line.

    Raises:
        SystemExit: one makes no sense; says which, in one line.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="such as cuda:1")
    parser.add_argument("--only", default="*", metavar="GLOB", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="run parts anew that are ended")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts")
    parser.add_argument(
        "--folder", type=Path, help=f"of the records; by default {RESULTS.relative_to(RESULTS.parents[1])}"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, on tiny networks, into another folder")
    found = parser.parse_args()
    found.device = torch.device("cpu") if found.dry_run else _device(found.device)
    found.parts = [part for part in PARTS if fnmatch(part, found.only)]
    if not found.parts:
        raise SystemExit(f"benchmarks.gpu: got --only {found.only!r}; expected a glob of {', '.join(PARTS)}")
    if not found.minutes > 0:
        raise SystemExit(f"benchmarks.gpu: got --minutes {found.minutes:g}; expected more than 0")
    if found.folder is None:
        found.folder = Path(tempfile.mkdtemp(prefix="benchmarks-gpu-")) if found.dry_run else RESULTS
    if found.dry_run and found.folder.resolve() == RESULTS.resolve():
        raise SystemExit("benchmarks.gpu: got the folder of the results for a dry run; expected another --folder")
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda":
        raise SystemExit(f"benchmarks.gpu: got the device {name!r}; expected a CUDA device, such as cuda:0")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: there is no CUDA device here; --dry-run runs every part on the CPU")
    if (device.index or 0) >= torch.cuda.device_count():
        raise SystemExit(f"benchmarks.gpu: got the device {name!r}; there are {torch.cuda.device_count()}")
    return torch.device("cuda", device.index or 0)  # each process begins with the first one as the current


def main() -> None:
    """Run what is missing."""
    chosen = options()
    until = monotonic() + 60 * chosen.minutes
    setting = Setting(chosen.device, chosen.dry_run)
    book = opened(chosen.folder, setting)
    print(f"{book.environment['device']}, records in {chosen.folder}")
    for part in chosen.parts:
        if chosen.again:
            book.forget(part)
        if (state := book.state(part)) in ENDED:
            print(f"{part}: {state} before", flush=True)
        elif until - monotonic() < LEAST_SECONDS:
            print(f"{part}: not begun: the time of all parts is over; the same command goes on", flush=True)
        else:
            print(f"{part}: {run(part, book, setting, until - monotonic())}", flush=True)


if __name__ == "__main__":
    main()
