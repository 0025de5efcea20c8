"""Exactness on the device: `revwire.verify`, and steps under PyTorch's default settings, whose checks tell a recompute
that differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import revwire
from benchmarks.gpu.device import first_line, settled
from benchmarks.gpu.subjects import LOW, Setting, Subject, in_precision, subject
from benchmarks.harness.record import Row
from benchmarks.memory.steps import step

PRECISIONS = "bfloat16 autocast", "bfloat16"
NETWORKS = "ViT-B/16", "Swin3D-T", "SlowFast-R50", "Llama-like, 8k tokens"
ATTENDS = {"ViT-B/16", "Llama-like, 8k tokens"}
"""Networks whose attention is one call, of which PyTorch chooses the kernel; flash attention is asked for, too."""


class Cast(nn.Module):
    """A network under autocast, its backward outside of it, as in a training step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, LOW):
            return self.model(x)


def cases() -> Iterator[tuple[str, str, str]]:
    """(network, precision, kernel of attention)."""
    for network in NETWORKS:
        for precision in PRECISIONS:
            yield network, precision, "default"
            if network in ATTENDS:
                yield network, precision, "flash"


def rows(setting: Setting, done: set[str]) -> Iterator[Row]:
    """A row per case."""
    for network, precision, attention in cases():
        case = f"{network}, {precision}, {attention} attention"
        if case not in done:
            row: Row = {"case": case, "network": network, "precision": precision, "attention": attention}
            found = in_precision(subject(network, setting), precision)
            kernel = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if attention == "flash" else nullcontext()
            yield row | _measured(found, setting.device, kernel)
            settled(setting.device)


def _measured(found: Subject, device: torch.device, kernel: AbstractContextManager[Any]) -> Row:
    row: Row = dict.fromkeys(("units", "bit_exact", "reconstruction_error", "gradient_error", "unstable", "reason"))
    try:
        with kernel, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x, model = found.input(device), found.made(device)
            model = model if found.dtype else Cast(model)
            revwire.convert(model, x, rewire="everywhere")
            check = revwire.verify(model, x)
            row |= {"units": len(check.units), "bit_exact": check.bit_exact, "unstable": len(check.unstable)}
            row |= {"reconstruction_error": check.reconstruction_error, "gradient_error": check.gradient_error}
            row |= {name: _steps(model, x, benchmark) for name, benchmark in SETTINGS.items()}
    except Exception as error:  # noqa: BLE001 - a record says why, and the next case is measured
        row["reason"] = first_line(error)
    return row


SETTINGS = {"steps": False, "steps_cudnn_benchmark": True}


def _steps(model: nn.Module, x: Tensor, benchmark: bool) -> str:
    """ "exact", or what the checks of three steps said, under default settings but for ``cudnn.benchmark``."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, benchmark
    try:
        for _ in range(3):
            step(model, x)
    except revwire.RevwireError as error:
        return first_line(error)
    finally:
        torch.backends.cudnn.benchmark = before
    return "exact"
