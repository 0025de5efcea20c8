"""Checks that need two processes: all of one stack run in one pair of workers, since starting them costs more than
running them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp

WORLD = 2
Check = Callable[[int, Path], object]
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def outcomes(checks: dict[str, Check], backend: str = "gloo") -> dict[str, str]:
    """Run every check in the same two processes; by name: what rank 0 returned, as text, or the traceback of the rank
    that failed.

    After a failure the processes are no longer in step, so what stands behind it is not run, and says so.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_workers, (checks, free_port(), Path(folder), backend))
        found = {}
        for name in checks:
            told = [Path(folder, f"{name}.{rank}") for rank in range(WORLD)]
            texts = [
                path.read_text() if path.exists() else "failed: it was not run, as an earlier check failed"
                for path in told
            ]
            found[name] = next((t for t in texts if t.startswith("failed")), texts[0])
        return found


def passes_interpreted(file: str) -> None:
    """Run a file of tests under Triton's interpreter: in a process of its own, as Triton must find its variable when it
    is imported.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", file],
        env={**os.environ, "REVWIRE_KERNELS": "interpreted", "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def _workers(_: int, *args: Any) -> None:
    """Fork all ranks from this process, which has imported what the checks need, once for all, and computed nothing."""
    how = "fork" if args[-1] == "gloo" else "spawn"  # a GPU belongs to processes that began after it
    mp.start_processes(_worker, args, nprocs=WORLD, start_method=how)


def _worker(rank: int, checks: dict[str, Check], port: int, folder: Path, backend: str = "gloo") -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD)
    )
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=WORLD, timeout=timedelta(seconds=120))
    for name, check in checks.items():
        try:
            text = str(check(rank, folder))
        except BaseException:  # noqa: BLE001  whatever it is, the parent has to hear of it
            text = "failed: " + traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(text)
        if text.startswith("failed"):
            return
    dist.destroy_process_group()


def passed(found: dict[str, str], name: str) -> str:
    """What a check returned; raises if it failed."""
    assert not found[name].startswith("failed"), found[name]
    return found[name]
