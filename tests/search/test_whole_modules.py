"""Modules that are one unit each, whatever residual adds they hold: what is found, what it computes, what a budget
prefers.
"""

import copy

import pytest
import timm
import torch
from torch import nn

import revwire
from revwire._forwards.converted import chains_of
from revwire.measure import peak_bytes
from steps import output_and_gradients

X = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two pre-norm branches, the second ``factor`` times as wide as the stream."""

    def __init__(self, factor=4):
        super().__init__()
        width = int(32 * factor)
        self.first = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh())
        self.second = nn.Sequential(
            nn.LayerNorm(32), nn.Linear(32, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, 32)
        )

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


class Stage(nn.Module):
    """Blocks in a list, run in a loop: no module around them but this."""

    def __init__(self, depth=4, factor=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(factor) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("whole", "units"), [(None, 8), ("blocks.*", 4), ("*", 4), (["blocks.1", "blocks.2"], 6), ("blocks.[12]", 6)]
)
@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
def test_each_module_that_matches_is_one_unit(whole, units, coupling):
    model = Stage()
    plan = revwire.plan(model, X, coupling=coupling, whole=whole)
    revwire.convert(model, X, coupling=coupling, whole=whole)
    assert len(plan.units) == len(revwire.report(model).units) == units
    assert plan.coverage == 1
    assert revwire.verify(model, X).bit_exact
    got = output_and_gradients(model, X)
    with revwire.stored_activations(model):
        assert all(map(torch.equal, got, output_and_gradients(model, X)))


def test_the_coupling_stands_around_the_module_as_a_whole():
    model = Stage().eval()
    before, now = X, X
    with torch.no_grad():
        for block in copy.deepcopy(model).blocks:
            before, now = now, before + block(now) - now
        revwire.convert(model, X, coupling="re2tal", whole="blocks.*")
        torch.testing.assert_close(model(X), (before + now) / 2)


def test_reverted_it_is_the_network_that_it_was():
    model = Stage().eval()
    with torch.no_grad():
        out = model(X)
        revwire.convert(model, X, whole="*")
        revwire.revert(model)
        assert torch.equal(model(X), out)


def test_the_outermost_module_that_matches_and_stands_in_a_chain_is_taken():
    model = nn.Sequential(Stage(2), Stage(2))
    assert [u.host for u in revwire.plan(model, X, whole="*").units] == ["0", "1"]
    assert [u.host for u in revwire.plan(model, X, whole="*.blocks.*").units] == [
        "0.blocks.0",
        "0.blocks.1",
        "1.blocks.0",
        "1.blocks.1",
    ]
    alone = nn.Sequential(Stage(2), nn.Linear(32, 32))  # one such stage is no chain
    assert [u.host for u in revwire.plan(alone, X, whole="*").units] == ["0.blocks.0", "0.blocks.1"]


def test_what_is_excluded_inside_does_not_matter_but_the_module_itself_does():
    plan = revwire.plan(Stage(), X, whole="blocks.*", exclude="blocks.0")
    assert [u.host for u in plan.units] == ["blocks.1", "blocks.2", "blocks.3"]
    assert {s.path for s in plan.skipped if not s.inside_unit} == {"blocks.0.first", "blocks.0.second"}


class Twofold(nn.Module):
    """Returns the sum and a number that is made from it: not one unit, as its output is used inside."""

    def __init__(self):
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        y = x + self.inner.first(x)
        y = y + self.inner.second(y)
        return y, y.mean()


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Twofold() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return x


def test_a_module_that_cannot_be_one_unit_keeps_its_units():
    model = nn.Sequential(Pairs(), Stage(2))
    plan = revwire.plan(model, X, whole="*.blocks.*")
    assert [u.host for u in plan.units] == [f"0.blocks.{i}" for i in (0, 0, 1, 1, 2, 2)] + ["1.blocks.0", "1.blocks.1"]
    with pytest.raises(
        revwire.ConversionError,
        match=r"whole: got the glob '0\.\*', under which no module can be one unit; expected modules that lead",
    ):
        revwire.convert(model, X, whole="0.*")
    with pytest.raises(revwire.ConversionError, match="not converted"):
        revwire.report(model)


class Nested(nn.Module):
    """A residual block whose branch holds two others."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Sequential(Block(), Block()), nn.Linear(32, 32)

    def forward(self, x):
        return x + self.out(self.inner(x))


@pytest.mark.parametrize("whole", ["*.inner", "*.inner.*", "?", "*", None])
def test_what_lies_in_the_branch_of_a_unit_is_no_unit_of_another_chain(whole):
    torch.manual_seed(0)
    model = nn.Sequential(*(Nested() for _ in range(3)))
    revwire.convert(model, X, whole=whole)
    hosts = [[u.host for u in chain.units] for chain in revwire.report(model).chains]
    if whole in ("?", "*"):
        assert hosts == [["0", "1", "2"]]
    every = {host for several in hosts for host in several}
    assert every
    assert not any(a != b and b.startswith(f"{a}.") for a in every for b in every)
    got = output_and_gradients(model, X)
    with revwire.stored_activations(model):
        assert all(map(torch.equal, got, output_and_gradients(model, X)))


@pytest.mark.parametrize("option", ["whole", "include", "exclude", "checkpoint"])
@pytest.mark.parametrize("value", [5, [5], ["blocks.*", None]])
def test_what_is_no_glob_is_refused(option, value):
    with pytest.raises(
        revwire.ConversionError, match=f"{option}: got .*; expected a glob over qualified names, or several"
    ):
        revwire.convert(Stage(), X, **{option: value})


def test_auto_takes_the_cut_that_can_be_had():
    model = revwire.convert(
        Stage(), X, memory_budget="least", whole="auto", coupling={"blocks.0.first": "re2tal"}, chunks=1
    )
    assert len(revwire.report(model).units) == 8  # whole blocks have no such unit
    revwire.revert(model)
    with pytest.raises(revwire.ConversionError, match="got the glob 'nothing'"):
        revwire.convert(model, X, memory_budget="least", whole="auto", coupling={"nothing": "re2tal"}, chunks=1)
    with pytest.raises(revwire.ConversionError, match="not converted"):
        revwire.report(model)


def test_auto_needs_a_budget():
    with pytest.raises(revwire.ConversionError, match="whole: got 'auto' without a memory_budget; expected a budget"):
        revwire.convert(Stage(), X, whole="auto")


@pytest.mark.parametrize(("depth", "factor", "whole"), [(4, 4, False), (32, 4, True), (24, 1 / 32, True)])
def test_a_budget_chooses_between_adds_and_whole_modules(depth, factor, whole):
    """Adds are rebuilt one at a time; in deep or narrow networks most of what is kept are bits, of which fewer units
    have fewer.
    """
    x = torch.randn(64, 12, 32)
    model = revwire.convert(
        Stage(depth, factor), x, memory_budget="least", whole="auto", coupling="bdia:1/16", chunks=1
    )
    plan = revwire.report(model)
    assert len(plan.units) == (depth if whole else 2 * depth)
    other = revwire.plan(
        Stage(depth, factor), x, memory_budget="least", whole=None if whole else "*", coupling="bdia:1/16", chunks=1
    )
    assert plan.forecast.peak_bytes < other.forecast.peak_bytes

    def step():
        model(x).square().mean().backward()

    step()
    assert peak_bytes(step) == pytest.approx(plan.forecast.peak_bytes, rel=0.05)
    assert revwire.verify(model, x).bit_exact


def test_a_budget_that_neither_fits_names_the_smaller_one_and_leaves_the_model():
    model = Stage()
    with pytest.raises(revwire.BudgetError) as error:
        revwire.convert(model, X, memory_budget=1000, whole="auto", chunks=1)
    each = []
    for whole in (None, "*"):
        with pytest.raises(revwire.BudgetError) as alone:
            revwire.convert(model, X, memory_budget=1000, whole=whole, chunks=1)
        each.append(alone.value.smallest)
    assert error.value.smallest == pytest.approx(min(each), rel=0.01)
    with pytest.raises(revwire.ConversionError, match="not converted"):
        revwire.report(model)


def test_a_vision_transformer_block_by_block():
    model = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, num_classes=10, drop_path_rate=0.1).train()
    x = torch.randn(4, 3, 32, 32)
    revwire.convert(model, x, whole="blocks.*")
    assert [u.host for u in revwire.report(model).units] == [f"blocks.{i}" for i in range(4)]
    assert len(chains_of(model)) == 1
    assert revwire.verify(model, x).bit_exact


class Turning(nn.Module):
    """A block whose sum lies transposed in memory."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(32, 32)

    def forward(self, x):
        return x.transpose(1, 2).contiguous().transpose(1, 2) + self.f(x).tanh()


@pytest.mark.parametrize("whole", [(), "*"])
def test_results_lie_in_memory_as_those_of_the_original(whole):
    plain = nn.Sequential(Turning(), Turning(), Turning())
    model = revwire.convert(copy.deepcopy(plain), X, rewire="everywhere", whole=whole)
    assert len(revwire.report(model).units) == 3
    assert model(X).stride() == plain(X).stride() != X.stride()
