"""Models whose own forward has a `torch.func` transform, forward-mode AD, TorchScript, or a backward pass inside."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import revwire
from steps import TOLERANCE, same
from toys import Plain, X


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()

    def run(self, x):
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return self.run(x)


class Vmapped(Mlp):
    def forward(self, x):
        return torch.func.vmap(self.run)(x)


class Tangent(Mlp):
    def forward(self, x):
        return torch.func.jvp(self.run, (x,), (torch.ones_like(x),))[1]


class Dual(Mlp):
    def forward(self, x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(self.run(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8).double(), nn.BatchNorm1d(5).double()

    def forward(self, x):
        return F.relu(self.norm(self.linear(x)))


def scripted():
    return torch.jit.script(Normed())


def traced():
    return torch.jit.trace(Mlp(), X)


class Slope(Mlp):
    """As forces are of an energy."""

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.run(x).sum(), x, create_graph=True)[0]


class FunctionalSlope(Mlp):
    def forward(self, x):
        return torch.func.grad(lambda x: self.run(x).sum())(x)


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class Model(nn.Module):
    def __init__(self, first, *branches):
        super().__init__()
        self.first, self.blocks = first, nn.Sequential(*map(Block, branches))

    def forward(self, x):
        return self.blocks(self.first(x))


KINDS = [Vmapped, Tangent, Dual, scripted, traced]


def made(*kinds):
    """A model of these parts; the same each time. (A scripted module cannot be copied.)"""
    torch.manual_seed(0)
    return Model(*(kind() for kind in kinds))


def outcome(model):
    """Of a step: the output, gradients of the input and the weights that are used, and buffers."""
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    out = model(x)
    found = torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)
    return [out, *(g for g in found if g is not None), *model.buffers()]


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:.*is not supported in Python 3.14")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [(0,), (1, 3)], ids=["beside", "inside"])
def test_what_works_in_a_branch_and_beside(places, kind):
    kinds = [kind if i in places else Mlp for i in range(4)]
    own = outcome(made(*kinds))
    plain, rebuilt, stored = made(*kinds), made(*kinds), made(*kinds)
    revwire.convert(plain, X, coupling=Plain(), exact=False)
    assert len(revwire.report(plain).units) == 3
    with revwire.stored_activations(plain):
        torch.testing.assert_close(outcome(plain), own, **TOLERANCE)
    for model in (rebuilt, stored):
        revwire.convert(model, X, coupling="re2tal", exact=True)
    with revwire.stored_activations(stored):
        true = outcome(stored)
    assert same(outcome(rebuilt), true)
    assert len(true) == len(own)


@pytest.mark.parametrize("kind", [Slope, FunctionalSlope])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_not_supported_is_not_blamed_on_the_example(kind, place):
    parts = [Mlp() for _ in range(4)]
    parts[place] = kind()
    model = Model(*parts)
    state = torch.get_rng_state()
    with pytest.raises(
        revwire.ConversionError,
        match=r"Model: the model runs on the example inputs, but not while .*observes it \(RuntimeError: .*"
        r"expected a forward without gradients taken inside .*convert the parts",
    ):
        revwire.convert(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    if not place:  # the way out
        revwire.convert(model.blocks, X)
        model(X).sum().backward()
        assert len(revwire.report(model.blocks).units) == 3


def test_a_model_that_fails_by_itself_is_told_so():
    with pytest.raises(revwire.ConversionError, match=r"Model: the model failed on the example inputs .*pass what its"):
        revwire.convert(Model(Mlp(), Mlp()), X[..., :3])
