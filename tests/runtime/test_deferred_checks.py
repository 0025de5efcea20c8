"""On accelerators, checks are read at the end of a backward pass. Here the CPU is treated as one: the same errors, and
the same bits.
"""

import gc
import warnings
from contextlib import nullcontext

import pytest
import torch

from cases import EXACT, each_case, each_exact_case, each_fast_case
from revwire import RangeError, ReconstructionError
from revwire._runtime import run as runner
from revwire._runtime.entries import UnitRecord
from revwire._runtime.range import Reach, ranges_held
from revwire._streams import fused
from revwire.testing import Step, check_gradients
from stand_in import as_accelerator
from toys import Attention, Dropped, Linear, PreNorm, Toy, attention_extras, inputs_of, stored, toy

SINGLE = pytest.mark.parametrize("case", [c for c in EXACT if c.dtype == torch.float32], ids=str)


@pytest.fixture(autouse=True)
def deferred(monkeypatch):
    as_accelerator(monkeypatch)


@each_case
def test_gradients_are_the_same(case, monkeypatch):
    model = toy(case, Attention)
    inputs = (inputs_of(model, case), *attention_extras(case.dtype))
    step = check_gradients(model, inputs, tolerance=3 * case.stored, stored=stored)
    as_accelerator(monkeypatch, wanted=False)
    step.assert_like(Step.of(model, inputs))


@each_exact_case
def test_a_changed_weight_is_an_error_before_an_optimizer_can_run(case):
    model = toy(case, Linear)
    out = model(inputs_of(model, case))
    model.branches[3].weight.data.add_(0.1)
    with pytest.raises(
        ReconstructionError, match=r"branches\.3 \(chain 0\): .*(rebuilt input differs|computed other values)"
    ):
        out.sum().backward()


@each_fast_case
def test_the_unit_at_fault_is_named_first(case):
    model = toy(case, Linear)
    out = model(inputs_of(model, case))
    for i in (2, 5):
        model.branches[i].weight.data.add_(0.1)
    with pytest.raises(ReconstructionError, match=r"branches\.5 "):
        torch.autograd.grad(out.sum(), list(model.parameters()))


NOT_FINITE = r"branches\.3 \(chain 0\): got a value that is not finite; .*skip the step"


@SINGLE
def test_overflow_names_the_first_unit_at_the_end_of_the_chain(case):
    """Then each unit is read for a while, and the range may be left again."""
    model = toy(case, Linear)
    with torch.no_grad():
        model.branches[3].weight.mul_(1e6)
    x = inputs_of(model, case)
    with pytest.raises(RangeError, match=r"branches\.3 \(chain 0\): .*of magnitude .* or more; .*too late"):
        model(x)
    assert model.chain.reach.careful
    with ranges_held([model.chain.reach]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "branches")
        step = check_gradients(model, (x,), tolerance=3 * case.stored, stored=stored)
    assert all(g.isfinite().all() for g in step.gradients.values())


@SINGLE
def test_a_range_that_grows_is_left_without_an_error(case):
    """After a forward that comes near its end, each unit is read."""
    model = toy(case, Linear)

    def train():
        for _ in range(9):
            Step.of(model, inputs_of(model, case))
            with torch.no_grad():
                model.branches[0].bias.add_(0.1).mul_(3)

    with pytest.warns(UserWarning, match=r"branches\.\d \(chain 0\): got a value of magnitude .*scaled anew"):
        train()
    assert model.chain.reach.begin() > 2**5 * model.chain.largest


@SINGLE
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_nan_as_in_the_original(case, value):
    """An error would be one where the original network has none, and a scaler of gradients skips the step."""
    model = toy(case, Linear)
    with torch.no_grad():
        model.branches[3].weight[0] = value
    x = inputs_of(model, case)
    with pytest.warns(UserWarning, match=NOT_FINITE):
        out = model(x)
    assert out.isnan().all()
    assert all(g.isnan().all() for g in torch.autograd.grad(out.sum(), list(model.parameters())))
    with torch.no_grad():
        assert model(x).isnan().all()
    assert model.chain.reach.begin() == model.chain.largest


def early(model, x):
    for unit, branch in list(zip(model.units, model.branches, strict=True))[:4]:
        x, _ = runner.apply(model.chain, unit, branch, x)
    return x


@SINGLE
@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_value_out_of_range_never_passes_for_a_number(case, value):
    """A chain that is left early: under no_grad nobody reads the checks, with gradients its backward does."""
    model = toy(case, Linear)
    with torch.no_grad():
        model.branches[3].weight[0] = value
        found = early(model, inputs_of(model, case)).isnan()
        assert found[..., 0].all() if fused.INTERPRETED else found.all()  # kernels see to each value by itself
    for keep in (nullcontext(), stored(model)):
        model.chain.reach = Reach(3.9)
        with keep:
            out = early(model, inputs_of(model, case)).sum()
            if value == 1e6:
                with pytest.raises(RangeError, match=r"branches\.3 "):
                    out.backward()
            else:
                with pytest.warns(UserWarning, match=NOT_FINITE):
                    found = torch.autograd.grad(out, list(model.branches[:4].parameters()))
                assert all(g.isnan().all() for g in found)


@SINGLE
def test_after_an_error_the_model_goes_on(case):
    model = toy(case, PreNorm)
    x = inputs_of(model, case)
    true = Step.of(model, x)
    out = model(x)
    model.branches[3].up.weight.data.add_(1)
    with pytest.raises(ReconstructionError):
        out.sum().backward()
    model.branches[3].up.weight.data.copy_(toy(case, PreNorm).branches[3].up.weight.data)
    Step.of(model, x).assert_like(true)


@each_fast_case
def test_no_record_waits_for_the_end_of_the_backward(case):
    """With it, its anchor and extra inputs would: fingerprints alone do."""
    model = toy(case, Linear, depth=8)
    alive = []
    model.branches[0].weight.register_hook(
        lambda grad: alive.append(sum(type(o) is UnitRecord and o.unit in model.units for o in gc.get_objects()))
    )
    model(inputs_of(model, case)).sum().backward()
    assert alive[0] <= 2


@each_fast_case
def test_a_retained_graph_is_checked_each_time(case):
    torch.manual_seed(0)
    model = Toy([Dropped() for _ in range(4)], case)
    loss = model(inputs_of(model, case)).sum()
    loss.backward(retain_graph=True)
    model.branches[1].down.weight.data.mul_(2)
    with pytest.raises(ReconstructionError, match=r"branches\.1 "):
        loss.backward()
