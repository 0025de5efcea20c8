"""Backward passes of every shape: retained, repeated, partial, interrupted, several at once."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from cases import each_fast_case
from revwire import ReconstructionError, UnsupportedTransformError
from revwire._runtime import run as runner
from revwire.testing import Step, check_gradients
from steps import gradients_of
from toys import Attention, Convolution, Dropped, PreNorm, Weightless, attention_extras, inputs_of, stored, toy


def assert_same(got, true, case):
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * case.stored * float(b.abs().amax()))


def stored_gradients(model, x, loss):
    with stored(model):
        return gradients_of(loss(model(x)), model, x)


@each_fast_case
def test_autograd_grad(case):
    model = toy(case)
    x = inputs_of(model, case)
    assert_same(
        gradients_of(model(x).square().sum(), model, x), stored_gradients(model, x, lambda y: y.square().sum()), case
    )


@each_fast_case
def test_autograd_grad_for_some_of_the_inputs(case):
    model = toy(case)
    x = inputs_of(model, case)
    some = [model.branches[5].down.weight, model.branches[2].norm.bias]
    got = torch.autograd.grad(model(x).sum(), some)
    with stored(model):
        assert_same(got, torch.autograd.grad(model(x).sum(), some), case)


@each_fast_case
@pytest.mark.parametrize("branch", [PreNorm, Convolution], ids=["pre-norm", "convolution"])
def test_a_retained_graph_can_be_walked_again(case, branch):
    model = toy(case, branch)
    x = inputs_of(model, case)
    out = model(x)
    first = gradients_of(out.sum(), model, x, retain_graph=True)
    second = gradients_of(out.square().sum(), model, x, retain_graph=True)
    third = gradients_of(out.sum(), model, x)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert_same(second, stored_gradients(model, x, lambda y: y.square().sum()), case)


@each_fast_case
def test_a_second_backward_without_retain_graph_is_refused(case):
    model = toy(case)
    out = model(inputs_of(model, case))
    out.sum().backward()
    with pytest.raises(RuntimeError, match=r"retain_graph=True"):  # PyTorch's own, where its graph notices first
        out.sum().backward()


@each_fast_case
def test_a_second_backward_that_only_the_chain_can_refuse(case):
    model = toy(case, Weightless)
    x = inputs_of(model, case)
    out = x
    for unit, branch in zip(model.units[:5], model.branches, strict=False):
        out, _ = runner.apply(model.chain, unit, branch, out)
    out.sum().backward()
    with pytest.raises(ReconstructionError, match=r"chain 0: got a (second )?backward .*retain_graph=True"):
        out.sum().backward()


@each_fast_case
def test_several_forwards_before_any_backward(case):
    model = toy(case, Convolution)
    first, second = inputs_of(model, case, seed=1), inputs_of(model, case, seed=2)
    true = [stored_gradients(model, x, torch.sum) for x in (first, second)]
    a, b = model(first), model(second)
    assert_same(gradients_of(a.sum(), model, first), true[0], case)
    assert_same(gradients_of(b.sum(), model, second), true[1], case)


@each_fast_case
def test_accumulation(case):
    model = toy(case, Dropped)
    x = inputs_of(model, case)
    grads = []
    for mode in (lambda: stored(model), nullcontext):
        model.zero_grad()
        torch.manual_seed(0)
        with mode():
            for _ in range(3):
                model(x).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert_same(grads[1], grads[0], case)


@each_fast_case
def test_two_chains_of_the_same_model_in_one_loss(case):
    model = toy(case)
    x = inputs_of(model, case)
    check_gradients(Twice(model), x, tolerance=10 * case.stored, stored=lambda m: stored(model))


class Twice(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(self.model(x)) * self.model(2 * x)


@each_fast_case
def test_what_one_pass_did_not_reach_is_left_to_the_next(case):
    """As in plain PyTorch: without retain_graph, only what was walked over is freed."""
    model = toy(case)
    x = inputs_of(model, case)
    taps, out = [], x
    for unit, branch in zip(model.units, model.branches, strict=True):
        out, _ = runner.apply(model.chain, unit, branch, out)
        taps.append(out)
    upper = torch.autograd.grad(out.sum(), [taps[3], model.branches[6].up.weight])
    lower = torch.autograd.grad(taps[2], x, torch.ones_like(x))
    with stored(model):
        taps, out = [], x
        for unit, branch in zip(model.units, model.branches, strict=True):
            out, _ = runner.apply(model.chain, unit, branch, out)
            taps.append(out)
        assert_same(
            upper, torch.autograd.grad(out.sum(), [taps[3], model.branches[6].up.weight], retain_graph=True), case
        )
        assert_same(lower, torch.autograd.grad(taps[2], x, torch.ones_like(x)), case)


@each_fast_case
def test_a_gradient_at_the_input_of_the_chain_only_once(case):
    """Hooks on parameters and on tensors run as often, and see the same, as with stored activations."""
    model = toy(case)
    x = inputs_of(model, case)
    calls = []
    handles = [p.register_hook(lambda g: calls.append(g.clone())) for p in model.parameters()]
    model(x).sum().backward()
    mine, calls[:] = list(calls), []
    with stored(model):
        model(x).sum().backward()
    for handle in handles:
        handle.remove()
    assert_same(mine, calls, case)


@each_fast_case
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_half_way_leaves_nothing_changed(case, when):
    model = toy(case, Convolution)
    x = inputs_of(model, case)
    buffers = dict(model.named_buffers())
    failing = Failing(model.branches[4].norm)
    true = Step.of(model, x)
    out = None
    if when == "backward":
        out = model(x)
    before = torch.get_rng_state(), torch.is_grad_enabled(), {n: b.clone() for n, b in buffers.items()}
    with failing, pytest.raises(ZeroDivisionError):
        (model(x) if out is None else out).sum().backward()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.is_grad_enabled() == before[1]
    assert all(b is buffers[n] for n, b in model.named_buffers())
    if when == "backward":
        assert all(torch.equal(b, before[2][n]) for n, b in model.named_buffers())
    y = torch.zeros(3, requires_grad=True).exp()
    assert torch.equal(y.grad_fn._saved_result, y), "a hook on saved tensors was left active"
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(0 if not name.endswith("var") else 1)
    model.zero_grad()
    Step.of(model, x).assert_like(true)


class Failing:
    """Makes a module's forward raise, after it ran; by its class, which no recompute puts back."""

    def __init__(self, module):
        self.module, self.kind = module, type(module)

    def __enter__(self):
        kind = self.kind

        class Fails(kind):
            def forward(self, *args):
                return kind.forward(self, *args) / (1 // 0)

        self.module.__class__ = Fails

    def __exit__(self, *_):
        self.module.__class__ = self.kind


@each_fast_case
def test_after_a_failed_backward_a_second_is_refused_or_right(case):
    model = toy(case)
    x = inputs_of(model, case)
    out = model(x)
    with Failing(model.branches[4].norm), pytest.raises(ZeroDivisionError):
        out.sum().backward(retain_graph=True)
    assert_same(gradients_of(out.sum(), model, x, retain_graph=True), stored_gradients(model, x, torch.sum), case)
    with Failing(model.branches[4].norm), pytest.raises(ZeroDivisionError):
        out.sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        out.sum().backward()


@each_fast_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_around_a_backward_does_not_matter(case, mode):
    model = toy(case, Dropped)
    x = inputs_of(model, case)
    torch.manual_seed(0)
    true = gradients_of(model(x).sum(), model, x)
    torch.manual_seed(0)
    loss = model(x).sum()
    with mode():
        got = gradients_of(loss, model, x)
    assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


@each_fast_case
@pytest.mark.parametrize("vectorize", [True, False])
def test_jacobians(case, vectorize):
    """Many gradients at once: one recompute serves a batch of them."""
    model = toy(case)
    x = inputs_of(model, case).detach()

    def jacobian():
        return torch.autograd.functional.jacobian(lambda x: model(x)[0, 0, :3], x, vectorize=vectorize)

    with stored(model):
        true = jacobian()
    assert_same([jacobian()], [true], case)


@each_fast_case
def test_double_backward_is_refused(case):
    model = toy(case)
    x = inputs_of(model, case)
    with pytest.raises(UnsupportedTransformError, match=r"create_graph=True.*stored_activations"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@each_fast_case
def test_double_backward_with_stored_activations_is_that_of_the_oracle(case):
    model = toy(case)
    x = inputs_of(model, case)

    def penalty(out):
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    with stored(model):
        torch.testing.assert_close(penalty(model(x)), penalty(model.oracle(x)), rtol=1e-4, atol=1e-4)


@each_fast_case
def test_a_graph_that_is_looked_at_by_hand(case):
    """``grad_fn._saved_*`` outside of a backward pass shows the right tensor, and changes nothing."""
    seen = []

    class Seen(Weightless):
        def forward(self, x):
            y = torch.sin(x)
            seen.append((y.grad_fn, x.detach().clone()))
            return y / 3

    model = toy(case, Seen)
    x = inputs_of(model, case)
    out = model(x)
    node, true = seen[3]
    torch.testing.assert_close(node._saved_self, true, rtol=0, atol=1e-5 if case.stored else 0)
    assert_same(gradients_of(out.sum(), model, x), stored_gradients(model, x, torch.sum), case)


@each_fast_case
def test_a_side_output_before_and_after_the_main_one(case):
    model = toy(case, Attention)
    x, extras = inputs_of(model, case), attention_extras()
    out, first = model(x, *extras)[:2]
    got = gradients_of(first.square().sum(), model, x, retain_graph=True, allow_unused=True)
    gradients_of(out.sum(), model, x)
    with stored(model):
        true = gradients_of(model(x, *extras)[1].square().sum(), model, x, allow_unused=True)
    assert [g is None for g in got] == [g is None for g in true]
    assert_same([g for g in got if g is not None], [g for g in true if g is not None], case)
