"""Residual adds that are spelled otherwise, tensors from elsewhere that are added to a stream, and blocks of blocks."""

import pytest
import torch
from torch import nn

import revwire
from steps import assert_same_step, twin
from toys import X, stack

SUMS = {
    "minus": lambda self, x: x - self.f(x),
    "minus in place": lambda self, x: (x * 1.0).sub_(self.f(x)),
    "scaled addition": lambda self, x: torch.add(x, self.f(x), alpha=0.5),
    "scaled skip": lambda self, x: torch.add(self.f(x), x, alpha=0.5),
    "addcmul": lambda self, x: torch.addcmul(x, self.f(x), self.g.weight[0]),
    "addcmul with a value": lambda self, x: torch.addcmul(x, self.f(x), self.g.weight[0], value=0.3),
    "addcdiv": lambda self, x: torch.addcdiv(x, self.f(x), 2.0 + self.g.weight[0].abs()),
    "lerp": lambda self, x: torch.lerp(x, self.f(x), 0.25),
    "lerp by a tensor": lambda self, x: torch.lerp(x, self.f(x), self.g.weight[0].sigmoid()),
    "lerp backwards": lambda self, x: torch.lerp(self.f(x), x, 0.75),
    "stack": lambda self, x: torch.stack([x, self.f(x)]).sum(0),
    "stack of the branch first": lambda self, x: torch.stack([self.f(x), x], dim=-1).sum(-1),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_in_other_words_is_a_unit(name):
    model, reference = twin(stack(SUMS[name]))
    plan = revwire.report(model)
    assert [len(c.units) for c in plan.chains] == [3]
    assert plan.coverage == 1
    assert_same_step(model, reference, X)


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_in_other_words_is_rebuilt_to_the_bit(name):
    model = revwire.convert(stack(SUMS[name]).float(), X.float())
    check = revwire.verify(model, X.float())
    assert check.bit_exact
    assert check.gradient_error == 0


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x - x.mean(-1, keepdim=True),  # a part of a norm
        lambda self, x: x - x.mean(-1, keepdim=True).expand_as(x),
        lambda self, x: self.f(x) - x,  # the skip changes its sign
        lambda self, x: torch.addcmul(self.f(x), x, x),
    ],
)
def test_what_looks_alike_is_none(forward):
    plan = revwire.plan(stack(forward), X)
    assert not plan.chains
    assert not plan.skipped


class Embedded(nn.Module):
    """The embedding of a second input is added to the stream, between blocks or within their sums."""

    def __init__(self, forward):
        super().__init__()
        self.loop = forward
        self.embeddings = nn.ModuleList(nn.Linear(4, 8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(3))

    def forward(self, x, t):
        for e, f in zip(self.embeddings, self.layers, strict=True):
            x = self.loop(x, f, e(t)[:, None])
        return x


LOOPS = {
    "before the block": lambda x, f, e: (y := x + e) + f(y),
    "within the sum": lambda x, f, e: x + f(x) + e,
    "within the sum, in front": lambda x, f, e: e + (x + f(x)),
    "behind an activation": lambda x, f, e: torch.relu(x + f(x)) + e,
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_tensor_from_elsewhere_does_not_end_a_chain(name):
    torch.manual_seed(0)
    example = X, torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    model, reference = twin(Embedded(LOOPS[name]).double(), example)
    assert [len(c.units) for c in revwire.report(model).chains] == [3]
    assert_same_step(model, reference, *example)


def test_a_tensor_from_elsewhere_gets_its_gradient_from_every_unit():
    torch.manual_seed(0)
    t = torch.randn(2, 4)
    model = revwire.convert(Embedded(LOOPS["within the sum"]), (X.float(), t))
    check = revwire.verify(model, (X.float(), t))
    assert check.bit_exact
    assert check.gradient_error == 0


class Crowded(nn.Module):
    """So many tensors from elsewhere are added between two blocks."""

    def __init__(self, count):
        super().__init__()
        self.count = count
        self.first, self.second, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, t):
        x = x + self.first(x)
        for _ in range(self.count):
            x = x + self.other(t)
        return x + self.second(x)


@pytest.mark.parametrize(("count", "units"), [(1, 2), (40, 2), (600, 0)])
def test_many_tensors_from_elsewhere_are_looked_past_in_no_time(count, units):
    """Looking twice past each of them would not end, and looking past any number would nest too deep."""
    assert len(revwire.plan(Crowded(count), (torch.randn(2, 8), torch.randn(2, 8))).units) == units


class Inner(nn.Module):
    """A residual block, whose branch comes first."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, x):
        return self.f(x) * self.scale + x


class Outer(nn.Module):
    """A residual block of residual blocks."""

    def __init__(self, count=3, scale=0.2):
        super().__init__()
        self.inner, self.scale = nn.ModuleList(Inner(scale) for _ in range(count)), scale

    def forward(self, x):
        y = x
        for block in self.inner:
            y = block(y)
        return y * self.scale + x


def test_blocks_of_blocks_are_cut_where_that_keeps_least():
    torch.manual_seed(0)
    model, reference = twin(nn.Sequential(*(Outer() for _ in range(4))).double())
    plan = revwire.report(model)
    assert sum(len(c.units) for c in plan.chains) in (4, 12)  # the outer blocks, or the inner ones
    assert plan.coverage > 0.9  # the last sum of all has no unit behind it, so it is no part of one
    assert_same_step(model, reference, X)
    revwire.revert(model)
    check = revwire.verify(revwire.convert(model.float(), X.float()), X.float())
    assert check.bit_exact
    assert check.gradient_error == 0


def test_many_small_blocks_of_blocks_are_the_outer_ones():
    """A chain for each outer block would keep two states each, more than the activations of its inner blocks."""
    torch.manual_seed(0)

    class Thin(Inner):
        def __init__(self, scale):
            super().__init__(scale)
            self.f = nn.Linear(8, 8)

    def outer():
        block = Outer(2)
        block.inner = nn.ModuleList(Thin(0.2) for _ in range(2))
        return block

    plan = revwire.plan(nn.Sequential(*(outer() for _ in range(12))).double(), X)
    assert [len(c.units) for c in plan.chains] == [12]
    assert all(s.inside_unit for s in plan.skipped)


class FirstAgain(nn.Module):
    """Every block mixes the first state in."""

    def __init__(self, count=6):
        super().__init__()
        self.v = nn.Parameter(torch.full((count,), 0.1))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(count)
        )

    def forward(self, x):
        first = x
        for i, f in enumerate(self.layers):
            x = x + self.v[i] * first
            x = x + f(x)
        return x


def test_a_skip_from_the_first_state_makes_no_giant_unit():
    torch.manual_seed(0)
    model, reference = twin(FirstAgain().double())
    plan = revwire.report(model)
    assert [len(c.units) for c in plan.chains] == [6]
    assert all(s.inside_unit for s in plan.skipped)
    assert_same_step(model, reference, X)


class BranchFirst(nn.Module):
    """The branch of its sum comes first, and has views of sizes that the stream does not have."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8)

    def forward(self, x):
        batch, tokens, _ = x.shape
        heads = self.up(x).view(batch, tokens, 4, 8).transpose(1, 2).relu().transpose(1, 2)
        return self.norm(self.down(heads.reshape(batch, tokens, 32)) + 2.0 * x)


def test_views_of_other_sizes_in_a_branch_that_comes_first():
    torch.manual_seed(0)
    model, reference = twin(nn.Sequential(*(BranchFirst() for _ in range(3))).double())
    assert [len(c.units) for c in revwire.report(model).chains] == [3]
    assert_same_step(model, reference, X)
