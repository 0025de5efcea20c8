"""Mixed precision: autocast to bfloat16 and float16, `GradScaler`, and weights in half precision. The streams stay
wide.
"""

from __future__ import annotations

import pytest
import torch
from networks import ConvolutionNet, Transformer
from table import works
from torch import nn
from training import Run, assert_trains_as_stored, batches, train, watched

import revwire

STACK = "Mixed precision"
each_network = pytest.mark.parametrize("network", [Transformer, ConvolutionNet])


@each_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@works(STACK, "`torch.autocast` to bfloat16 and float16")
def test_autocast(network: type[nn.Module], dtype: torch.dtype) -> None:
    def run(model: nn.Module) -> Run:
        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return model(x)

        return train(model, batches(network), call=call)

    half = assert_trains_as_stored(network, run)
    full = assert_trains_as_stored(network, lambda model: train(model, batches(network)))
    assert half.losses != full.losses, "autocast did nothing"


def scaled(model: nn.Module, device: str, start: float = 2.0**16, **options: float) -> tuple[Run, list[float]]:
    """Training with a gradient scaler, in which the first scale overflows; also the scales."""
    scaler = torch.amp.GradScaler(device, init_scale=start, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run, scales = Run(), []
    torch.manual_seed(0)
    with watched(model, run):
        for x, labels in batches(Transformer, 5):
            with torch.autocast(device, dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(x.to(device)), labels.to(device))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.losses.append(loss.item())
            scales.append(scaler.get_scale())
    return run.finish(model), scales


@works(STACK, "float16 with `GradScaler`; a step that overflows is skipped")
def test_gradient_scaler() -> None:
    scales: list[list[float]] = []

    def run(model: nn.Module) -> Run:
        out, seen = scaled(model, "cpu", start=2.0**40, backoff_factor=2.0**-24)
        scales.append(seen)
        return out

    assert_trains_as_stored(Transformer, run)
    assert scales[0] == scales[1]
    assert scales[0][0] < 2.0**40  # the first step did overflow
    assert scales[0][-1] == scales[0][-2]  # and the last did not


@each_network
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
@works(STACK, "`model.to(bfloat16)` and `.half()`, before and after conversion")
def test_weights_in_half_precision(network: type[nn.Module], dtype: torch.dtype, when: str) -> None:
    class Narrow(network):  # type: ignore[misc, valid-type]
        @staticmethod
        def example(batch: int = 4) -> torch.Tensor:
            return network.example(batch).to(dtype if when == "before" else torch.float32)

    def make() -> nn.Module:
        return Narrow().to(dtype if when == "before" else torch.float32)

    make.example = Narrow.example  # type: ignore[attr-defined]
    data = [(x.to(dtype), labels) for x, labels in batches(network)]
    assert_trains_as_stored(make, lambda model: train(model.to(dtype), data))


@works(STACK, "streams kept wide: between blocks in half precision, states are those of float32")
def test_streams_are_wide() -> None:
    """In bfloat16, small additions to a large stream are lost; the chain adds them up."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            nn.init.zeros_(self.linear.weight)
            nn.init.constant_(self.linear.bias, 2.0**-10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(x)

    model = nn.Sequential(*(Small() for _ in range(64))).bfloat16()
    x = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    assert torch.equal(model(x), x)  # 1 + 2^-10 is 1 in bfloat16
    revwire.convert(model, x, rewire="everywhere")
    assert torch.all(model(x) > 1.05), model(x)
    assert model(x).dtype == torch.bfloat16


@works(STACK, "autocast, `GradScaler` and half weights on a GPU")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", ["scaler", "bfloat16"])
def test_on_a_gpu(how: str) -> None:
    def run(model: nn.Module) -> Run:
        if how == "scaler":
            return scaled(model.cuda(), "cuda")[0]
        data = [(x.cuda().bfloat16(), labels.cuda()) for x, labels in batches(Transformer)]
        return train(model.cuda().bfloat16(), data)

    assert_trains_as_stored(Transformer, run)
