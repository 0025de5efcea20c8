"""Checkpointed units whose branches give fewer bits than a state has: they keep that result, and all stays equal to the
bit.
"""

from functools import lru_cache, partial
from itertools import product

import pytest
import torch
from torch import nn

import revwire
import toys
from cases import FAST, each_exact_case, each_fast_exact_case, spread
from revwire._budget.costs import Costs
from revwire._budget.meter import measured
from revwire._budget.unit_cost import ChainSizes
from revwire._errors import ReconstructionError
from revwire._forwards.converted import chains_of
from revwire._runtime.entries import Result, UnitRecord
from revwire.measure import peak_bytes, saved_bytes
from revwire.measure._training_step import autocast_left
from steps import (
    SAMPLES,
    can_be_repeated,
    counted_runs,
    gradients,
    is_right,
    leaves_no_other_trace,
    records_of,
    same,
    weight_gradients,
)
from toys import (
    KINDS,
    LARGE,
    STREAM,
    Attention,
    Blocks,
    PreNorm,
    ResidualMlp,
    Toy,
    attention_extras,
    forms_of,
    modes_of,
    toy,
)

in_bfloat16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


class Narrow(PreNorm):
    """A branch in bfloat16, whatever is around it."""

    def forward(self, x):
        with in_bfloat16():
            return super().forward(x)


mixed = partial(toys.mixed, kind=Narrow)


def results_of(loss):
    return [r.result for r in records_of(loss) if isinstance(r, UnitRecord) and r.result is not None]


FOURS = ["".join(letters) for letters in product("scr", repeat=4)]


@pytest.mark.parametrize(("mix", "case"), spread(FOURS, [c for c in FAST if c.exact]), ids=str)
def test_every_mix_of_four_units_has_the_gradients_of_stored_activations(case, mix):
    assert is_right(mixed(case, mix), torch.randn(PreNorm.shape, requires_grad=True))


@each_exact_case
def test_every_coupling_comes_back_by_results(case):
    class Single(PreNorm):
        def forward(self, x):
            return super().forward(x.to(case.dtype)).to(torch.bfloat16)

    model, x = mixed(case, "rccrcc", kind=Single), torch.randn(LARGE, dtype=case.dtype, requires_grad=True)
    assert len(results_of(model(x).square().sum())) == 4
    assert is_right(model, x)


@each_fast_exact_case
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_state_and_buffers_are_those_of_stored_activations(case, kind, dtype):
    with torch.autocast("cpu", dtype=dtype):
        assert leaves_no_other_trace(mixed(case, "rccrssrcs", kind=kind), torch.randn(kind.shape, requires_grad=True))


@each_fast_exact_case
@pytest.mark.parametrize("kind", ["residual", "block"])
def test_a_network_of_16_bits_keeps_results_of_16_bits(case, kind):
    model = toy(case, depth=6, kind=kind).bfloat16()
    model.chain.modes = modes_of("rccrcc")
    x = torch.randn(LARGE).bfloat16().requires_grad_()
    assert [r.value.dtype for r in results_of(model(x).square().sum())] == [torch.bfloat16] * 4
    assert is_right(model, x)


@each_fast_exact_case
def test_it_costs_half_a_state_and_the_bits(case):
    def held(mix):
        model, x = mixed(case, mix), torch.randn(LARGE, requires_grad=True)
        return saved_bytes(lambda: model(x))

    for mix, count in {"rrrcr": 1, "rcrcr": 2, "rccrr": 2, "rrcsr": 1, "rrsscr": 1}.items():
        assert abs(held(mix) - held(mix.replace("c", "r")) - count * STREAM / 2) < count * SAMPLES


@each_fast_exact_case
def test_a_recompute_stops_as_early_as_with_a_kept_state(case, monkeypatch):
    model = mixed(case, "rrcrcr")
    runs = counted_runs(model, monkeypatch)
    gradients(model, torch.randn(LARGE, requires_grad=True))
    assert [runs.count(i) for i in range(6)] == [2, 2, 1, 2, 1, 2]


@each_fast_exact_case
@pytest.mark.parametrize("mix", ["rccr", "crsc", "rccc"])
def test_a_retained_backward_can_be_repeated(case, mix):
    assert can_be_repeated(mixed(case, mix), torch.randn(LARGE, requires_grad=True))


@each_fast_exact_case
def test_results_go_as_soon_as_they_have_served(case):
    model, x = mixed(case, "rcccc"), torch.randn(LARGE, requires_grad=True)
    loss, left = model(x).square().sum(), []
    records = records_of(loss)
    model.branches[2].down.weight.register_hook(lambda _: left.append([r.result is not None for r in records]))
    loss.backward()
    assert left == [[False, True, False, False, False]]


@each_fast_exact_case
def test_a_result_that_is_written_to_is_an_error(case):
    model, x = mixed(case, "rrcr"), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    (result,) = results_of(loss)
    result.value.add_(1)
    with pytest.raises(ReconstructionError, match=r"branches.2 .*the result of its branch was modified in place"):
        loss.backward()


@each_fast_exact_case
@pytest.mark.parametrize("unit", [0, 2], ids=["first", "checkpointed"])
def test_a_recompute_that_computes_other_values_is_an_error(case, unit):
    class Scaled(Narrow):
        scale = toys.Setting(1.0)

        def forward(self, x):
            with in_bfloat16():
                return self.down(torch.nn.functional.gelu(self.up(self.norm(x) * self.scale)))

    model, x = mixed(case, "rrcr", kind=Scaled), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    model.branches[unit].scale = 1.5
    with pytest.raises(ReconstructionError, match=rf"branches.{unit} .*its branch computed other values"):
        loss.backward()


@each_fast_exact_case
def test_a_state_that_comes_back_wrong_is_an_error(case):
    """Bits of a result that nobody wrote to, seen from PyTorch."""
    model, x = mixed(case, "rrcr"), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    (result,) = results_of(loss)
    result.value.data.view(torch.int16).flatten()[7] ^= 1 << 10
    with pytest.raises(ReconstructionError, match=r"branches.2 .*its rebuilt input differs"):
        loss.backward()


@each_fast_exact_case
def test_branches_with_side_outputs_keep_the_state(case):
    """A side output may be the result, and its receiver may write to it."""
    model = Toy([Attention() for _ in range(4)], case)
    model.chain.modes = ("reversible", "checkpointed", "checkpointed", "reversible")
    x, extras = torch.randn(Attention.shape, requires_grad=True), attention_extras()
    with in_bfloat16():
        loss = model(x, *extras)[0].square().sum()
        assert results_of(loss) == []
        assert is_right(model, x, *extras)


def test_of_a_part_of_a_larger_tensor_only_the_part_is_kept():
    whole = torch.randn(4, 30).bfloat16()
    part, row = Result.of(whole[:, :10]), Result.of(torch.randn(1, 30).bfloat16().expand(4, 30))
    assert torch.equal(part.value, whole[:, :10])
    assert part.value.untyped_storage().nbytes() == 80
    assert Result.of(whole.T).value.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert row.value.untyped_storage().nbytes() == 60


# -- models ------------------------------------------------------------------------------------------------------------


def blocks():
    return Blocks(
        lambda: nn.TransformerEncoderLayer(32, 4, 128, dropout=0.1, batch_first=True, norm_first=True), depth=5
    ).train()


INPUTS = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(0))


def step(model):
    """As in training: a forward under autocast, a backward pass outside of it."""
    with in_bfloat16():
        loss = model(INPUTS).float().square().mean()
    loss.backward()


def step_gradients(model):
    return weight_gradients(model, lambda: step(model))


@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_budget_that_is_planned_under_autocast_is_met(coupling, share):
    with in_bfloat16():
        limits = revwire.plan(blocks(), INPUTS, coupling=coupling, memory_budget="least", chunks=1).forecast
        budget = int(limits.peak_bytes * 1.01 + share * (limits.stored.peak_bytes - limits.peak_bytes))
        model = revwire.convert(blocks(), INPUTS, coupling=coupling, memory_budget=budget, chunks=1)
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    forecast = revwire.report(model).forecast
    peak = peak_bytes(lambda: step(model))
    assert forecast.peak_bytes <= budget
    assert peak <= budget * 1.02
    assert abs(forecast.peak_bytes / peak - 1) < 0.05
    planned = step_gradients(model)
    with revwire.stored_activations(model):
        assert same(planned, step_gradients(model))


@lru_cache
def planned_under_autocast(coupling):
    """Of a network of six units: its chain, a step, what it is said to cost."""
    x = torch.randn(64, 64, 8)
    torch.manual_seed(0)
    model = Blocks(lambda: ResidualMlp(8), depth=6)
    with in_bfloat16():
        revwire.convert(model, x, coupling=coupling, memory_budget="least", chunks=1)
    (chain,) = chains_of(model)

    def run():
        with in_bfloat16():
            loss = model(x).square().mean()
        loss.backward()

    plan = revwire.report(model)
    bits = chain.couplings[0].kept_bits * x.nbytes // 32
    (planned,) = plan.chains
    sizes = ChainSizes(
        tuple(bits if i else 0 for i, _ in enumerate(planned.units)), planned.stream_bytes // 2, exact=True
    )
    costs = Costs(measured([chain], run, torch.device("cpu")), [sizes])
    assert [u.run.result for u in costs.units] == [x.nbytes // 2] * 6
    return chain, run, costs


@pytest.mark.parametrize("mix", ["rrrrcc", "rrrrcr", "rrrccc", "rccccc", "rsrccr", "rcrcrc"])
@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
def test_a_unit_that_keeps_its_result_takes_what_was_predicted(mix, coupling):
    chain, run, costs = planned_under_autocast(coupling)
    chain.modes, chain.keeps_last = modes_of(mix), False
    run()
    assert peak_bytes(run) == pytest.approx(costs.forecast(forms_of(mix))[0], rel=0.02)


@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
def test_in_chunks_each_keeps_its_own(coupling):
    model = blocks()
    with in_bfloat16():
        revwire.convert(model, INPUTS, coupling=coupling, chunks=4, rewire="everywhere")
    whole = step_gradients(model)
    for chain in chains_of(model):
        chain.modes = tuple("reversible" if i % 3 == 0 else "checkpointed" for i in range(chain.length))
    with in_bfloat16():
        loss = model(INPUTS).square().mean()
    results = results_of(loss)
    assert len(results) == 4 * sum(mode == "checkpointed" for mode in chain.modes)
    assert {r.value.untyped_storage().nbytes() for r in results} == {INPUTS.nbytes // 8}
    assert same(whole, step_gradients(model))
    with revwire.stored_activations(model):
        assert same(whole, step_gradients(model))


@lru_cache
def planned_in_chunks(coupling, autocast):
    """Of a network of ten units in four chunks: the size of a state in bytes, its chain, a step, what it is said to
    cost.
    """
    model = Blocks(lambda: ResidualMlp(8), depth=10)
    x = torch.randn(64, 64, 8)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(x).square().mean()
        loss.backward()

    revwire.convert(model, x, coupling=coupling, chunks=4, rewire="everywhere")
    (chain,) = chains_of(model)
    bits = chain.couplings[0].kept_bits * x.nbytes // 32
    sizes = ChainSizes(tuple(bits if i else 0 for i in range(10)), x.nbytes, exact=True)
    return x.nbytes, chain, run, Costs(measured([chain], run, torch.device("cpu")), [sizes])


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
@pytest.mark.parametrize("mix", ["rrrrcrrrrr", "rcrcrcrcrc", "rrrrrrrrrc", "rccccccccc"])
def test_chunks_of_a_checkpointed_unit_take_what_was_predicted(mix, coupling, autocast):
    state, chain, run, costs = planned_in_chunks(coupling, autocast)
    chain.modes, chain.keeps_last = modes_of(mix), False
    run()
    peak = peak_bytes(run)
    assert (
        0.999 * peak < costs.forecast(forms_of(mix))[0] < 1.02 * peak + state
    )  # at most a state too many, which a reversible unit has


class Mixed(nn.Module):
    """A block that ends under another autocast than the one around it."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        y = self.up(self.norm(x))
        with torch.autocast("cpu", dtype=torch.float16):
            return x + self.down(y)


@pytest.mark.parametrize("mode", ["reversible", "checkpointed", "selective"])
def test_results_of_several_16_bit_dtypes(mode):
    x = torch.randn(8, 16)
    with in_bfloat16():
        model = revwire.convert(Blocks(Mixed, depth=4), x, rewire="everywhere")

    def found():
        model.zero_grad()
        with in_bfloat16():
            loss = model(x).float().square().sum()
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    with revwire.stored_activations(model):
        true = found()
    for chain in chains_of(model):
        chain.modes = (mode,) * chain.length
    assert same(true, found())


def test_the_autocast_around_a_call_is_left_and_entered_again():
    x, layer = torch.randn(4, 8), nn.Linear(8, 8)
    with in_bfloat16(), autocast_left(torch.device("cpu")) as entered:
        assert not torch.is_autocast_enabled("cpu")
        assert layer(x).dtype == torch.float32
        for _ in range(2):
            with entered():
                assert layer(x).dtype == torch.bfloat16
    with in_bfloat16():
        with pytest.raises(ValueError, match="stop"), autocast_left(torch.device("cpu")):
            raise ValueError("stop")
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32
    with autocast_left(torch.device("cpu")) as entered, entered():
        assert layer(x).dtype == torch.float32
    assert torch.autocast_increment_nesting() == 1
    torch.autocast_decrement_nesting()


def test_a_profile_under_autocast_is_that_of_a_step_that_leaves_it_for_its_backward():
    model = blocks()
    with in_bfloat16():
        revwire.convert(model, INPUTS, rewire="everywhere")
        profile = revwire.profile(model, INPUTS, repeats=1)
    measured_ = peak_bytes(lambda: step(model))
    assert profile.costs["revwire"].peak_bytes == pytest.approx(measured_, rel=0.02)
