"""What composes with checkpointing composes with revwire: checkpoints inside and around, offloading, functions, nested
chains.
"""

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from cases import each_fast_case
from revwire import ReconstructionError
from revwire._runtime import run as runner
from revwire.testing import Step, check_gradients
from toys import SHAPE, WIDTH, Convolution, Dropped, PreNorm, Toy, inputs_of, stored, toy


class Wrapped(nn.Module):
    """A model behind a function of (model, x)."""

    def __init__(self, model, function):
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, x):
        return self.function(self.model, x)


def check_wrapped(model, case, function):
    check_gradients(
        Wrapped(model, function), inputs_of(model, case), tolerance=10 * case.stored, stored=lambda m: stored(model)
    )


@each_fast_case
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("branch", [Dropped, Convolution], ids=["dropped", "convolution"])
def test_a_checkpoint_around_a_chain(case, reentrant, branch):
    model = toy(case, branch, depth=4)
    model.tail = nn.Linear(model.branches[0].shape[-1], 3)
    if branch is Convolution:
        model.eval()  # a checkpoint of its own writes batch statistics twice
    check_wrapped(model, case, lambda m, x: checkpoint(lambda x: m.tail(m(x.sin())), x, use_reentrant=reentrant))


@each_fast_case
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_a_branch(case, reentrant):
    class Checkpointed(Dropped):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant).tanh()

    model = toy(case, Checkpointed)
    check_wrapped(model, case, lambda m, x: m(x))


@each_fast_case
def test_a_checkpoint_around_each_block_saves_nothing_more(case):
    """Non-reentrant: the chain goes on through the checkpoints, and none of them is ever recomputed."""

    def function(model, x):
        for unit, branch in zip(model.units, model.branches, strict=True):
            x = checkpoint(
                lambda x, unit=unit, branch=branch: runner.apply(model.chain, unit, branch, x)[0],
                x,
                use_reentrant=False,
            )
        return x

    model = toy(case, Dropped)
    x = inputs_of(model, case)
    got = Step.of(Wrapped(model, function), x)
    with stored(model):
        got.assert_like(Step.of(Wrapped(model, lambda m, x: m(x)), x), tolerance=10 * case.stored)


@each_fast_case
def test_a_checkpoint_around_a_part_of_a_chain_that_must_recompute_it_is_refused(case):
    """Non-reentrant: those that are reentrant have chains of their own."""
    model = toy(case)
    x = inputs_of(model, case)
    chain = model.chain

    def part(x):  # begins in the middle of the chain, and holds something that saves a tensor
        return runner.apply(chain, model.units[1], model.branches[1], x)[0].exp().sin()

    out = checkpoint(part, runner.apply(chain, model.units[0], model.branches[0], x)[0], use_reentrant=False)
    with pytest.raises(
        ReconstructionError, match=r"branches\.1 .*part of the chain inside of torch\.utils\.checkpoint"
    ):
        out.sum().backward()


@each_fast_case
def test_saving_on_the_cpu_around_a_chain(case):
    def function(model, x):
        with save_on_cpu():
            return model(x).sin()

    check_wrapped(toy(case), case, function)


@each_fast_case
def test_saving_on_the_cpu_inside_a_branch(case):
    class Offloaded(PreNorm):
        def forward(self, x):
            with save_on_cpu():
                h = self.norm(x).sin()
            return super().forward(h)

    check_wrapped(toy(case, Offloaded), case, lambda m, x: m(x))


class Cube(torch.autograd.Function):
    """Reads its saved tensors twice, once with gradients enabled, and runs a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return w * x**3

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        with torch.enable_grad():
            again, _ = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            (slope,) = torch.autograd.grad((again**3).sum(), again)
        return g * w * slope, (g * x**3).sum((0, 1))


@each_fast_case
def test_a_custom_function_that_reads_its_saved_tensors_twice(case):
    class Custom(nn.Module):
        shape = SHAPE

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(WIDTH))

        def forward(self, x):
            return Cube.apply(torch.tanh(x), self.weight).cos()

    check_wrapped(toy(case, Custom), case, lambda m, x: m(x))


@each_fast_case
def test_a_chain_inside_of_a_branch(case):
    class Nested(nn.Module):
        shape = SHAPE

        def __init__(self):
            super().__init__()
            self.inner = Toy([Dropped() for _ in range(3)], case)

        def forward(self, x):
            return 0.3 * self.inner(x)

    model = toy(case, Nested, depth=3)

    def all_stored(_):
        for branch in model.branches:
            branch.inner.chain.stored = True
        return stored(model)

    x = inputs_of(model, case)
    check_gradients(model, x, tolerance=10 * case.stored, stored=all_stored)


@each_fast_case
@pytest.mark.parametrize("harmless", [True, False])
def test_a_write_inside_of_a_branch_to_a_tensor_that_its_graph_saved(case, harmless):
    class Writes(nn.Module):
        shape = SHAPE

        def forward(self, x):
            y = x.sigmoid()  # saves its result
            z = y + 1 if harmless else y
            return z.mul_(0.5)

    model = toy(case, Writes)
    if harmless:
        return check_wrapped(model, case, lambda m, x: m(x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), stored(model):
        model(inputs_of(model, case)).sum().backward()
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        model(inputs_of(model, case)).sum().backward()
    return None


@each_fast_case
def test_hooks_on_modules_of_a_branch(case):
    """A hook that changes the branch's result is a part of the branch; full backward hooks see what they see
    otherwise.
    """
    model = toy(case)
    x = inputs_of(model, case)
    seen = []
    model.branches[2].norm.register_forward_hook(lambda m, i, o: o * 1.5)
    model.branches[3].up.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
    check_gradients(model, x, tolerance=10 * case.stored, stored=stored)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=10 * case.stored)


@each_fast_case
def test_functional_call_with_other_tensors_of_the_same_values(case):
    model = toy(case)
    x = inputs_of(model, case)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    torch.func.functional_call(model, weights, x).square().sum().backward()
    with stored(model):
        true = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for got, expected in zip(weights.values(), true, strict=True):
        torch.testing.assert_close(got.grad, expected, rtol=0, atol=10 * case.stored * float(expected.abs().amax()))
