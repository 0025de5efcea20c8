"""timm's training utilities on converted models of its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from table import works
from torch import nn
from training import Run

import revwire

timm = pytest.importorskip("timm", reason="needs timm")
from timm.optim import create_optimizer_v2, param_groups_layer_decay  # noqa: E402  behind the skip
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad  # noqa: E402

STACK = "timm"
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


def vit(**options: float) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=4, embed_dim=32, num_heads=2, num_classes=5, **options
    ).train()  # fmt: skip


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "resnet18", num_classes=5, layers=(3, 1, 1, 1), channels=(8, 16, 16, 16), stem_width=8
    ).train()


def converted(make) -> nn.Module:
    return revwire.convert(make(), X, rewire="everywhere")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, after=lambda: None) -> Run:
    run = Run()
    torch.manual_seed(1)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(X), LABELS)
        loss.backward()
        dispatch_clip_grad(model.parameters(), 0.1, mode="agc")
        optimizer.step()
        optimizer.zero_grad()
        after()
        run.losses.append(loss.item())
    return run.finish(model)


def assert_as_stored(make, run) -> None:
    model, twin = converted(make), converted(make)
    reversible = run(model)
    with revwire.stored_activations(twin):
        reversible.assert_like(run(twin), recomputes=False)


@works(STACK, "layer-wise learning-rate decay (`create_optimizer_v2(layer_decay=)`), schedulers, adaptive clipping")
@pytest.mark.parametrize("make", [partial(vit, drop_path_rate=0.1), resnet], ids=["vit", "resnet"])
def test_layer_decay(make) -> None:
    def run(model: nn.Module) -> Run:
        optimizer = create_optimizer_v2(model, opt="adamw", lr=0.01, weight_decay=0.05, layer_decay=0.5)
        scheduler = CosineLRScheduler(optimizer, t_initial=3)
        steps = iter(range(1, 9))
        return train(model, optimizer, after=lambda: scheduler.step(next(steps)))

    assert_as_stored(make, run)
    names = [[sorted(g["param_names"]) for g in _groups(m)] for m in (make(), converted(make))]
    assert names[0] == names[1]


def _groups(model: nn.Module) -> list[dict]:
    by_id = {id(p): n for n, p in model.named_parameters()}
    return [
        {**g, "param_names": [by_id[id(p)] for p in g["params"]]}
        for g in param_groups_layer_decay(model, layer_decay=0.5)
    ]


@works(STACK, "`ModelEmaV3`, `NativeScaler`")
def test_averages_and_scaler() -> None:
    def run(model: nn.Module) -> Run:
        average, scaler = ModelEmaV3(model, decay=0.9), NativeScaler("cpu")
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1)
        run = Run()
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(X), LABELS)
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            optimizer.zero_grad()
            average.update(model)
            run.losses.append(loss.item())
        run.finish(model)
        run.losses.append(average.module.eval()(X).sum().item())
        return run

    assert_as_stored(vit, run)


@works(STACK, "`set_grad_checkpointing`, before and after conversion", "a chain saves nothing to checkpoint")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", [vit, resnet])
def test_the_models_own_checkpointing(make, when: str) -> None:
    """As the twin with stored activations, which cannot be checkpointed from the middle of a chain."""

    def run(model: nn.Module) -> Run:
        return train(model, create_optimizer_v2(model, opt="sgd", lr=0.1))

    model, twin = make(), converted(make)
    if when == "before":
        model.set_grad_checkpointing(True)
    revwire.convert(model, X, rewire="everywhere")
    if when == "after":
        model.set_grad_checkpointing(True)
    for m in (*model.modules(), *twin.modules()):
        m.train(
            not isinstance(m, nn.BatchNorm2d)
        )  # what is not in a chain is recomputed, and a checkpoint writes statistics twice
    reversible = run(model)
    with revwire.stored_activations(twin):
        reversible.assert_like(run(twin), recomputes=False)


@works(STACK, "`forward_intermediates`, `forward_features`, `reset_classifier`, `group_matcher` of a converted model")
def test_methods_of_the_model() -> None:
    model, original = converted(vit).eval(), vit().eval()
    final, taps = model.forward_intermediates(X, indices=[1, 3])
    assert [t.shape for t in taps] == [t.shape for t in original.forward_intermediates(X, indices=[1, 3])[1]]
    assert torch.equal(final, model.forward_features(X))
    model.reset_classifier(7)
    assert model(X).shape == (4, 7)
    assert model.group_matcher() == original.group_matcher()
