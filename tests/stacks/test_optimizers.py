"""What holds references to parameters, or takes their place: optimizers, averages, clipping, parametrisations, functional calls."""

from __future__ import annotations

import pytest
import torch
from networks import ConvolutionNet, Transformer
from table import refused, works
from torch import nn
from torch.nn.utils import parametrizations, parametrize, stateless
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from training import Run, assert_trains_as_stored, batches, converted, train

import revwire

STACK = "Optimizers and weights"

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@works(STACK, "optimizers made before or after conversion")
def test_optimizers(name: str) -> None:
    def run(model: nn.Module) -> Run:
        return train(model, batches(Transformer), optimizer=OPTIMIZERS[name](model.parameters()))

    after = assert_trains_as_stored(Transformer, run)
    torch.manual_seed(0)
    model = Transformer()
    optimizer = OPTIMIZERS[name](model.parameters())
    revwire.convert(model, Transformer.example())
    train(model, batches(Transformer), optimizer=optimizer).assert_like(after, recomputes=False)


@works(STACK, "LBFGS: several forward and backward passes in one step")
def test_closures() -> None:
    def run(model: nn.Module) -> Run:
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        run = Run(evaluations=0)
        for x, labels in batches(Transformer):

            def closure(x=x, labels=labels) -> torch.Tensor:
                optimizer.zero_grad()
                torch.manual_seed(0)
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
                return loss

            run.losses.append(optimizer.step(closure).item())
        return run.finish(model)

    assert_trains_as_stored(Transformer, run, recomputes=False)


@works(STACK, "optimizer steps inside of backward (`register_post_accumulate_grad_hook`)")
def test_an_optimizer_step_in_backward() -> None:
    """The weights of a unit change while the units before it are still to be rebuilt, with weights of their own."""

    def run(model: nn.Module) -> Run:
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def step(_: torch.Tensor, optimizer=optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        return train(model, batches(Transformer))

    assert_trains_as_stored(Transformer, run)


@works(STACK, "exponential and stochastic weight averages (`swa_utils`)")
def test_averages() -> None:
    def run(model: nn.Module) -> Run:
        averages = [
            AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
            AveragedModel(model),
        ]
        x = ConvolutionNet.example()
        run = train(model, batches(ConvolutionNet), before_step=lambda: [a.update_parameters(model) for a in averages])
        update_bn([x], averages[1])
        for i, average in enumerate(averages):
            assert len(revwire.report(average.module).units) == 4  # a copy of a converted model is converted
            run.losses.append(average.eval()(x).sum().item())
            run.state |= {f"average {i}.{n}": t.clone() for n, t in average.module.state_dict().items()}
        return run

    model, twin = converted(ConvolutionNet), converted(ConvolutionNet)
    reversible = run(model)
    with revwire.stored_activations(twin):
        reversible.assert_like(run(twin))


@pytest.mark.parametrize("clip", [
    lambda p: nn.utils.clip_grad_norm_(p, 0.1),
    lambda p: nn.utils.clip_grad_norm_(p, 0.1, norm_type=float("inf"), foreach=True),
    lambda p: nn.utils.clip_grad_value_(p, 0.01),
], ids=["norm", "largest", "value"])  # fmt: skip
@works(STACK, "gradient clipping")
def test_clipping(clip) -> None:
    def run(model: nn.Module) -> Run:
        return train(model, batches(Transformer), before_step=lambda: clip(list(model.parameters())))

    clipped = assert_trains_as_stored(Transformer, run)
    assert clipped.losses[1:] != train(converted(Transformer), batches(Transformer)).losses[1:]


class Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).mT


def parametrised(model: nn.Module, how: str) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        if how == "parametrize":
            parametrize.register_parametrization(block.attention.out, "weight", Symmetric())
        elif how == "orthogonal":
            parametrizations.orthogonal(block.attention.out)
        else:
            parametrizations.weight_norm(block.mlp.up)
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["parametrize", "weight norm", "orthogonal"])
@works(STACK, "`parametrize`, weight norm, orthogonal weights; before and after conversion")
def test_parametrisations(how: str, when: str) -> None:
    def make() -> nn.Module:
        return parametrised(Transformer(), how) if when == "before" else Transformer()

    make.example = Transformer.example  # type: ignore[attr-defined]

    def run(model: nn.Module) -> Run:
        return train(model if when == "before" else parametrised(model, how), batches(Transformer))

    model, twin = converted(make), converted(make)
    reversible = run(model)
    with revwire.stored_activations(twin):
        reversible.assert_like(run(twin))


@refused(STACK, "spectral norm in training mode, in a branch", "it reads what it writes, so no recompute is the same; exclude the block")
def test_spectral_norm() -> None:
    model = converted(Transformer)
    parametrizations.spectral_norm(model.blocks[1].mlp.up)
    with pytest.raises(revwire.ReconstructionError, match=r"blocks\.1\.mlp .*exclude=\['blocks\.1\.mlp'\]"):
        train(model, batches(Transformer))
    revwire.convert(revwire.revert(model), Transformer.example(), exclude="blocks.1.mlp")
    run = train(model, batches(Transformer))
    assert run.evaluations > len(run.losses)


@works(STACK, "`parametrize.cached()` around a step")
def test_cached_parametrisations() -> None:
    def run(model: nn.Module) -> Run:
        parametrised(model, "parametrize")

        def call(x: torch.Tensor) -> torch.Tensor:
            with parametrize.cached():
                return model(x)

        return train(model, batches(Transformer), call=call)

    model, twin = converted(Transformer), converted(Transformer)
    reversible = run(model)
    with revwire.stored_activations(twin):
        reversible.assert_like(run(twin))


each_functional_call = pytest.mark.parametrize(
    "call", [torch.func.functional_call, stateless.functional_call], ids=["torch.func", "stateless"]
)


@each_functional_call
@pytest.mark.filterwarnings("ignore:.*functional_call. is deprecated:FutureWarning")
@works(STACK, "`functional_call` without gradients, or with stored activations")
def test_functional_calls(call) -> None:
    model = converted(Transformer).eval()
    x = Transformer.example()
    weights = {n: (p.detach() * 0.9).requires_grad_() for n, p in model.named_parameters()}
    other = converted(Transformer).eval()
    other.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(call(model, weights, (x,)), other(x))
    with revwire.stored_activations(model):
        got = torch.autograd.grad(call(model, weights, (x,)).sum(), list(weights.values()))
    for a, b in zip(got, torch.autograd.grad(other(x).sum(), list(other.parameters())), strict=True):
        assert torch.equal(a, b)


@each_functional_call
@pytest.mark.filterwarnings("ignore:.*functional_call. is deprecated:FutureWarning")
@refused(STACK, "backward behind a `functional_call` with other weights", "the weights have gone by then; use `revwire.stored_activations`")
def test_backward_behind_a_functional_call(call) -> None:
    model = converted(Transformer).eval()
    weights = {n: (p.detach() * 0.9).requires_grad_() for n, p in model.named_parameters()}
    loss = call(model, weights, (Transformer.example(),)).sum()
    with pytest.raises(revwire.ReconstructionError, match=r"weights, buffers or inputs changed .*revwire\.stored_activations\(model\)"):
        loss.backward()
