"""What holds references to parameters, or takes their place: optimizers, averages, clipping, parametrisations,
functional calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from networks import ConvolutionNet, Transformer
from table import refused, works
from torch import nn
from torch.nn.utils import parametrizations, parametrize, stateless
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
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
    revwire.convert(model, Transformer.example(), rewire="everywhere")
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


class Averaged(nn.Module):
    """Divides by an average of past maxima, which each forward replaces by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.ones(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * weight.detach().abs().amax() + 0.01 * self.calls
            self.calls += 1
        return weight / self.average


def with_own_buffers(model: nn.Module, how: str) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        if how == "parametrization":
            parametrizations.spectral_norm(block.mlp.up)
            parametrizations.spectral_norm(block.attention.out, n_power_iterations=2)
        elif how == "hook":
            nn.utils.spectral_norm(block.mlp.up)
        else:
            parametrize.register_parametrization(block.mlp.up, "weight", Averaged())
    return model


each_kind_of_own_buffers = pytest.mark.parametrize("how", ["parametrization", "hook", "replaced"])
SPECTRAL = "spectral norm in training mode (buffers that a branch reads and writes), before and after conversion"


def pair(
    make: Callable[[], nn.Module], after: Callable[[nn.Module], nn.Module] = lambda m: m
) -> tuple[nn.Module, nn.Module]:
    """The same converted model twice."""
    make.example = Transformer.example  # type: ignore[attr-defined]
    return after(converted(make)), after(converted(make))


@pytest.mark.parametrize("when", ["before", "after"])
@each_kind_of_own_buffers
@works(
    STACK,
    SPECTRAL,
    "copies of these buffers (not of batch statistics) are kept with each forward that waits for its backward",
)
def test_spectral_norm(how: str, when: str) -> None:
    hooked = partial(with_own_buffers, how=how)
    model, twin = pair(lambda: hooked(Transformer())) if when == "before" else pair(lambda: Transformer(), hooked)
    before = {n: b.clone() for n, b in model.named_buffers()}
    reversible = train(model, batches(Transformer))
    with revwire.stored_activations(twin):
        reversible.assert_like(train(twin, batches(Transformer)))
    assert before
    assert not any(torch.equal(b, before[n]) for n, b in model.named_buffers())


@each_kind_of_own_buffers
@works(
    STACK,
    SPECTRAL,
    "copies of these buffers (not of batch statistics) are kept with each forward that waits for its backward",
)
def test_spectral_norm_of_several_forwards(how: str) -> None:
    """As a discriminator is trained: two forwards, one backward; then the graph of one is used again, after a forward
    without gradients.
    """

    def run(model: nn.Module) -> list[torch.Tensor]:
        real, fake = (x for x, _ in batches(Transformer, 2))
        torch.manual_seed(0)
        (model(real).mean() - model(fake).mean()).backward()
        waiting = model(real).square().mean()
        with torch.no_grad():
            model(fake)
        waiting.backward(retain_graph=True)
        model(fake)
        waiting.backward()
        return [*(p.grad for p in model.parameters()), *model.buffers()]

    model, twin = pair(lambda: with_own_buffers(Transformer(), how))
    got = run(model)
    with revwire.stored_activations(twin):
        assert all(map(torch.equal, got, run(twin)))


def test_a_fault_in_a_branch_with_spectral_norm_is_still_found() -> None:
    model = with_own_buffers(converted(Transformer), "parametrization")
    loss = model(Transformer.example()).sum()
    model.blocks[0].mlp.up.parametrizations.weight.original.data.mul_(1.01)
    with pytest.raises(
        revwire.ReconstructionError, match=r"blocks\.0\.mlp .*(rebuilt input differs|computed other values)"
    ):
        loss.backward()


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
@works(STACK, "`functional_call` without gradients")
def test_functional_calls(call) -> None:
    model = converted(Transformer).eval()
    x = Transformer.example()
    weights = {n: p.detach() * 0.9 for n, p in model.named_parameters()}
    other = converted(Transformer).eval()
    other.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(call(model, weights, (x,)), other(x))


def other_weights(
    model: nn.Module, kind: str, factor: float = 0.9
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(leaves, weights and buffers that are made of them): tensors, parameters of another module, or computed from one
    tensor.
    """
    if kind == "computed":  # as by a hypernetwork, or by steps of an inner optimizer
        scale = torch.tensor(factor, requires_grad=True)
        return [scale], {n: p.detach() * scale for n, p in model.named_parameters()}
    weights = {n: (p.detach() * factor).requires_grad_() for n, p in model.named_parameters()}
    if kind == "parameters":
        weights = {n: nn.Parameter(w) for n, w in weights.items()}
    if kind == "some":  # the others stay
        weights = {n: w for n, w in weights.items() if "attention" in n}
    leaves = list(weights.values())
    return leaves, weights | {n: b * factor for n, b in model.named_buffers()}


FUNCTIONAL = (
    "`functional_call` with other weights (tensors, parameters of another module, computed ones) and buffers, and its "
    "backward"
)
each_kind_of_weights = pytest.mark.parametrize("kind", ["tensors", "parameters", "computed", "some"])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("network", [Transformer, ConvolutionNet])
@each_kind_of_weights
@each_functional_call
@pytest.mark.filterwarnings("ignore:.*functional_call. is deprecated:FutureWarning")
@works(STACK, FUNCTIONAL)
def test_backward_behind_a_functional_call(call, kind: str, network: type[nn.Module], mode: str) -> None:
    def run(model: nn.Module) -> list[torch.Tensor | None]:
        model.train(mode == "train")
        leaves, weights = other_weights(model, kind)
        torch.manual_seed(0)
        call(model, weights, (network.example(),)).square().sum().backward()
        return [*(t.grad for t in leaves), *(p.grad for p in model.parameters()), *model.buffers(), *weights.values()]

    model, twin = converted(network), converted(network)
    before = list(model.parameters())
    got = run(model)
    with revwire.stored_activations(twin):
        want = run(twin)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert got[0] is not None
    assert got[0].abs().sum() > 0
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    if kind in ("tensors", "parameters"):  # and as a model whose own weights these are
        assert all(p.grad is None for p in model.parameters())
        own = converted(network).train(mode == "train")
        own.load_state_dict({n: t * 0.9 if t.is_floating_point() else t for n, t in own.state_dict().items()})
        torch.manual_seed(0)
        own(network.example()).square().sum().backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(got, own.parameters(), strict=False))


@each_kind_of_weights
@works(STACK, FUNCTIONAL)
def test_functional_calls_in_any_order(kind: str) -> None:
    """Calls with several weights and with the model's own wait for their backwards, one of which runs inside of another
    call.
    """

    class Outer(nn.Module):
        def __init__(self, model: nn.Module, waiting: torch.Tensor) -> None:
            super().__init__()
            self.model, self.waiting = model, [waiting]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.model(x)
            self.waiting[0].backward(retain_graph=True)
            return out

    def run(model: nn.Module) -> list[torch.Tensor | None]:
        call, x = torch.func.functional_call, Transformer.example()
        (a, first), (b, second) = other_weights(model, kind), other_weights(model, kind, 1.1)
        torch.manual_seed(0)
        one, own, two, again = (f() for f in (
            lambda: call(model, first, (x,)).square().sum(), lambda: model(x).square().sum(),
            lambda: call(model, second, (x,)).sum(), lambda: call(model, first, (x,)).sum(),
        ))  # fmt: skip
        own.backward(retain_graph=True)
        (one + two).backward(retain_graph=True)
        third = other_weights(model, "tensors", 1.2)[1]
        call(Outer(model, own), {f"model.{n}": w for n, w in third.items()}, (x,)).sum().backward()
        again.backward()
        own.backward()
        return [t.grad for t in (*a, *b, *model.parameters())]

    model, twin = converted(Transformer), converted(Transformer)
    got = run(model)
    with revwire.stored_activations(twin):
        want = run(twin)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert all(t is not None for t in got)


@works(STACK, FUNCTIONAL)
def test_training_of_weights_outside_of_the_model() -> None:
    """Of a parametrised model, by an optimizer that never sees its own parameters."""

    def run(model: nn.Module) -> Run:
        parametrised(model, "weight norm")
        weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(weights.values(), lr=0.01)
        run = train(
            model,
            batches(Transformer),
            call=lambda x: torch.func.functional_call(model, weights, (x,)),
            optimizer=optimizer,
        )
        run.state = {n: w.detach().clone() for n, w in weights.items()}
        return run

    model, twin = converted(Transformer), converted(Transformer)
    reversible = run(model)
    with revwire.stored_activations(twin):
        reversible.assert_like(run(twin))


@pytest.mark.parametrize("kind", ["tensors", "parameters"])
@works(STACK, FUNCTIONAL)
def test_lent_weights_that_change_are_found(kind: str) -> None:
    model = converted(Transformer)
    weights = other_weights(model, kind)[1]
    loss = torch.func.functional_call(model, weights, (Transformer.example(),)).sum()
    with torch.no_grad():
        weights["blocks.1.mlp.up.weight"].add_(1e-9)
    with pytest.raises(revwire.ReconstructionError, match=r"blocks\.1\.mlp .*its weight .* was modified in place"):
        loss.backward()


def test_copies_of_a_model_are_lent_weights_too() -> None:
    model = copy.deepcopy(converted(Transformer))
    model(Transformer.example()).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    same = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    torch.manual_seed(0)
    torch.func.functional_call(model.eval(), same, (Transformer.example(),)).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin(Transformer.example()).sum().backward()
    assert all(torch.equal(p.grad, w.grad) for p, w in zip(twin.parameters(), same.values(), strict=True))


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@refused(
    STACK,
    "`functional_call` and its backward, where a branch has a `checkpoint` inside",
    "leave the checkpoint out: it would run again without these weights",
)
def test_a_checkpoint_behind_a_functional_call(reentrant: bool) -> None:
    def make() -> nn.Module:
        model = Transformer()
        for block in model.blocks:
            block.mlp = Checkpointed(block.mlp, reentrant)
        return model

    make.example = Transformer.example  # type: ignore[attr-defined]
    model = converted(make).eval()
    model(Transformer.example()).sum().backward()
    _, weights = other_weights(model, "tensors")
    loss = torch.func.functional_call(model, weights, (Transformer.example(),)).sum()
    with pytest.raises(
        revwire.ReconstructionError, match=r"a torch\.utils\.checkpoint inside of it would run again without them"
    ):
        loss.backward()


def test_parameters_that_take_the_place_of_ones_from_after_conversion_are_refused() -> None:
    """They look like a weight that was replaced between forward and backward; plain tensors do not."""
    model = converted(Transformer)
    up = model.blocks[1].mlp.up
    up.weight = nn.Parameter(up.weight.detach().clone())
    for kind in ("tensors", "parameters"):
        leaves, weights = other_weights(model, kind)
        loss = torch.func.functional_call(model, weights, (Transformer.example(),)).sum()
        with (
            nullcontext()
            if kind == "tensors"
            else pytest.raises(revwire.ReconstructionError, match=r"blocks\.1\.mlp .*weights")
        ):
            loss.backward()
        assert all(t.grad is not None for t in leaves) == (kind == "tensors")
    assert all(p.grad is None for p in model.parameters())


def test_a_buffer_that_is_written_after_a_while_is_found_and_then_followed() -> None:
    class Late(Averaged):
        writes = False

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            if self.writes:
                self.average.mul_(0.9)
            return weight / self.average

    model = converted(Transformer)
    for block in model.blocks:
        parametrize.register_parametrization(block.mlp.up, "weight", Late())
    x = Transformer.example()
    model(x).sum().backward()
    for block in model.blocks:
        block.mlp.up.parametrizations.weight[0].writes = True
    with pytest.raises(revwire.ReconstructionError, match=r"blocks\.\d\.mlp "):
        model(x).sum().backward()
    twin = copy.deepcopy(model)
    model.zero_grad()
    twin.zero_grad()
    for m in (model, twin):
        with revwire.stored_activations(m) if m is twin else nullcontext():
            torch.manual_seed(0)
            m(x).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
