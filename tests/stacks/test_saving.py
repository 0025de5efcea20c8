"""Saving and loading: state dicts both ways, safetensors, whole models, copies; converted before or after loading."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import ConvolutionNet, Transformer
from table import works
from torch import nn
from torch.nn.parallel import DataParallel
from training import batches, converted, train

import revwire

STACK = "Saving and loading"
each_network = pytest.mark.parametrize("network", [Transformer, ConvolutionNet])


def trained(network: type[nn.Module]) -> nn.Module:
    model = converted(network)
    train(model, batches(network))
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same state, and compute and learn the same."""
    states = list(a.state_dict()) == list(b.state_dict()) and all(
        map(torch.equal, a.state_dict().values(), b.state_dict().values())
    )
    network = type(a)
    x = network.example()
    with torch.no_grad():
        alike = torch.equal(copy.deepcopy(a).eval()(x), copy.deepcopy(b).eval()(x))
    steps = [train(copy.deepcopy(m).train(), batches(network)).losses for m in (a, b)]
    return states and alike and steps[0] == steps[1]


@each_network
@works(STACK, "`state_dict` both ways, strict; converted before or after loading")
def test_state_dicts(network: type[nn.Module]) -> None:
    model = trained(network)
    original = network()
    original.load_state_dict(model.state_dict(), strict=True)
    assert list(original.state_dict()) == list(model.state_dict())
    after = revwire.convert(original, network.example(), rewire="everywhere")
    before = converted(network, seed=1)
    before.load_state_dict(model.state_dict(), strict=True)
    assert same(before, model)
    assert same(after.train(), model)


@each_network
@works(STACK, "safetensors")
def test_safetensors(network: type[nn.Module], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    model, other = trained(network), converted(network, seed=1)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors", strict=True)
    assert same(other, model)
    plain = network()
    safetensors.load_model(plain, tmp_path / "model.safetensors", strict=True)
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))


def through_a_file(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@each_network
@pytest.mark.parametrize("copied", [lambda m, _: copy.deepcopy(m), through_a_file], ids=["deepcopy", "torch.save"])
@works(STACK, "`torch.save` of the whole model, `copy.deepcopy`")
def test_copies(network: type[nn.Module], copied: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    model = trained(network)
    other = copied(model, tmp_path)
    assert same(other, model)
    assert str(revwire.report(other)) == str(revwire.report(model))
    train(other, batches(network))
    assert not same(other, model)  # it is independent
    assert type(revwire.revert(other)) is network


@works(STACK, "`torch.load(weights_only=True)` of a state dict, `mmap=True`, `assign=True`")
def test_loading_modes(tmp_path: Path) -> None:
    model, other = trained(Transformer), converted(Transformer, seed=1)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, mmap=True), assign=True)
    assert same(other, model)


@works(STACK, "training goes on from model and optimizer states, to the bit")
def test_resuming(tmp_path: Path) -> None:
    data = batches(Transformer, 4)
    model = converted(Transformer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, data[:2], optimizer=optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    straight = train(model, data[2:], optimizer=optimizer)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = converted(Transformer, seed=1)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    other.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(other, data[2:], optimizer=optimizer).assert_like(straight, recomputes=False)


@works("DataParallel", "training on two GPUs")
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_data_parallel_on_gpus() -> None:
    model, twin = converted(Transformer).cuda(), converted(Transformer).cuda()
    data = [(x.cuda(), labels.cuda()) for x, labels in batches(Transformer)]
    reversible = train(model, data, call=DataParallel(model))
    with revwire.stored_activations(twin):
        reversible.assert_like(train(twin, data, call=DataParallel(twin)))
