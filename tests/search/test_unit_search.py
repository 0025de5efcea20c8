"""The search: what is a unit, what joins a chain, and the reason of everything else."""

import pytest
import torch
from torch import nn

import revwire
from steps import assert_same_step, twin
from toys import Loop, Residual, X, block, noise, pre_norm, stack


def plan(model, example=X, **options):
    return revwire.plan(model, example, **options)


def patterns(model, example=X):
    return [u.pattern for c in plan(model, example).chains for u in c.units]


FORWARDS = {
    "residual": lambda self, x: x + self.f(x),
    "post-activation": lambda self, x: torch.relu(x + self.f(x)),
    "block": lambda self, x: nn.functional.layer_norm(x + self.f(x), (8,)),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_patterns_are_named_by_dataflow(name):
    assert patterns(stack(FORWARDS[name])) == [name] * 3


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.f(x) + x,
        lambda self, x: torch.add(x, self.f(x)),
        lambda self, x: x.add(self.f(x)),
        lambda self, x: self.f(x).add_(x),
        lambda self, x: x + self.f(x) * self.g.weight[0],
        lambda self, x: x + self.drop(self.f(x.reshape(-1, 4, 2).transpose(1, 2).reshape(x.shape))),
        lambda self, x: x + nn.functional.linear(x, self.f.weight),
        lambda self, x: x * 0.5 + self.f(x),
        lambda self, x: x + self.f(x) + self.g(x),
        lambda self, x: x + (self.f(x) + self.g(self.f(x))),
    ],
)
def test_spellings_of_a_unit(forward):
    found = plan(stack(forward))
    assert len(found.units) == 3
    assert found.coverage == 1


def test_two_units_in_one_host():
    found = plan(stack(lambda self, x: (y := x + self.f(x)) + self.g(y)))
    assert [u.path for u in found.units] == [f"blocks.{i}.{n}" for i in range(3) for n in "fg"]
    assert len(found.chains) == 1


def test_views_between_units_do_not_end_a_chain():
    def forward(self, x):
        y = x.transpose(0, 1)
        return (y + self.f(y)).transpose(0, 1)

    assert len(plan(stack(forward)).chains) == 1


def test_residuals_inside_a_branch_stay_in_it():
    found = plan(stack(lambda self, x: x + self.g((h := self.f(x)) + self.f(h))))
    assert len(found.units) == 3
    assert {s.inside_unit for s in found.skipped} == {True}
    assert found.coverage == 1


def test_a_change_of_shape_ends_a_chain():
    model = nn.Sequential(
        *stack(pre_norm, depth=2).blocks, nn.Linear(8, 16), nn.Linear(16, 8), *stack(pre_norm, depth=2).blocks
    ).double()
    assert [len(c.units) for c in plan(model).chains] == [2, 2]


def test_a_lone_unit_is_no_chain():
    found = plan(stack(pre_norm, depth=1))
    assert not found.chains
    assert "stands alone" in found.skipped[0].reason


def test_a_projection_shortcut_is_reported_and_not_counted():
    found = plan(stack(lambda self, x: self.g(x) + self.f(x)))
    assert "a projection shortcut" in found.skipped[0].reason
    assert found.skipped[0].computed_shortcut
    assert found.coverage == 0


def test_a_broadcast_shortcut_is_refused():
    found = plan(stack(lambda self, x: x[:, :1] + self.f(x), depth=1))
    assert not found.chains


def test_an_operand_from_nowhere_is_reported():
    class Held:
        def __init__(self, t):
            self.tensor = t

    found = plan(stack(lambda self, x, held: x + self.f(held.tensor)), (X, Held(X * 2)))
    assert {s.reason for s in found.skipped} == {
        "one operand comes from a tensor that was made by a call that cannot be seen, or that an object holds; hand it "
        "to the module as an argument, as a tensor; checkpoint='stays' recomputes its block"
    }


def test_additions_of_numbers_are_no_residuals():
    found = plan(Loop(block(lambda self, x: self.f(x) + 1.0)).double())
    assert not found.chains
    assert not found.skipped


def test_integer_and_complex_sums_are_refused():
    found = plan(
        stack(
            lambda self, x: torch.view_as_real((c := torch.view_as_complex(self.f(x).view(2, 5, 4, 2))) + c.sin()).view(
                2, 5, 8
            )
        )
    )
    assert all("not floating point" in s.reason for s in found.skipped)
    assert len(found.skipped) == 3


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 4),
        ({"include": "blocks.1*"}, 0),
        ({"include": ["blocks.1*", "blocks.2*"]}, 2),
        ({"exclude": "blocks.3*"}, 3),
        ({"exclude": "*"}, 0),
    ],
)
def test_include_and_exclude(options, count):
    found = plan(stack(pre_norm, depth=4), **options)
    assert len(found.units) == count
    assert len(found.units) + len(found.skipped) == 4


class OverThere(nn.Module):
    """A residual block whose skip, norm and layout are what each test makes of them."""

    def __init__(self, forward):
        super().__init__()
        self.f = nn.Linear(8, 8)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def spelled_norm(self, x):
    x = x + self.f(x).tanh()
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)


def norm_of_a_transpose(self, x):
    return nn.functional.layer_norm((x + self.f(x).tanh()).transpose(1, 2), (5,)).transpose(1, 2)


@pytest.mark.parametrize(
    "forward",
    [spelled_norm, norm_of_a_transpose, lambda self, x: (y := x + self.f(x)) * torch.sigmoid(y.mean(1, keepdim=True))],
    ids=["norm in many calls", "norm of another layout", "gate"],
)
def test_what_follows_the_sum_may_take_several_calls(forward):
    model, reference = twin(stack(forward))
    assert [u.pattern for u in revwire.report(model).units] == ["block"] * 3
    assert_same_step(model, reference, X)
    assert_same_step(model, reference, noise(3, 5, 8))
    model = revwire.revert(model)
    assert revwire.verify(revwire.convert(model, X, coupling="bdia:1/2"), X).bit_exact


def test_a_unit_ends_where_its_skip_has_the_layout_of_its_fork():
    def forward(self, x):
        return nn.functional.layer_norm((x + self.f(x).tanh()).transpose(1, 2), (8,)).transpose(1, 2)

    example = noise(2, 8, 8)  # square: the shapes alone would let the unit end before the transpose back
    model, reference = twin(stack(forward), example)
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, example)
    model = revwire.revert(model)
    exact = revwire.convert(model, example, coupling="bdia:1/16")
    near = (exact(example)[0] - reference(example)[0]).norm() / reference(example)[0].norm()
    assert near < 0.1


def gate_of_a_viewed_mean(self, x):
    y = x * 0.9 + self.f(x).tanh()
    return y.transpose(1, 2).contiguous().transpose(1, 2) * torch.sigmoid(y.mean((0, 1)).view(8))


def view_of_a_layout(self, x):
    """The view is one of the example, whose channels lie last, and would be none of a tensor laid out by its shape."""
    y = x * 0.9 + self.f(x.transpose(1, 2)).transpose(1, 2).tanh()
    return nn.functional.layer_norm(y.transpose(1, 2).view(-1, 8), (8,)).view(2, 5, 8).transpose(1, 2)


@pytest.mark.parametrize(
    ("forward", "example"),
    [(gate_of_a_viewed_mean, X), (view_of_a_layout, X.transpose(1, 2))],
    ids=["of a part", "of another layout"],
)
def test_views_that_do_not_fit_the_numbers_of_the_elements(forward, example):
    model, reference = twin(stack(forward), example)
    assert [u.pattern for u in revwire.report(model).units] == ["block"] * 3
    assert_same_step(model, reference, example)


def test_what_follows_the_sum_may_lie_outside_of_its_module():
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(OverThere(lambda self, x: x + self.f(x).tanh()), nn.LayerNorm(8), nn.Tanh()) for _ in range(3)
    ]
    model, reference = twin(nn.Sequential(*blocks).double())
    assert [u.host for u in revwire.report(model).units] == ["0", "1", "2"]
    assert_same_step(model, reference, X)


class Outer(nn.Module):
    """A unit, a view, a module with a unit of its own, and a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.g, self.inner, self.h = nn.Linear(8, 8), Residual(5), nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.g(x).tanh()
        x = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return x + self.h(x).tanh()


@pytest.mark.filterwarnings("error")
def test_views_on_the_way_to_a_host_inside_of_a_host_keep_the_chain():
    torch.manual_seed(0)
    model, reference = twin(nn.Sequential(*(Outer() for _ in range(3))).double())
    assert [len(chain.units) for chain in revwire.report(model).chains] == [9]
    assert_same_step(model, reference, X)
    revwire.revert(model)
    revwire.convert(model, X, coupling="re2tal")
    check = revwire.verify(model, X)
    assert check.bit_exact
    before = now = X
    for outer in reference:
        before, now = now, before + outer.g(now).tanh()
        before, now = now, before + outer.inner.f(now.transpose(1, 2)).tanh().transpose(1, 2)
        before, now = now, before + outer.h(now).tanh()
    torch.testing.assert_close(model(X), (before + now) / 2, rtol=1e-6, atol=1e-6)


class TwoStreams(nn.Module):
    """Each stream's branch needs an inner value of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.up, self.down = nn.Linear(8, 8), nn.Linear(6, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.after, self.behind = nn.Linear(8, 8), nn.Linear(6, 6)

    def forward(self, pair):
        x, y = pair
        a, b = self.f(x).tanh(), self.g(y).tanh()
        x = x + (a + self.up(b)).sin()
        y = y + (b + self.down(a)).sin()
        return x + self.after(x).tanh(), y + self.behind(y).tanh()


class Pathways(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStreams() for _ in range(3))

    def forward(self, x):
        pair = x, x[..., :6] * 2
        for both in self.blocks:
            pair = both(pair)
        return pair


def test_parallel_units_that_need_each_other_are_rewired_without_what_they_share():
    torch.manual_seed(0)
    model, reference = twin(Pathways().double())
    assert [len(chain.units) for chain in revwire.report(model).chains] == [6, 6]
    assert_same_step(model, reference, X)
    revwire.revert(model)
    revwire.convert(model, X)
    assert revwire.verify(model, X).bit_exact


def test_a_product_between_two_sums_ends_a_chain():
    """The block would be far from the identity, and rewired as x + (block(x) - x) it would not keep its function."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(OverThere(lambda self, x: x + self.f(x).tanh()), nn.Linear(8, 8)) for _ in range(3)]
    found = revwire.plan(nn.Sequential(*blocks).double(), X)
    assert not found.chains
    assert [s.reason.partition(":")[0] for s in found.skipped] == ["stands alone"] * 3


def test_a_sum_of_several_that_is_no_unit_takes_none_with_it():
    def forward(self, x):
        y = torch.relu(x + self.f(x))
        z = torch.relu(y + self.g(y))
        return self.g(x) + self.f(z)  # a projection of x, around both

    assert len(plan(stack(forward, depth=1)).units) == 2


class Windows(nn.Module):
    """Tokens are put in another order between the blocks, by a reshape that must copy, and the layout changes."""

    def __init__(self, opened: bool) -> None:
        super().__init__()
        kind = block(pre_norm)
        self.blocks = nn.ModuleList(nn.Sequential(kind(), kind()) if opened else kind() for _ in range(4))

    def forward(self, x):
        for b in self.blocks:
            x = b(x.unflatten(1, (2, -1)).transpose(1, 2).reshape(x.shape))
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return x


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_copy_to_another_order_or_layout_keeps_the_chain(opened, training):
    torch.manual_seed(0)
    example = noise(3, 6, 8)
    model, reference = twin(Windows(opened).double().train(training), example)
    assert [len(chain.units) for chain in revwire.report(model).chains] == [8 if opened else 4]
    assert_same_step(model, reference, example)
    assert_same_step(model, reference, noise(2, 4, 8))
    for coupling in ("re2tal", "bdia:1/16"):
        revwire.convert(revwire.revert(model), example, coupling=coupling)
        assert revwire.verify(model, example).bit_exact
        assert revwire.verify(model, noise(2, 4, 8)).bit_exact


class EndsInPlace(nn.Module):
    def __init__(self, viewed: bool) -> None:
        super().__init__()
        self.f, self.viewed = nn.Linear(8, 8), viewed

    def forward(self, x):
        h = torch.sigmoid(self.f(x))
        return nn.functional.relu(x + (h.view(-1, 8).view(x.shape) if self.viewed else h), inplace=True)


@pytest.mark.parametrize("viewed", [False, True])
def test_an_activation_in_place_leaves_what_the_branch_needs(viewed):
    """Under re2tal it moves into the branch, whose last layer may need its own result for its gradient."""
    torch.manual_seed(0)
    model = revwire.convert(nn.Sequential(*(EndsInPlace(viewed) for _ in range(3))).double(), X, coupling="re2tal")
    assert [u.pattern for u in revwire.report(model).units] == ["post-activation"] * 3
    assert revwire.verify(model, X).bit_exact
    x1 = x2 = X
    for b in model:
        x1, x2 = x2, x1 + torch.relu(torch.sigmoid(b.f(x2)))
    torch.testing.assert_close(model(X), (x1 + x2) / 2, rtol=1e-9, atol=1e-9)
