"""Hugging Face `accelerate`, in one process and in two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Transformer
from table import works
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import Run, assert_trains_as_stored, batches, converted, watched

from processes import needs_gloo, outcomes, passed

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

STACK = "accelerate"
pytestmark = pytest.mark.filterwarnings("ignore")  # of accelerate, about this machine


def accelerated(model: nn.Module, **options: Any) -> Run:
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    accelerate.utils.set_seed(0, device_specific=True)
    data = [(x[i], y[i]) for x, y in batches(Transformer, 4) for i in range(len(x))]
    loader = DataLoader(TensorDataset(*(torch.stack(c) for c in zip(*data, strict=True))), batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    run = Run()
    with watched(model, run):
        for x, labels in loader:
            with accelerator.accumulate(wrapped):
                loss = nn.functional.cross_entropy(wrapped(x), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            run.losses.append(loss.item())
    assert accelerator.unwrap_model(wrapped) is model
    return run.finish(model)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@works(STACK, "`prepare`, `accumulate`, `clip_grad_norm_`; bf16; `unwrap_model`")
def test_accelerate(precision: str) -> None:
    assert_trains_as_stored(Transformer, lambda model: accelerated(model, mixed_precision=precision))


def in_two_processes(rank: int, folder: Path) -> None:
    assert_trains_as_stored(Transformer, accelerated)


@needs_gloo
@works(STACK, "two processes (DDP)")
def test_two_processes() -> None:
    passed(outcomes({"in_two_processes": in_two_processes}), "in_two_processes")


@works(STACK, "`save_state` and `load_state`")
def test_saved_state(tmp_path: Path) -> None:
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(converted(Transformer))
    accelerator.save_state(str(tmp_path))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        model.head.weight.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
