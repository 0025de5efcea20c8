"""The sweep: every case in a process of its own, with a time limit and one thread; what was measured already is not
measured again.

A server process imports PyTorch and the zoos once, and forks for each case. A case leaves one JSON file in the scratch
folder, which the next run finds; a file whose case did not end (a crash, the time limit) says so, and counts as
measured too.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from benchmarks.harness.record import Row
from benchmarks.zoo import probe
from benchmarks.zoo.case import Case

_POLL_SECONDS = 0.2


@dataclass
class _Running:
    case: Case
    process: BaseProcess
    since: float


def rows(cases: list[Case], scratch: Path, jobs: int, limit: float, done: Callable[[Row], None]) -> list[Row]:
    """One row per case, in the order of the cases; ``done`` is called with each as it comes.

    Args:
        cases: what to measure.
        scratch: folder of the files, one per case; what lies there is taken as measured.
        jobs: processes at a time.
        limit: seconds for one case.
        done: for a progress bar.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    waiting = [case for case in cases if not file(scratch, case).exists()]
    for case in (c for c in cases if c not in waiting):
        done(read(scratch, case))
    for case in _all_run(waiting, scratch, jobs, limit):
        done(read(scratch, case))
    return [read(scratch, case) for case in cases]


def listed(zoo: str, everything: bool = False) -> list[Case]:
    """The cases of a zoo."""
    found: list[Case] = importlib.import_module(f"benchmarks.zoo.{zoo}").cases(everything)
    return found


def find(zoo: str, name: str) -> Case:
    """One case by its name."""
    return next(case for everything in (False, True) for case in listed(zoo, everything) if case.name == name)


def file(scratch: Path, case: Case) -> Path:
    """Where the row of a case lies when it is finished."""
    return scratch / f"{case.zoo}.{re.sub(r'[^A-Za-z0-9_.-]+', '-', case.name)}.json"


def read(scratch: Path, case: Case) -> Row:
    """A finished row."""
    row: Row = json.loads(file(scratch, case).read_text())
    return row


def _all_run(waiting: list[Case], scratch: Path, jobs: int, limit: float) -> Iterator[Case]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo.preload"])
    running: list[_Running] = []
    queue = list(waiting)
    try:
        while queue or running:
            while queue and len(running) < jobs:
                running.append(_start(context, queue.pop(0), scratch))
            sleep(_POLL_SECONDS)
            for r in [r for r in running if _ended(r, limit)]:
                running.remove(r)
                _finish(r, scratch, limit)
                yield r.case
    finally:
        for r in running:
            r.process.kill()


def _start(context: Any, case: Case, scratch: Path) -> _Running:
    process = context.Process(target=_child, args=(case.zoo, case.name, _partial(scratch, case)), daemon=True)
    process.start()
    return _Running(case, process, monotonic())


def _ended(r: _Running, limit: float) -> bool:
    if r.process.is_alive() and monotonic() - r.since > limit:
        r.process.kill()
        r.process.join()
    return not r.process.is_alive()


def _finish(r: _Running, scratch: Path, limit: float) -> None:
    """Move what the process left to its place, with the reason if it did not come to its end."""
    path = _partial(scratch, r.case)
    row: Row = json.loads(path.read_text()) if path.exists() else probe.empty(r.case)
    row["seconds"] = monotonic() - r.since
    if row["stage"] is not None:
        code = r.process.exitcode or 0
        how = f"passed the limit of {limit:.0f} s" if row["seconds"] > limit else f"ended by {_signal(code)}"
        row["failures"][row["stage"]] = f"the process {how}"
    path.write_text(json.dumps(row))
    path.rename(file(scratch, r.case))


def _signal(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _partial(scratch: Path, case: Case) -> Path:
    return file(scratch, case).with_suffix(".partial")


def _child(zoo: str, name: str, path: Path) -> None:
    """Runs in a process of its own; it is told the name of the case, as what builds a model need not be picklable."""
    torch.set_num_threads(1)

    def publish(row: Row) -> None:
        text = json.dumps(row)
        beside = path.with_suffix(".writing")
        beside.write_text(text)
        beside.rename(path)

    probe.measure(find(zoo, name), publish)
