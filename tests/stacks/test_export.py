"""Deployment: `torch.export`, ONNX and TorchScript, of the converted model in eval mode, and of the reverted one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import ConvolutionNet, Transformer
from table import refused, works
from torch import nn
from training import batches, converted, train

import revwire

STACK = "Export"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters, about themselves
each_network = pytest.mark.parametrize("network", [Transformer, ConvolutionNet])
each_state = pytest.mark.parametrize("state", ["converted", "reverted"])


NOTE = "call it once on the example, and export, both in `torch.no_grad()`; with float streams, so equal up to rounding"
ROUNDING = 1e-5  # fixed-point streams round to 2^-16 or finer of the range


def trained(network: type[nn.Module], state: str) -> nn.Module:
    model = converted(network)
    train(model, batches(network, 1))
    return (revwire.revert(model) if state == "reverted" else model).eval()


@each_network
@each_state
@torch.no_grad()
@works(STACK, "`torch.export`, of the converted model (eval) and of the reverted one; dynamic batch", NOTE)
def test_torch_export(network: type[nn.Module], state: str) -> None:
    model, x = trained_with_gradients(network, state), network.example()
    model(x)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    for other in (x, 0.7 * x, torch.cat([x, -x])):
        torch.testing.assert_close(
            program.module()(other), model(other), rtol=0, atol=ROUNDING if state == "converted" else 0
        )


@each_network
@each_state
@torch.no_grad()
@works(STACK, "ONNX, of the converted model (eval) and of the reverted one", NOTE)
def test_onnx(network: type[nn.Module], state: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    model, x = trained_with_gradients(network, state), network.example()
    out = model(x)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), out, rtol=0, atol=ROUNDING)  # other kernels


@each_network
@torch.no_grad()
@works(STACK, "`torch.jit.trace` of the converted model (eval)", NOTE)
def test_torchscript(network: type[nn.Module]) -> None:
    model, x = trained_with_gradients(network, "converted"), network.example()
    model(x)
    traced = torch.jit.trace(model, (x,))
    for other in (x, 3 * x):
        torch.testing.assert_close(traced(other), model(other), rtol=0, atol=ROUNDING)


def trained_with_gradients(network: type[nn.Module], state: str) -> nn.Module:
    with torch.enable_grad():
        return trained(network, state)


@pytest.mark.parametrize("export", [torch.export.export, torch.jit.trace], ids=["export", "jit"])
@refused(STACK, "a call with gradients", "export in eval mode, inside of `torch.no_grad()`")
def test_exports_that_nothing_is_known_of(export) -> None:
    """A call that was not met before is written down; not so one with gradients."""
    model, x = converted(ConvolutionNet).eval(), ConvolutionNet.example()
    with torch.no_grad():
        written = export(model, (x,))
        run = written.module() if hasattr(written, "module") else written
        torch.testing.assert_close(run(x), model(x))
    with pytest.raises(revwire.CaptureError, match=r"with gradients; .*torch\.no_grad\(\)"):
        export(model, (x,))
