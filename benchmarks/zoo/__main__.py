"""Sweep the model zoos: ``python -m benchmarks.zoo``. See ``--help``, and ``benchmarks/README.md``."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.harness.record import RESULTS, Row, run
from benchmarks.zoo import sweep
from benchmarks.zoo.case import Case

ZOOS = ("timm_models", "torchvision_models", "pytorchvideo_models", "huggingface", "third_party")


def main() -> None:
    """Parse the command line, measure, and write one record per zoo."""
    options = _options()
    torch.set_num_threads(1)
    for zoo in options.zoo or ZOOS:
        cases = [c for c in sweep.listed(zoo, options.all) if fnmatchcase(c.name, options.only)]
        if cases:
            _sweep(zoo, cases, options)


def _sweep(zoo: str, cases: list[Case], options: argparse.Namespace) -> None:
    config = {
        "zoo": zoo,
        "all": options.all,
        "only": options.only,
        "limit_seconds": options.limit,
        "threads_per_model": 1,
    }
    config["resumed"] = options.resume is not None  # then rows may be of commits before the record's
    scratch = options.resume or Path(tempfile.gettempdir(), "revwire-zoo", _commit())
    record = run(f"zoo_{zoo}{'_all' if options.all else ''}", config, lambda: _measured(zoo, cases, scratch, options))
    if record.results is None:
        print(f"{zoo}: {record.reason}")
    elif options.only != "*":
        print(f"{zoo}: {len(cases)} models; no record is written for a part of a zoo (rows: {scratch})")
    else:
        print(record.write(options.out))


def _measured(zoo: str, cases: list[Case], scratch: Path, options: argparse.Namespace) -> list[Row]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task(zoo, total=len(cases))

        def done(row: Row) -> None:
            progress.advance(task)
            for stage, reason in row["failures"].items():
                progress.console.print(f"[red]{row['model']}[/red] {stage}: {reason}", highlight=False)

        return sweep.rows(cases, scratch, options.jobs, options.limit, done)


def _commit() -> str:
    """The commit, by which unfinished sweeps are found again."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parents[1], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description="Sweep the model zoos, and write a record for each."
    )
    parser.add_argument("--zoo", action="append", choices=ZOOS, help="only this one (may be given again)")
    parser.add_argument(
        "--only", default="*", metavar="GLOB", help="only models whose name matches; then no record is written"
    )
    parser.add_argument("--all", action="store_true", help="every registered name, not one for each family")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one model")
    parser.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="scratch folder to go on with; default: one for each commit"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    return parser.parse_args()


if __name__ == "__main__":
    main()
