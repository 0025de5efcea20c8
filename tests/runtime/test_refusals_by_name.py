"""Each refusal in its own words, where others could hide it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import FAST, each_fast_case, each_fast_exact_case
from revwire import ReconstructionError
from revwire._runtime import run as runner
from steps import faulty
from toys import LARGE, WIDTH, PreNorm, Weightless, inputs_of, mixed, toy


def taps_of(model, x):
    """What each unit of a chain gives."""
    taps = []
    for unit, branch in zip(model.units, model.branches, strict=True):
        x, _ = runner.apply(model.chain, unit, branch, x)
        taps.append(x)
    return taps


@each_fast_case
def test_a_backward_through_records_that_are_gone(case):
    """The first pass walks over the last units, and frees them; PyTorch's graph has nothing saved that could tell."""
    model = toy(case, Weightless)
    x = inputs_of(model, case)
    taps = taps_of(model, x)
    torch.autograd.grad(taps[6].sum(), taps[4])
    with pytest.raises(
        ReconstructionError, match=r"chain 0: got a backward through a unit whose record was freed; .*to the first"
    ):
        torch.autograd.grad(taps[6].sum(), x)


class Factor(nn.Module):
    """A branch that ends in a factor which is neither weight nor buffer."""

    shape = LARGE

    def __init__(self):
        super().__init__()
        self.layer, self.factor = nn.Linear(WIDTH, WIDTH), torch.full(LARGE, 0.5)

    def forward(self, x):
        return torch.tanh(self.layer(x)) * self.factor


@each_fast_exact_case
def test_a_constant_that_was_written_to(case):
    """By a number that no sample sees."""
    model, x = mixed(case, "rccr", Factor), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    model.branches[2].factor[0, 0, 1] = 0.5
    with faulty("a constant that it uses was modified in place"):
        loss.backward()


@each_fast_exact_case
def test_a_constant_that_is_gone_is_none_that_was_written_to(case):
    model, x = mixed(case, "rccr", Factor), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    model.branches[2].factor = model.branches[2].factor.clone()
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", FAST, ids=str)
def test_weights_that_were_lent_to_a_checkpoint(case, reentrant):
    """It would run again, in backward, when they are no longer there."""

    class Checkpointed(PreNorm):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model = toy(case, Checkpointed)
    lent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, lent, inputs_of(model, case))
    with faulty(r"functional_call lent it were taken back, and a torch\.utils\.checkpoint inside of it"):
        out.sum().backward()


class Longer(PreNorm):
    """A branch that makes a product more when it is told to, where none of its tensors is saved."""

    def __init__(self):
        super().__init__()
        self.longer = False

    def forward(self, x):
        h = self.norm(x)
        if self.longer:
            h.detach() @ torch.eye(WIDTH)
        return self.down(torch.tanh(self.up(h)))


@each_fast_exact_case
def test_a_selective_recompute_that_makes_another_call(case):
    model, x = mixed(case, "rrpr", Longer), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    model.branches[2].longer = True
    with faulty("its recompute made other calls"):
        loss.backward()
