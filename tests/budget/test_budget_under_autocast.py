"""Stored units under autocast, which casts their weights and holds the casts until the forward pass ends, in whichever
mode they are.
"""

import itertools

import pytest
import torch
from torch import nn

import revwire
from revwire._budget.costs import Costs
from revwire._budget.marker import ended, turn
from revwire._budget.meter import measured
from revwire._budget.search import search
from revwire._budget.unit_cost import ChainSizes
from revwire._forwards.converted import chains_of
from revwire.measure import peak_bytes
from toys import FORMS, Blocks, ResidualMlp, forms_of, modes_of

X = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
WEIGHTS = 2 * 32 * 512 * 2
"""Bytes of the 16-bit casts of the weights of one unit: several times what it saves of its activations."""


STORED = str.maketrans("zyxa", "ssss")


class Wide(nn.Module):
    """Units of which those numbered ``frozen`` have no weights to train."""

    def __init__(self, frozen=()):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = Blocks(lambda: ResidualMlp(32, 16), depth=6)
        for i in frozen:
            self.blocks.blocks[i].requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.blocks(x)


def stepped(model, x=X, after=0, *, cached=True):
    """As in training: a forward under autocast, a backward pass outside of it. ``after``: numbers that are there for a
    moment between.
    """

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cached):
            loss = model(x).square().mean()
            ended(chains_of(model))
            torch.zeros(after)
        turn(chains_of(model))
        loss.backward()

    return run


def under_autocast(model, x=X, coupling="re2tal", chunks=1):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return revwire.convert(model, x, coupling=coupling, chunks=chunks, rewire="everywhere")


def converted(coupling="re2tal", chunks=1, **options):
    return under_autocast(Wide(**options), coupling=coupling, chunks=chunks)


def costs_of(model, run, kept=0, x=X):
    """Of a model with one chain, on states like ``x``, of which a reversible unit keeps so many bytes."""
    (chain,) = chains_of(model)
    run()
    sizes = ChainSizes(tuple(kept if i else 0 for i in range(chain.length)), x.nbytes, exact=True)
    return Costs(measured([chain], run, torch.device("cpu")), [sizes])


def taken(model, run, mix):
    """The peak of a step when the units have these forms."""
    (chain,) = chains_of(model)
    chain.modes, chain.keeps_last = modes_of(mix.translate(STORED)), False
    run()
    return peak_bytes(run)


def predicted_and_taken(model, run, mix, kept=0):
    return costs_of(model, run, kept).forecast(forms_of(mix))[0], taken(model, run, mix)


@pytest.mark.parametrize("after", [0, 2**18], ids=["", "a peak before the backward pass"])
@pytest.mark.parametrize("mix", ["rrrrrr", "aaaaaa", "ssrrrr", "rrssrr", "rrrrzy", "rrzyxx", "ssrczy", "srsrsr"])
@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
def test_casts_count_once_while_autocast_holds_them(coupling, mix, after):
    bits = 0 if coupling == "re2tal" else X.nbytes // 8
    model = converted(coupling)
    expected, peak = predicted_and_taken(model, stepped(model, after=after), mix, bits)
    assert expected == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("mix", ["aaaaaa", "rrssrr", "ssrczy"])
def test_in_chunks_too_they_are_there_once(mix):
    """A chunk may wait while those gradients of casts are there that another has already given: counted together, they
    are too many.
    """
    model = converted(chunks=2)
    expected, peak = predicted_and_taken(model, stepped(model), mix)
    assert 0.999 * peak < expected < 1.001 * peak + WEIGHTS


@pytest.mark.parametrize("mix", ["aaaaaa", "rrssrr"])
def test_casts_that_autocast_does_not_keep_are_a_units_own(mix):
    """Those of frozen weights, and all where its cache is off."""
    for model, cached in ((converted(frozen=range(6)), True), (converted(), False)):
        run = stepped(model, X.clone().requires_grad_(), cached=cached)
        run()
        expected, peak = predicted_and_taken(model, run, mix)
        assert [u.run.early for u in costs_of(model, run).units] == [0] * 6
        assert expected == pytest.approx(peak, rel=0.03)


def test_what_casts_a_unit_has_is_measured():
    model = converted()
    units = costs_of(model, stepped(model)).units
    assert [u.run.early for u in units] == [WEIGHTS] * 6
    assert all(u.run.saved > WEIGHTS for u in units)


@pytest.mark.parametrize("after", [0, 2**18])
def test_the_search_counts_as_the_forecast_does(after):
    model = converted("bdia:1/16")
    costs = costs_of(model, stepped(model, after=after), X.nbytes // 8)
    mixes = [list(m) for m in itertools.product(map(FORMS.get, "rcszyxa"), repeat=6) if allowed(costs, m)]
    points = [costs.forecast(forms) for forms in mixes]
    low, high = min(p for p, _ in points), max(p for p, _ in points)
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = int(low + share * (high - low))
        peak, seconds = costs.forecast(search(costs, budget))
        assert peak <= budget
        assert seconds <= min(s for p, s in points if p <= budget) + 0.01 * costs.seconds
    assert search(costs, low - 1) is None


def allowed(costs, forms):
    return all(
        form in unit.forms(before) for unit, form, before in zip(costs.units, forms, (None, *forms), strict=False)
    )


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_budget_is_met_and_used(share):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        limits = revwire.plan(Wide(), X, memory_budget="least", chunks=1).forecast
        budget = int(limits.peak_bytes + share * (limits.stored.peak_bytes - limits.peak_bytes)) + 1
        model = revwire.convert(Wide(), X, memory_budget=budget, chunks=1)
    run = stepped(model)
    run()
    forecast, peak = revwire.report(model).forecast, peak_bytes(run)
    assert forecast.peak_bytes == pytest.approx(peak, rel=0.02)
    assert peak <= 1.01 * budget
    if share == 1:
        assert {u.mode for u in revwire.report(model).units} == {"stored"}


class Cached(nn.Module):
    """Units whose model gives out, beside its result, what they computed: keys and values for a cache, say."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Remembering() for _ in range(6))

    def forward(self, x):
        found = []
        for block in self.blocks:
            x, inside = block(x)
            found.append(inside)
        return x, found


class Remembering(nn.Module):
    """x + an MLP, which gives out what it has inside."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x):
        inside = self.first(self.norm(x))
        return x + self.second(nn.functional.gelu(inside)), inside


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("mix", ["rrrrrr", "aaaaaa", "ssrrrr", "rrssrr", "rrzyxx", "srsrsr"])
def test_what_a_model_gives_out_counts_once(mix, lasting):
    """Until the forward pass ends, or as long as the step holds it."""
    x = torch.randn(256, 32)
    model = revwire.convert(Cached(), x, coupling="re2tal")
    chains = chains_of(model)
    assert [chain.length for chain in chains] == [6]

    def run():
        out, found = model(x)
        ended(chains)
        loss = out.square().mean()
        held = found if lasting else None
        del out, found
        turn(chains)
        loss.backward()
        del held

    costs = costs_of(model, run, x=x)
    inside = 256 * 128 * 4
    assert [(u.run.early, u.run.lasting) for u in costs.units] == [(inside, inside if lasting else 0)] * 6
    assert costs.forecast(forms_of(mix))[0] == pytest.approx(taken(model, run, mix), rel=0.04)


class Deep(nn.Module):
    """Gives out, or keeps, what every block gave."""

    def __init__(self, keeps=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ResidualMlp(32) for _ in range(8))
        self.keeps = keeps

    def forward(self, x):
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        if self.keeps:
            self.found = found
            return x
        return found


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_what_only_the_loss_holds_is_gone_when_a_unit_has_its_turn(share):
    """A square holds its input until its own backward, which comes first."""
    x = torch.randn(512, 32)
    limits = revwire.plan(Deep(), x, coupling="re2tal", memory_budget="least", chunks=1).forecast
    budget = int(limits.peak_bytes + share * (limits.stored.peak_bytes - limits.peak_bytes))
    model = revwire.convert(Deep(), x, coupling="re2tal", memory_budget=budget, chunks=1)

    def run():
        torch.stack([out.square().mean() for out in model(x)]).mean().backward()

    run()
    peak = peak_bytes(run)
    assert peak <= 1.02 * budget
    assert revwire.report(model).forecast.peak_bytes == pytest.approx(peak, rel=0.1)


def test_a_run_that_is_stored_to_the_end_has_its_states_besides():
    """Hidden states that a model keeps, in 16 bits, and a stored run of many units: the streams it has come to are
    there in forward.
    """
    x = torch.randn(512, 32)
    model = under_autocast(Deep(keeps=True), x)
    run = stepped(model, x)
    costs = costs_of(model, run, x=x)
    for mix in ("rrzyxxxx", "rrrrrrzy", "rrrrrzyx"):
        peak = taken(model, run, mix)
        assert 0.99 * peak < costs.forecast(forms_of(mix))[0] < 1.12 * peak


class Several(nn.Module):
    """x + many layers, one after the other: memory of what one has saved is used again by the next."""

    def __init__(self, width=64, layers=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        y = self.norm(x)
        for layer in self.layers:
            y = torch.relu(layer(y))
        return x + y


def test_memory_that_is_used_again_within_a_branch_is_seen_again():
    x = torch.randn(64, 64)  # activations as large as casts
    model = under_autocast(Blocks(Several, depth=4), x)
    units = costs_of(model, stepped(model, x), x=x).units
    assert [u.run.early for u in units] == [8 * 64 * 64 * 2] * 4


def test_casts_of_an_input_are_one_in_a_recompute_and_several_when_stored():
    """Autocast keeps casts of leaves, such as x_k in a recompute, for their next use."""

    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

        def forward(self, x):
            a, b, c = (layer(x) for layer in self.layers)
            return x + a * b * c

    x = torch.randn(256, 64)
    model = under_autocast(Blocks(Thrice, depth=4), x)
    run = stepped(model, x)
    costs = costs_of(model, run, x=x)
    assert [u.run.saved - u.run.rebuilt for u in costs.units] == [
        0,
        *[2 * x.nbytes // 2] * 3,
    ]  # the first needs no gradient of x
    assert costs.forecast(forms_of("aaaa"))[0] == pytest.approx(taken(model, run, "aaaa"), rel=0.06)


class Front(nn.Module):
    """A unit that nothing rebuilds, on an extra input that is sparse."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, graph):
        return x + torch.sparse.mm(graph, self.linear(self.norm(x)))


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.ModuleList(Front() for _ in range(3)).requires_grad_(requires_grad=False)
        self.between = nn.Linear(16, 16)
        self.blocks = Blocks(lambda: ResidualMlp(16, 4), depth=4)

    def forward(self, x, graph):
        for block in self.front:
            x = block(x, graph)
        return self.blocks(self.between(x))


def test_sparse_extra_inputs_have_no_memory_to_look_at():
    x, graph = torch.randn(32, 16), torch.eye(32).to_sparse()
    plan = revwire.plan(Graphs(), (x, graph), memory_budget="least")
    assert plan.forecast.peak_bytes > 0
