"""Each refusal in its own words, where others could hide it."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import FAST, each_fast_case, each_fast_exact_case
from revwire import ReconstructionError
from revwire._runtime import run as runner
from steps import faulty
from toys import LARGE, SHAPE, WIDTH, PreNorm, Setting, Weightless, inputs_of, mixed, toy


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
    """A branch that makes a product more where it is told to, of which nothing is saved."""

    longer = Setting("")

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x):
        h = self.norm(x)
        if self.longer == "before":
            h.detach() @ torch.eye(WIDTH)
        y = self.down(torch.tanh(self.up(h)))
        if self.longer == "behind":
            y.detach() @ torch.eye(WIDTH)
        return self.gamma * y


@each_fast_exact_case
@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_selective_recompute_that_makes_another_call(case, where):
    model, x = mixed(case, "rrpr", Longer), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    model.branches[2].longer = where
    with faulty("its recompute made other calls"):
        loss.backward()


class Sigmoids(nn.Module):
    """A branch of as many functions as it is told, each of which saves its result, on all channels or on one."""

    shape = SHAPE
    how = Setting("2 wide")

    def forward(self, x):
        count, width = self.how.split()
        y = x if width == "wide" else x[..., :1]
        for _ in range(int(count)):
            y = y.sigmoid()
        return y.expand_as(x)


@each_fast_case
@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("2 narrow", r"its recompute saved another tensor at 0: \(torch\.Size\(\[3, 5, 1\]\)"),
        ("3 wide", "its recompute saved another tensor at 2: "),
        ("1 wide", "its recompute saved 1 tensors; expected 2 as in forward"),
    ],
)
def test_a_recompute_that_saves_other_tensors(case, how, match):
    model = toy(case, Sigmoids)
    out = model(inputs_of(model, case))
    model.branches[3].how = how
    with faulty(match):
        out.sum().backward()


@each_fast_case
@pytest.mark.parametrize("mode", ["stored", "kept as the last"])
def test_a_branch_that_writes_to_its_input_where_autograd_keeps_its_activations(case, mode):
    class Writes(Weightless):
        def forward(self, x):
            with torch.no_grad():
                x.add_(1)
            return super().forward(x)

    model = toy(case, Weightless)
    model.branches[-1] = Writes()
    model.chain.keeps_last = mode != "stored"
    model.chain.modes = ("reversible",) * (len(model.units) - 1) + (
        "reversible" if model.chain.keeps_last else "stored",
    )
    with faulty("wrote to its own input in place"):
        model(inputs_of(model, case))


class Restless(Weightless):
    """A branch that writes to its input where it is told to: the value that is there."""

    writes = Setting(False)

    def forward(self, x):
        if self.writes:
            with torch.no_grad():
                x.add_(0)
        return super().forward(x)


@each_fast_case
def test_a_recompute_that_writes_to_its_input(case):
    model = toy(case, Restless)
    out = model(inputs_of(model, case))
    model.branches[3].writes = True
    with faulty("wrote to its own input in place"):
        out.sum().backward()
