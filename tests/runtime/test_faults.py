"""Every way in which a recompute can go wrong is injected, and seen. None ends in a gradient that is silently wrong."""

from contextlib import nullcontext
from itertools import count

import pytest
import torch
from torch import nn

import revwire
from cases import CASES, FAST, each_exact_case, each_fast_case
from revwire import ReconstructionError
from steps import faulty, gradients_of
from toys import (
    SHAPE,
    WIDTH,
    Convolution,
    Dropped,
    Linear,
    PreNorm,
    Setting,
    Toy,
    Weightless,
    inputs_of,
    restless,
    stored,
    toy,
)

FLOAT = [c for c in FAST if not c.exact]


class Impostor(nn.Module):
    """Computes something a little different each time."""

    shape = SHAPE

    def __init__(self, amount):
        super().__init__()
        self.layer, self.amount, self.calls = nn.Linear(WIDTH, WIDTH), amount, count(1)

    def forward(self, x):
        return self.layer(torch.tanh(x)) * (1 + self.amount * next(self.calls))


@each_exact_case
@pytest.mark.parametrize("amount", [1e-6, 1e-2])
def test_other_bits_the_second_time(case, amount):
    model = toy(case, lambda: Impostor(amount))
    with faulty("(rebuilt input differs|computed other values)"):
        model(inputs_of(model, case)).sum().backward()


@pytest.mark.parametrize("case", FLOAT, ids=str)
def test_other_values_the_second_time_in_float_mode(case):
    model = toy(case, lambda: Impostor(1e-2))
    with faulty("(rebuilt input differs|computed other values)"):
        model(inputs_of(model, case)).sum().backward()


class Hidden(nn.Module):
    """A branch whose last layer is zero, as at the start of a zero-initialised network: its result hides what it
    computes.
    """

    shape = SHAPE

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h * (torch.rand(h.shape, generator=restless()) < 0.7))


@each_exact_case
def test_a_fault_that_a_zero_layer_hides(case):
    model = toy(case, Hidden)
    with faulty("computed other values"):
        model(inputs_of(model, case)).sum().backward()


class Private(Linear):
    """Drops elements with a generator whose state nobody can replay."""

    def forward(self, x):
        return super().forward(x) * (torch.rand(x.shape, generator=restless()) < 0.9)


@each_fast_case
def test_a_lost_random_state(case):
    model = toy(case, Private)
    with faulty("(rebuilt input differs|computed other values)"):
        model(inputs_of(model, case)).sum().backward()


@each_fast_case
def test_a_mode_that_changed_is_again_that_of_the_forward(case):
    model = toy(case, Dropped)
    x, state = inputs_of(model, case), torch.get_rng_state()
    true = gradients_of(model(x).sum(), model)
    torch.set_rng_state(state)
    out = model(x)
    model.eval()
    state = torch.get_rng_state()
    assert all(map(torch.equal, gradients_of(out.sum(), model), true))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in model.modules())


class Late(PreNorm):
    """Draws where it is told to."""

    draws = Setting(False)

    def forward(self, x):
        return super().forward(x) * torch.rand(()) if self.draws else super().forward(x)


@each_fast_case
def test_random_numbers_that_only_the_recompute_draws_leave_no_trace(case):
    model = toy(case, Late)
    out = model(inputs_of(model, case))
    model.branches[3].draws = True
    state = torch.get_rng_state()
    with pytest.raises(ReconstructionError):
        out.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@each_fast_case
@pytest.mark.parametrize("write", [lambda b: b.mul_(1.5), lambda b: b.data.mul_(1.5)], ids=["in-place", "data"])
def test_a_buffer_that_changed(case, write):
    model = toy(case, Convolution).eval()
    out = model(inputs_of(model, case))
    write(model.branches[3].norm.running_var)
    with faulty("(rebuilt input differs|computed other values)"):
        out.sum().backward()


def sgd(model):
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def adam(model):
    torch.optim.Adam(model.parameters(), foreach=True).step()


def load(model):
    model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items()})


@each_fast_case
@pytest.mark.parametrize("change", [sgd, adam, load])
def test_weights_that_changed(case, change):
    model = toy(case)
    x = inputs_of(model, case)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    out = model(x)
    change(model)
    with faulty(r"its weight '.*' was modified in place"):
        out.sum().backward()


@each_fast_case
@pytest.mark.parametrize("change", [
    lambda p: p.data.add_(0.1),
    lambda p: p.data.numpy().__iadd__(0.1),
    lambda p: setattr(p, "data", p.data + 0.1),
], ids=["data", "numpy", "rebound"])  # fmt: skip
def test_weights_that_changed_behind_the_back_of_autograd(case, change):
    model = toy(case, Linear)
    out = model(inputs_of(model, case))
    change(model.branches[3].weight)
    with faulty("(rebuilt input differs|computed other values)"):
        out.sum().backward()


@each_fast_case
def test_a_weight_that_was_replaced(case):
    model = toy(case, Linear)
    out = model(inputs_of(model, case))
    model.branches[3].weight = nn.Parameter(model.branches[3].weight.detach() + 0.1)
    with faulty("(rebuilt input differs|computed other values)"):
        out.sum().backward()


@each_fast_case
def test_a_weight_from_outside_of_the_branch(case):
    """It is found by being saved, though no module of the unit owns it."""
    outside = nn.Parameter(torch.eye(WIDTH))

    class Borrows(Weightless):
        def forward(self, x):
            return super().forward(x) @ outside.t()

    model = toy(case, Borrows)
    out = model(inputs_of(model, case))
    with torch.no_grad():
        outside.add_(1e-9)
    with faulty("its weight 'of the branch' was modified in place"):
        out.sum().backward()


@each_fast_case
def test_after_a_fault_the_model_goes_on(case):
    model = toy(case)
    x = inputs_of(model, case)
    true = gradients_of(model(x).sum(), model)
    out = model(x)
    with torch.no_grad():
        model.branches[3].up.weight.add_(0)
    with faulty("was modified in place"):
        out.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients_of(model(x).sum(), model), true, strict=True))


@each_fast_case
def test_a_branch_with_another_structure_the_second_time(case):
    calls = count()  # which is no state of a module

    class Grows(Weightless):
        def forward(self, x):
            return super().forward(x) if next(calls) < 3 else super().forward(x).sin().cos()

    model = Toy([Grows() for _ in range(3)], case)
    with faulty("its recompute saved"):
        model(inputs_of(model, case)).sum().backward()


class WritesToItsGradient(torch.autograd.Function):
    """tanh, whose backward saves memory in a way that PyTorch forbids."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.mul_(1 - y * y)


class Rude(nn.Module):
    shape = SHAPE

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return WritesToItsGradient.apply(self.layer(x))


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.float32], ids=str)
@pytest.mark.parametrize("stores", [False, True])
def test_a_branch_that_writes_to_the_gradient_it_is_given(case, stores):
    """That of x_{k-1} is made of it; where it is not (b < 0), the gradients are right."""
    model = toy(case, Rude)
    with stored(model) if stores else nullcontext():
        loss = model(inputs_of(model, case)).square().sum()
        if case.coupling.coefficients.b > 0:
            with faulty("wrote to the gradient that it was given"):
                loss.backward()
        else:
            loss.backward()
            mine = [p.grad for p in model.parameters()]
            model.zero_grad()
            model.oracle(inputs_of(model, case)).square().sum().backward()
            for a, b in zip(mine, model.parameters(), strict=True):
                torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("coupling", ["re2tal", "bdia"])
def test_a_chunk_that_writes_to_the_gradient_it_is_given(coupling):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = Rude()

        def forward(self, x):
            return x + self.f(x)

    x = torch.randn(4, 3, WIDTH)
    model = revwire.convert(nn.Sequential(*(Block() for _ in range(3))), x, coupling=coupling, chunks=2)
    assert {u.chunks for u in revwire.report(model).units} == {2}
    with pytest.raises(ReconstructionError, match="wrote to the gradient that it was given"):
        model(x).square().sum().backward()
