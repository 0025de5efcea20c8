"""The laws of `revwire.testing` and the tests for a device, on the device."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import revwire
from benchmarks.gpu.bits import Cast
from benchmarks.gpu.device import first_line
from benchmarks.gpu.subjects import Setting
from benchmarks.harness.gpt import Layer
from benchmarks.harness.record import Row
from revwire.testing import check_gradients, check_modes, check_revert, deterministic_kernels

ROOT = Path(__file__).parents[2]
COUPLINGS = "re2tal", "bdia:1/16", "bdia-random:1/2", "momentum:1/8", "dr2net:7/8,1/8"
FILES = ("tests/runtime/test_cuda.py", "tests/streams/test_fused.py", "tests/runtime/test_fused_units.py")
SLOWER = ("tests/measure/test_measure.py", "tests/stacks/test_amp.py", "tests/stacks/test_saving.py")
"""Of which those marked `gpu` are run."""


class Convolved(nn.Module):
    """x + conv(relu(norm(x))): (batch, channels, height, width) → the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).relu())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (lambda: nn.Sequential(*(Layer(64, 4) for _ in range(3))), (2, 16, 64)),
    "convolutions": (lambda: nn.Sequential(*(Convolved(16) for _ in range(4))), (2, 16, 12, 12)),
}


def rows(setting: Setting, done: set[str]) -> Iterator[Row]:
    """A row for the doctor, one per law and network, one per file of tests."""
    if "doctor" not in done:
        found = revwire.doctor(setting.device)
        yield _row("doctor", len(found.tests), [t.precision for t in found.tests if not t.bit_exact]) | {
            "diagnosis": found.to_dict()
        }
    for name in NETWORKS:
        if (case := f"laws: {name}") not in done:
            yield _laws(case, name, setting)
    for file in FILES[:1] if setting.tiny else (*FILES, *SLOWER):
        if file not in done:
            yield _tests(file, only_marked=file in SLOWER)


def _row(case: str, passed: int, failed: list[str], skipped: int = 0, reason: str | None = None) -> Row:
    return {"case": case, "passed": passed, "failed": failed, "skipped": skipped, "reason": reason}


def _laws(case: str, name: str, setting: Setting) -> Row:
    passed, failed = 0, []
    make, shape = NETWORKS[name]
    for coupling in COUPLINGS[:2] if setting.tiny else COUPLINGS:
        for cast in (False, True):
            try:
                with warnings.catch_warnings(), deterministic_kernels():
                    warnings.simplefilter("ignore")
                    _hold(make, shape, coupling, cast, setting.device)
                passed += 1
            except Exception as error:  # noqa: BLE001 - what a device raises is what is looked for
                failed.append(f"{coupling}{', autocast' if cast else ''}: {first_line(error)}")
    return _row(case, passed, failed)


def _hold(
    make: Callable[[], nn.Module], shape: tuple[int, ...], coupling: str, cast: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(shape, device=device), make().to(device)
    model = Cast(model) if cast else model
    options: dict[str, Any] = {"coupling": coupling, "exact": True, "rewire": "everywhere"}
    check_revert(model, x, **options)
    revwire.convert(model, x, **options)
    check_gradients(model, x.requires_grad_())
    check_modes(model.eval(), x.detach())


class _Reports:
    """A plugin of pytest that keeps what came of each test."""

    def __init__(self) -> None:
        self.passed, self.skipped, self.failed = 0, 0, list[str]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def _tests(file: str, *, only_marked: bool) -> Row:
    try:
        import pytest
    except ImportError as error:
        return _row(file, 0, [], reason=first_line(error))
    seen = _Reports()
    options = ["-q", "-n0", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # much of what it would rewrite is imported
    options += ["-m", "gpu"] if only_marked else []
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main([*options, str(ROOT / file)], plugins=[seen])
    reason = None if code in (0, 1, 5) else f"pytest ended with {int(code)}"
    return _row(file, seen.passed, seen.failed, seen.skipped, reason)
