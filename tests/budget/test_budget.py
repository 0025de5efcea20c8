"""Memory budgets: what is asked for is met, what is predicted comes, the function and its gradients stay the same."""

import copy
import itertools
import json
import random
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.video import swin3d_t

import revwire
from cases import spread
from revwire._budget.costs import Costs
from revwire._budget.forms import Form
from revwire._budget.marker import Mark, Place
from revwire._budget.measured import Arithmetic, Measured, Run, Stretch
from revwire._budget.meter import measured
from revwire._budget.mixes import coarsest, fitting, least_of
from revwire._budget.rival import checkpointing, rival
from revwire._budget.search import least, search
from revwire._budget.unit_cost import ChainSizes
from revwire._forwards.converted import chains_of
from revwire._plan.options import parse_budget
from revwire._plan.plan import Point
from revwire.measure import peak_bytes
from steps import output_and_gradients, training_step
from toys import encoder, forms_of


def transformer(depth=6, width=32, head=2):
    torch.manual_seed(0)
    return nn.Sequential(encoder(depth, width, 4, 4 * width), nn.Linear(width, head)).train()


INPUTS = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("budget", "size"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("6GiB", 6 * 2**30),
        ("512MB", 512 * 10**6),
        (" 1.5 KiB ", 1536),
        ("2kB", 2000),
        ("2KB", 2000),
        ("1TiB", 2**40),
        ("least", None),
    ],
)
def test_budgets_as_users_write_them(budget, size):
    assert parse_budget(budget) == size


@pytest.mark.parametrize("budget", [0, -5, "", "much", "6 gigs", "GiB", "1.2.3MB", 1.5, True, "-1GB"])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(
        revwire.BudgetError, match=r"memory_budget: got .*; expected a positive number of bytes, '6GiB'"
    ):
        revwire.convert(transformer(2), INPUTS, memory_budget=budget)


# -- the search, against all mixes -------------------------------------------------------------------------------------


def costs_of(units, seed, chains=1, state=64, exact=True, keeps=40):
    """Costs of a step with random figures: two marks per unit forwards, three backwards."""
    random = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=random))

    each = units // chains
    places = [Place(i // each, i % each) for i in range(units)]
    stretches = [Stretch(Mark("begin", -1), 0, number(0, 100), 0.1)]
    for run in range(units):
        level = keeps * run
        stretches += [
            Stretch(Mark("enter", run), level, level + number(100, 400), 1),
            Stretch(Mark("leave", run), level + keeps, level + keeps + 20, 0),
        ]
    for run in reversed(range(units)):
        level = keeps * run
        stretches += [Stretch(Mark("grad", run), level, level + number(100, 900), number(1, 9))]
        stretches += [Stretch(Mark("complete", run), level, level + number(100, 900), number(1, 5))]
        stretches += [Stretch(Mark("rebuilt", run), level, level + number(300, 1000), 2)]
    arithmetic, saved = Arithmetic(0.25, 0.5), [number(200, 800) for _ in range(units)]
    runs = tuple(Run(place, arithmetic, saved=s, rebuilt=s, held=s) for place, s in zip(places, saved, strict=True))
    sizes = ChainSizes(tuple(8 if i else 0 for i in range(each)), state, exact)
    return Costs(Measured(runs, tuple(stretches)), [sizes] * chains)


def every_mix(costs):
    """All forms that the units can have together."""

    def grow(run, forms, before):
        if run == len(costs.units):
            yield forms
            return
        unit = costs.units[run]
        for form in unit.forms(before.get(unit.chain) if unit.unit else None):
            yield from grow(run + 1, [*forms, form], {**before, unit.chain: form})

    return list(grow(0, [], {}))


@pytest.mark.parametrize(("seed", "chains", "exact"), list(product(range(6), [1, 2], [True, False])))
def test_the_search_finds_the_fastest_mix_that_fits(seed, chains, exact):
    costs = costs_of(6, seed, chains, exact=exact)
    points = [costs.forecast(forms) for forms in every_mix(costs)]
    low, high = min(p for p, _ in points), max(p for p, _ in points)
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = int(low + share * (high - low))
        peak, seconds = costs.forecast(search(costs, budget))
        best = min(s for p, s in points if p <= budget)
        assert peak <= budget
        assert (
            seconds <= best + 0.25
        )  # one class of bytes is 1/256 of the budget: a unit's arithmetic may be lost to it
    assert search(costs, low - 1) is None
    assert low <= least(costs) <= low * 1.002 + 1


@pytest.mark.parametrize("seed", range(4))
def test_a_mix_of_two_steps_costs_what_each_says_of_its_own_runs(seed):
    one, two = costs_of(4, seed), costs_of(4, seed + 10, keeps=70)
    for costs in (one, two):
        same = Costs.composed([costs] * 4)
        assert [same.forecast(forms) for forms in every_mix(costs)] == [
            costs.forecast(forms) for forms in every_mix(costs)
        ]
    mixed = Costs.composed([one, two, two, one])
    assert mixed.starts == [0, 40, 110, 180, 220]
    assert [mixed.own(run, Form.REVERSIBLE) for run in range(4)] == [
        one.own(0, Form.REVERSIBLE),
        two.own(1, Form.REVERSIBLE) - 70 + 40,
        two.own(2, Form.REVERSIBLE) - 140 + 110,
        one.own(3, Form.REVERSIBLE) - 120 + 180,
    ]
    spent = [one.spent[0], two.spent[1], two.spent[2], one.spent[3]]
    assert mixed.seconds == pytest.approx(one.seconds - sum(one.spent) + sum(spent))
    assert mixed.forecast([Form.WHOLE_CHAIN] * 4)[1] == pytest.approx(
        mixed.seconds - sum(c.units[i].gain for i, c in enumerate((one, two, two, one)))
    )


def test_each_unit_goes_the_coarsest_way_with_which_it_fits():
    ways = [costs_of(6, seed, keeps=keeps) for seed, keeps in ((0, 40), (1, 45), (2, 60))]
    for size in range(300, 1500, 50):
        picks = coarsest(ways, size)
        mixed = Costs.composed([ways[way] for way in picks])
        for run, way in enumerate(picks):
            others = [
                Costs.composed([*(ways[w] for w in picks[:run]), ways[w], *(ways[w] for w in picks[run + 1 :])])
                for w in range(way)
            ]
            assert mixed.own(run, Form.REVERSIBLE) <= size or way == 2
            assert all(other.own(run, Form.REVERSIBLE) > size for other in others)
    smallest, choices = least_of(ways)
    assert fitting(ways, choices, smallest) is not None
    assert smallest <= 1.002 * min(least(costs) for costs in ways)


def test_every_mix_of_modes_has_a_form():
    costs = costs_of(4, 0)
    modes = {tuple(f.mode for f in forms) for forms in every_mix(costs)}
    assert len(modes) == 2 * 3**3  # the first unit is never checkpointed: its input is the chain's


def test_a_unit_that_is_never_rebuilt_stays_as_it_is():
    costs = costs_of(4, 0)
    frozen = Measured(costs.measured.runs, costs.measured.stretches[:-1])
    assert [u.fixed for u in Costs(frozen, [ChainSizes((0,) * 4, 64, True)]).units] == [True, False, False, False]


def test_a_unit_that_runs_twice_stays_reversible():
    layer = transformer(3)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = layer

        def forward(self, x):
            return self.net(x) + self.net(x.flip(1))

    plan = revwire.plan(Twice(), INPUTS, memory_budget="1GiB")
    assert {u.mode for u in plan.units} == {"reversible"}


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def limits():
    forecast = revwire.plan(transformer(), INPUTS, memory_budget="least").forecast
    return forecast.peak_bytes, forecast.stored.peak_bytes


@pytest.mark.parametrize(("share", "coupling"), spread([0.0, 0.35, 0.7, 1.0], ["bdia:1/16", "re2tal"]))
def test_a_step_takes_what_was_predicted_and_no_more_than_the_budget(limits, share, coupling):
    low, high = limits
    budget = int(low * 1.01 + share * (high - low))
    model = revwire.convert(transformer(), INPUTS, coupling=coupling, memory_budget=budget)
    plan = revwire.report(model)
    peak = peak_bytes(training_step(model, INPUTS))
    assert plan.forecast.peak_bytes <= budget
    assert peak <= budget * 1.02
    assert abs(plan.forecast.peak_bytes / peak - 1) < 0.05
    assert revwire.verify(model, INPUTS).bit_exact
    assert plan.forecast.seconds > 0


@pytest.mark.parametrize("mix", ["rrrrcc", "rrrrcr", "rrrccc", "rccccc", "rsrccr", "rcrcrc"])
def test_a_checkpointed_unit_takes_what_was_predicted(mix):
    """Without bits nothing hides a state too many."""
    names = {"s": "stored", "c": "checkpointed", "r": "reversible"}
    x = torch.randn(16, 64, 8)
    torch.manual_seed(0)
    model = nn.Sequential(*(Several(1, 1, width=8) for _ in range(6)))
    revwire.convert(model, x, coupling="re2tal", memory_budget="least", chunks=1)
    (chain,) = chains_of(model)

    def run():
        model(x).square().mean().backward()

    run()
    plan = revwire.report(model)
    (planned,) = plan.chains
    kept = tuple(u.kept_bytes if u.mode == "reversible" and i else 0 for i, u in enumerate(planned.units))
    sizes = ChainSizes(kept, planned.stream_bytes // 2, exact=True)
    costs = Costs(measured([chain], run, torch.device("cpu")), [sizes])
    forms = forms_of(["a" if mix == "s" * 6 else letter for letter in mix])
    chain.modes, chain.keeps_last = tuple(names[letter] for letter in mix), False
    run()
    assert peak_bytes(run) == pytest.approx(costs.forecast(forms)[0], rel=0.02)


def test_function_and_gradients_are_those_of_the_plain_conversion(limits):
    model = transformer()
    twin = revwire.convert(copy.deepcopy(model), INPUTS)
    revwire.convert(model, INPUTS, memory_budget=sum(limits) // 2)
    assert len({mode for chain in chains_of(model) for mode in chain.modes}) > 1
    assert all(map(torch.equal, output_and_gradients(model, INPUTS), output_and_gradients(twin, INPUTS)))


def test_a_copied_model_keeps_its_modes(limits):
    model = revwire.convert(transformer(), INPUTS, memory_budget=sum(limits) // 2)
    twin = copy.deepcopy(model)
    assert [c.modes for c in chains_of(twin)] == [c.modes for c in chains_of(model)]
    assert all(map(torch.equal, output_and_gradients(model, INPUTS), output_and_gradients(twin, INPUTS)))


def test_a_budget_that_nothing_fits_names_the_smallest_that_something_does(limits):
    model = transformer()
    near = int(0.9 * limits[0])
    with pytest.raises(
        revwire.BudgetError,
        match=rf"Sequential: got a memory budget of {near} bytes .* expected at least (\d+) .*pass memory_budget=",
    ) as error:
        revwire.convert(model, INPUTS, memory_budget=near)
    smallest = int(str(error.value).split("pass memory_budget=")[1].split()[0])
    assert smallest == pytest.approx(limits[0], rel=0.01)
    with pytest.raises(revwire.ConversionError, match="not converted"):
        revwire.report(model)  # as it was
    revwire.convert(model, INPUTS, memory_budget=smallest)


def test_a_budget_that_holds_everything_stores_everything_and_says_so(limits):
    plan = revwire.plan(transformer(), INPUTS, memory_budget=limits[1] + 1)
    assert {u.mode for u in plan.units} == {"stored"}
    assert "every activation fits: nothing is rebuilt" in str(plan)
    assert "12 stored" in str(plan)


def test_a_plan_leaves_the_model_as_it_found_it():
    model = transformer()
    model(INPUTS).sum().backward()
    grads, state, random = (
        [p.grad for p in model.parameters()],
        copy.deepcopy(model.state_dict()),
        torch.get_rng_state(),
    )
    plan = revwire.plan(model, INPUTS, memory_budget="least")
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert "forward" not in vars(model[0].layers[0])
    assert json.loads(json.dumps(plan.to_dict()))["forecast"]["planned"]["peak_bytes"] == plan.forecast.peak_bytes


def test_the_first_call_may_be_the_example(limits):
    model = revwire.convert(transformer(), memory_budget=sum(limits) // 2)
    with torch.no_grad():
        model(INPUTS)
    assert revwire.report(model).forecast.budget == sum(limits) // 2
    assert peak_bytes(training_step(model, INPUTS)) <= sum(limits) // 2


def test_a_model_without_gradients_has_no_step_to_measure():
    with pytest.raises(
        revwire.BudgetError, match="outputs that need no gradient; expected a step to measure; unfreeze"
    ):
        revwire.convert(transformer(2).requires_grad_(False), INPUTS, memory_budget="least")


def test_frozen_units_are_left_alone():
    model = transformer()
    model[0].layers[:3].requires_grad_(False)
    revwire.convert(model, INPUTS, memory_budget="1GiB")
    assert [u.mode for u in revwire.report(model).units] == ["reversible"] * 6 + ["stored"] * 6
    assert revwire.verify(model, INPUTS).bit_exact


def test_shallow_chains_are_named_where_reversible_gains_nothing():
    class Stages(nn.Module):
        """A wide stage whose backward is the peak, and a narrow one that is long over by then."""

        def __init__(self):
            super().__init__()
            self.wide, self.down, self.narrow = transformer(4, 32)[0], nn.Linear(32, 8), transformer(2, 8)[0]

        def forward(self, x):
            return self.narrow(self.down(self.wide(x))[:, ::8])

    model = Stages()
    plan = revwire.plan(model, INPUTS, memory_budget="least")
    assert len(plan.forecast.advice) == 1
    assert "chain 1: reversible gains nothing here" in str(plan)
    assert {u.mode for u in plan.chains[1].units} == {"stored"}


class Pyramid(nn.Module):
    """A wide stage of ``depth`` layers, and a narrow one."""

    def __init__(self, depth):
        super().__init__()
        self.wide, self.down, self.narrow = transformer(depth, 32)[0], nn.Linear(32, 8), transformer(4, 8)[0]

    def forward(self, x):
        return self.narrow(self.down(self.wide(x))[:, ::8])


def checkpointed(model, plan):
    for path in plan.hosts:
        module = model.get_submodule(path)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


class Dropping(nn.Module):
    """A stack that leaves layers out at random; ``draw`` draws by which generator."""

    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.draw = nn.ModuleList(Several(1) for _ in range(6)), draw

    def forward(self, x):
        for layer in self.layers:
            if self.draw() >= 0.3:
                x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore:.*got a tensor that something between two units made")
@pytest.mark.parametrize("draw", [random.random, lambda: float(torch.rand(()))], ids=["python", "torch"])
@pytest.mark.parametrize("budget", ["least", 400_000])
def test_steps_that_leave_layers_out_are_measured_alike(draw, budget):
    for seed in range(4):
        random.seed(seed)
        torch.manual_seed(seed)
        model = revwire.convert(Dropping(draw).train(), torch.randn(8, 16, 32), memory_budget=budget)
        assert revwire.report(model).forecast.peak_bytes > 0
        model(torch.randn(8, 16, 32)).sum().backward()


def test_steps_that_are_not_alike_are_refused():
    turns = iter(range(10**9))
    with pytest.raises(revwire.BudgetError, match=r"Dropping: got steps that are not alike.*pass no memory_budget"):
        revwire.convert(Dropping(lambda: next(turns) % 7 / 6).train(), torch.randn(8, 16, 32), memory_budget="least")


class Several(nn.Module):
    """A block of ``count`` units whose branches widen their input ``factor`` times."""

    def __init__(self, count, factor=2, width=32):
        super().__init__()
        inner = max(1, int(width * factor))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
            for _ in range(count)
        )

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


class Repeated(nn.Module):
    """The same blocks, run several times: one after the other, or each time on another input."""

    def __init__(self, blocks, times, apart):
        super().__init__()
        self.blocks, self.times, self.apart = blocks, times, apart

    def forward(self, x):
        if self.apart:
            return torch.stack([self.blocks(x * (i + 1)) for i in range(self.times)])
        for _ in range(self.times):
            x = self.blocks(x)
        return x


STACKS = {
    "deep": transformer,
    "one block": lambda: transformer(1),
    "stages": lambda: Pyramid(6),
    "five units a block": lambda: nn.Sequential(*(Several(5) for _ in range(4))),
    "narrow": lambda: nn.Sequential(*(Several(1, 1 / 4) for _ in range(3))),
    "one block three times": lambda: Repeated(Several(2), 3, apart=False),
    "three inputs": lambda: Repeated(nn.Sequential(Several(2), Several(2)), 3, apart=True),
}


@pytest.mark.parametrize(("name", "coupling"), spread([*STACKS], ["re2tal", "bdia:1/16"]))
def test_what_checkpointing_the_same_blocks_would_need_is_estimated(name, coupling, monkeypatch):
    """Its clock counts what is timed, so that the machine's load decides nothing."""
    ticks = itertools.count()
    monkeypatch.setattr("revwire._budget.meter.perf_counter", lambda: float(next(ticks)))
    make = STACKS[name]
    torch.manual_seed(0)
    plan = revwire.plan(make().train(), INPUTS, coupling=coupling, memory_budget="least")
    torch.manual_seed(0)
    needed = peak_bytes(training_step(checkpointed(make().train(), plan), INPUTS))
    assert plan.forecast.checkpoint.peak_bytes == pytest.approx(needed, rel=0.1)
    assert "torch.utils.checkpoint around the same blocks: about " in str(plan)
    assert plan.forecast.checkpoint.seconds < plan.forecast.reversible.seconds


def test_the_plan_says_where_checkpointing_would_need_less():
    """The first stage of two blocks is the peak: their inputs cost less than two states and the gradients of both."""
    torch.manual_seed(0)
    plan = revwire.plan(swin3d_t(weights=None).train(), torch.randn(1, 3, 16, 56, 56), memory_budget="least", chunks=1)
    assert plan.forecast.checkpoint.peak_bytes < 0.97 * plan.forecast.peak_bytes
    assert "torch.utils.checkpoint around the same blocks of the original network would need less, about 26" in str(
        plan
    )
    assert "would need less" not in str(revwire.plan(transformer(), INPUTS, memory_budget="least", chunks=1))


@pytest.mark.parametrize(
    "options", [{"memory_budget": "1GiB"}, {"memory_budget": "least", "chunks": 1}], ids=["fits", "whole"]
)
def test_how_units_may_be_cut_is_looked_at_only_where_they_are_to_be(options, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was looked at")

    monkeypatch.setattr("revwire._budget.ways.probed", never)
    revwire.plan(transformer(2), INPUTS, **options)
    with pytest.raises(AssertionError, match="it was looked at"):
        revwire.plan(transformer(2), INPUTS, memory_budget="least")


def test_where_no_mix_fits_the_error_says_that_checkpointing_would_need_less():
    def refused(make):
        least = revwire.plan(make(), INPUTS, memory_budget="least", chunks=1).forecast.peak_bytes
        with pytest.raises(revwire.BudgetError, match="keeps none") as error:
            revwire.plan(make(), INPUTS, memory_budget=int(0.95 * least), chunks=1)
        return str(error.value)

    assert "; torch.utils.checkpoint around " in refused(STACKS["narrow"])
    assert "torch.utils.checkpoint" not in refused(transformer)


def test_the_plan_says_where_checkpointing_fits_a_budget_in_less_time():
    planned, fast = Point(100, 2.0), Point(110, 1.9)
    assert "fit as well, in about 95% of the time" in rival(120, planned, fast)[0]
    assert not rival(105, planned, fast)
    assert not rival(120, planned, Point(110, 1.99))
    assert not rival(None, planned, fast)
    assert "about 0.1 KiB" in rival(None, planned, Point(90, 3.0))[0]


@pytest.mark.parametrize(("blocks", "last"), [([0, 0, 1, 1], (1, 3)), ([0, 1, 2, 3], (0, 1, 2, 3)), ([0] * 4, (3,))])
def test_checkpointing_stops_early_once_for_each_block(blocks, last):
    costs = costs_of(4, 0)
    saved = sum(unit.relief if run in last else 0.25 + 0.5 for run, unit in enumerate(costs.units))
    assert checkpointing(costs, blocks).seconds == pytest.approx(costs.seconds - saved, rel=1e-12)


def test_a_host_of_many_units_is_no_block():
    """Checkpointing it would hold them all at once: nobody would, and nothing is said."""
    plan = revwire.plan(Several(12), INPUTS, memory_budget="least")
    assert plan.hosts == ("",)
    assert plan.forecast.checkpoint is None
    assert "torch.utils.checkpoint" not in str(plan)
    assert not rival(None, plan.forecast.planned, None)
