"""What a recompute reproduces: random state, autocast, buffers; and that a step leaves all of it as a plain step
does.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import revwire
from cases import Case, each_fast_case
from revwire import Bdia, Re2TAL
from revwire._forwards.converted import chains_of
from revwire._surroundings.buffers import Written, buffers_kept
from revwire._surroundings.randomness import preserved_random_state
from revwire._surroundings.surroundings import Surroundings
from revwire.testing import Step, check_gradients
from toys import WIDTH, Convolution, Dropped, Linear, Oracle, PreNorm, Toy, inputs_of, stored, toy


@each_fast_case
def test_each_step_draws_anew_and_leaves_the_generator_as_a_plain_step_does(case):
    model = toy(case, Dropped)
    x = inputs_of(model, case)
    torch.manual_seed(0)
    first, second = model(x), model(x)
    after_forward = torch.get_rng_state()
    (first + second).sum().backward()
    assert torch.equal(torch.get_rng_state(), after_forward)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    model.oracle(x)
    model.oracle(x)
    assert torch.equal(torch.get_rng_state(), after_forward)


def test_a_branch_that_draws_nothing_keeps_no_random_state():
    surroundings = Surroundings.capture([torch.zeros(3)])
    surroundings.settle()
    assert not surroundings.randomness


def test_random_state_is_kept_where_it_was_drawn_from():
    surroundings = Surroundings.capture([torch.zeros(3)])
    first = torch.rand(3)
    surroundings.settle()
    outside = torch.get_rng_state()
    with surroundings.restored():
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), outside)


def test_random_state_is_restored_after_an_exception():
    outside = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserved_random_state():
        torch.rand(3).div(1 / len([]))
    assert torch.equal(torch.get_rng_state(), outside)


@each_fast_case
@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
@pytest.mark.parametrize("branch", [Dropped, Convolution], ids=["dropped", "convolution"])
def test_autocast_of_the_forward_holds_in_the_recompute(case, inside, branch):
    """The normal use: forward inside of autocast, backward outside."""
    model = toy(case, branch)

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.model(x)

    def loss(out):
        if not inside:
            return out.square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return out.square().sum()

    check_gradients(
        Autocast(), inputs_of(model, case), loss, tolerance=0.05 if case.stored else 0.0, stored=lambda m: stored(model)
    )


@each_fast_case
def test_autocast_around_the_backward_alone_does_not_reach_the_recompute(case):
    model = toy(case)

    def loss(out):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.autograd.grad(out.sum(), list(model.parameters()), retain_graph=True)
        return out.sum()

    check_gradients(model, inputs_of(model, case), loss, tolerance=10 * case.stored, stored=stored)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coupling", [Re2TAL(), Bdia(1 / 16)], ids=lambda c: c.name)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "float"])
def test_narrow_parameters_with_wide_streams(dtype, coupling, exact):
    if not exact and coupling.error_growth > 1:
        pytest.skip("has no float inverse")
    case = Case(coupling, exact, dtype, 0.05, 0.05, "")
    model = toy(case, Linear)
    x = inputs_of(model, case)
    out = model(x)
    assert out.dtype == dtype
    step = check_gradients(model, x, tolerance=0.0 if exact else 0.05, stored=stored)
    step.assert_like(Step.of(Oracle(model), x), tolerance=0.05)  # the oracle keeps its streams in 16 bits


@each_fast_case
def test_a_branch_of_another_dtype_than_the_stream(case):
    class Half(Linear):
        def forward(self, x):
            return F.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16())

    model = toy(case, Half)
    assert model(inputs_of(model, case)).dtype == torch.float32
    check_gradients(model, inputs_of(model, case), tolerance=0.05 if case.stored else 0.0, stored=stored)


@each_fast_case
def test_batch_statistics_are_updated_once(case):
    model, plain = toy(case, Convolution), toy(case, Convolution)
    x = inputs_of(model, case)
    model(x).sum().backward()
    plain.oracle(x).sum().backward()
    for (name, got), true in zip(model.named_buffers(), plain.buffers(), strict=True):
        if name.endswith("num_batches_tracked"):
            assert int(got) == 1
        torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-6)


@each_fast_case
def test_buffers_stay_the_same_objects(case):
    model = toy(case, Convolution)
    before = dict(model.named_buffers())
    model(inputs_of(model, case)).sum().backward()
    assert all(b is before[n] for n, b in model.named_buffers())


def test_buffers_are_given_back_after_an_exception():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH))
    before = {n: (b, b.clone()) for n, b in model.named_buffers()}
    with pytest.raises(ZeroDivisionError), buffers_kept(model):
        model(torch.randn(3, WIDTH)).div(1 / len([]))
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])


@each_fast_case
def test_a_custom_counter_is_written_once(case):
    class Counting(PreNorm):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("mean", torch.zeros(WIDTH))

        def forward(self, x):
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))  # rebinds instead of writing
            return super().forward(x)

    model = Toy([Counting() for _ in range(4)], case)
    model(inputs_of(model, case)).sum().backward()
    assert all(int(b.calls) == 1 for b in model.branches)
    assert all(b.mean.abs().sum() > 0 for b in model.branches)


@each_fast_case
def test_default_dtype_does_not_matter(case):
    model = toy(case)
    x = inputs_of(model, case)
    true = Step.of(model, x, loss=lambda out: out.square().sum())
    torch.set_default_dtype(torch.float64)
    try:
        Step.of(model, x, loss=lambda out: out.square().sum()).assert_like(true)
    finally:
        torch.set_default_dtype(torch.float32)


# -- buffers that are read and written ---------------------------------------------------------------------------------


def copies_of(modules, *calls):
    """What is kept of the buffers of some modules in each of a few forwards, and whether copies were made for it."""
    out = []
    for call in calls:
        written = Written(modules)
        call()
        out.append((written.copies(), [copy is not None for _, _, buffers in written.before for *_, copy in buffers]))
    return out


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)], ids=["average", "cumulative"])
def test_no_copies_of_batch_statistics_are_kept_and_but_once_made(norm):
    x = torch.randn(2, 3, 4, 4)
    (first, made), (second, made_again) = copies_of([norm], lambda: norm(x), lambda: norm(x))
    assert not first
    assert not second
    assert all(made)
    assert not any(made_again)


def test_copies_of_buffers_that_a_forward_reads_and_writes_are_kept():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))
    power = layer.parametrizations.weight[0]
    before = power._u.clone()
    (first, _), (second, _), (still, _) = copies_of(
        [power], *[lambda: layer(torch.randn(2, 3))] * 2, lambda: layer.eval()(torch.randn(2, 3))
    )
    assert first.keys() == second.keys() == {(id(power), "_u"), (id(power), "_v")}
    assert torch.equal(first[id(power), "_u"], before)
    assert not torch.equal(first[id(power), "_u"], second[id(power), "_u"])
    assert not still


def test_a_buffer_that_is_replaced_needs_no_copy():
    module = nn.Module()
    module.register_buffer("average", torch.ones(2))
    before = module.average
    _, (kept, made) = copies_of([module], lambda: None, lambda: setattr(module, "average", before * 0.5))
    assert not any(made)
    assert kept == {(id(module), "average"): before}


class Reseeded(nn.Module):
    """Sets the generators back before each block, or keeps what a block draws to itself."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            if self.how == "seed":
                torch.manual_seed(5)
            with torch.random.fork_rng(devices=[]) if self.how == "fork" else nullcontext():
                x = block(x)
        return x


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.5))

    def forward(self, x):
        return x + self.branch(x)


@pytest.mark.parametrize("how", ["seed", "fork", None])
@pytest.mark.parametrize("mode", ["reversible", "checkpointed"])
def test_generators_may_be_set_back_between_units(how, mode):
    model, x = Reseeded(how), torch.randn(4, 8)
    revwire.convert(model, x)
    for chain in chains_of(model):
        chain.modes, chain.keeps_last = (mode,) * chain.length, False
    found = []
    for context in (nullcontext(), revwire.stored_activations(model)):
        torch.manual_seed(1)
        with context:
            grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        found.append([*grads, torch.get_rng_state()])
    assert all(map(torch.equal, *found))
