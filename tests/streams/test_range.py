"""Values that leave the range of the fixed-point streams, or are not finite: the forward goes on with right gradients,
and the next one is scaled for it.
"""

import copy
import pickle

import pytest
import torch

from cases import EXACT, FAST
from revwire._runtime import run as runner
from revwire._runtime.chunks import Cut
from revwire._runtime.range import Reach, ranges_held
from revwire.testing import Step, check_gradients
from steps import gradients, same
from toys import Linear, Oracle, PreNorm, inputs_of, mixed, stored, toy

FLOAT = [c for c in FAST if not c.exact]
SINGLE = pytest.mark.parametrize("case", [c for c in EXACT if c.dtype == torch.float32], ids=str)
FIXED = pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)

LEAVES = r"branches\.\d \(chain 0\): got a value of magnitude .*expected the streams to stay below .*scaled anew"
NOT_FINITE = r"branches\.\d \(chain 0\): got a value that is not finite; .*skip the step"


QUIET = pytest.mark.filterwarnings("ignore:branches")
"""For tests of what happens behind the warning."""


def grown(model, *places):
    """A toy whose units at these places make its values a thousand times as large."""
    with torch.no_grad():
        for place in places:
            for weight in model.branches[place].parameters():
                weight.mul_(1e3)
    return model


def assert_right(model, case, tolerance=1e-4):
    """A step is that of stored activations to the bit, and near that of an independent loop in floats."""
    x = inputs_of(model, case)
    with ranges_held([model.chain.reach]):
        out = model(x).detach()
        rebuilt = gradients(model, x)
        with stored(model):
            assert torch.equal(out, model(x))
            assert same(rebuilt, gradients(model, x))
        with torch.no_grad():
            assert torch.equal(out, model(x))
        true = Oracle(model)(x).detach()
        size = float(true.abs().amax())
        torch.testing.assert_close(out, true, rtol=0, atol=tolerance * size)
        for mine, theirs in zip(rebuilt, gradients(Oracle(model), x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * float(theirs.abs().amax()))


@SINGLE
@pytest.mark.parametrize("places", [(0,), (4,), (7,), (1, 3, 6), (2, 3)], ids=str)
@QUIET
def test_a_forward_that_leaves_the_range_has_right_gradients(case, places):
    assert_right(grown(toy(case, Linear), *places), case)


@FIXED
@pytest.mark.parametrize("mix", ["rrrrrr", "ssssss", "cccccc", "pppppp", "srcpsr"])
@QUIET
def test_so_has_one_of_units_in_all_modes(case, mix):
    assert_right(grown(mixed(case, mix, Linear), 1, 4), case)


@FIXED
@QUIET
def test_so_has_one_with_anchors_that_keeps_its_last_unit(case):
    model = grown(toy(case, Linear), 2, 6)
    model.chain.set_anchors(3)
    model.chain.keeps_last = True
    assert_right(model, case)


@FIXED
@QUIET
@pytest.mark.parametrize("mix", ["rrrrrr", "cccccc", "ssssss"])
def test_so_has_one_in_chunks(case, mix):
    """One sample leaves the range, and its chunk; the units are anchored for all."""
    model = grown(mixed(case, mix, Linear), 1, 4)
    model.chain.cuts = (Cut(3, 3, (0,), slices=False),) * 6
    x = inputs_of(model, case).detach()
    x[0] *= 1e-3
    x.requires_grad_()
    with ranges_held([model.chain.reach]):
        rebuilt = gradients(model, x)
        with stored(model):
            assert same(rebuilt, gradients(model, x))
    for mine, theirs in zip(rebuilt, gradients(Oracle(model), x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().amax()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FIXED
@QUIET
def test_so_has_a_network_of_16_bits(case, dtype):
    model = grown(toy(case, Linear), 3).to(dtype)
    with torch.no_grad():
        for branch in model.branches:
            branch.bias.mul_(1e-3)
        model.branches[3].weight.mul_(0.3)
    model.chain.reach = Reach(4e-3)  # float16 itself ends at 65504
    x = (inputs_of(model, case).detach() * 1e-3).to(dtype).requires_grad_()
    with ranges_held([model.chain.reach]):
        rebuilt = gradients(model, x)
        assert all(g.isfinite().all() for g in rebuilt)
        with stored(model):
            assert same(rebuilt, gradients(model, x))


@FIXED
@QUIET
def test_its_backward_can_be_repeated(case):
    model = grown(toy(case, Linear), 2, 5)
    loss = model(inputs_of(model, case)).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert same(first, torch.autograd.grad(loss, list(model.parameters())))


@FIXED
def test_leaving_it_warns_once_and_the_next_forward_is_scaled_for_it(case):
    model = grown(toy(case, Linear), 5)
    x = inputs_of(model, case)
    with pytest.warns(UserWarning, match=LEAVES):
        out = model(x)
    again = model(x)  # without a warning, in one tape
    assert model.chain.reach.begin() > 100 * model.chain.largest
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1.0)
    grown(model, 5)
    model(x)


@FIXED
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_same_function_is_computed(case, mode):
    model = grown(toy(case, Linear), 5)
    x = inputs_of(model, case).detach()
    with ranges_held([model.chain.reach]):
        with pytest.warns(UserWarning, match=LEAVES):
            true = model(x)
        with mode():
            assert torch.equal(model(x), true)


@FIXED
@QUIET
def test_gradients_can_begin_where_the_range_was_left(case):
    model = grown(toy(case, Linear), 1)
    with torch.no_grad():
        h = inputs_of(model, case).detach()
        for unit, branch in zip(model.units[:3], model.branches, strict=False):
            h = runner.apply(model.chain, unit, branch, h)[0]
    for unit, branch in zip(model.units[3:], model.branches[3:], strict=True):
        h = runner.apply(model.chain, unit, branch, h)[0]
    with ranges_held([model.chain.reach]):
        torch.testing.assert_close(h, model.oracle(inputs_of(model, case)), rtol=1e-4, atol=1.0)
    h.sum().backward()
    assert model.branches[0].weight.grad is None
    assert model.branches[3].weight.grad.isfinite().all()


# -- what is not finite ------------------------------------------------------------------------------------------------


@FIXED
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 3, 7, None])
def test_what_is_not_finite_gives_the_loss_and_gradients_of_the_original(case, value, place):
    """Where its gradients are finite, they are those of the plain loop; else they are not finite either."""
    model = toy(case, PreNorm)
    x = inputs_of(model, case).detach()
    if place is None:
        x[0, 0, 0] = value
    else:
        with torch.no_grad():
            model.branches[place].down.bias[2] = value
    x.requires_grad_()
    with pytest.warns(UserWarning, match=NOT_FINITE):
        mine = gradients(model, x)
    for got, true in zip(mine, gradients(Oracle(model), x), strict=True):
        assert torch.equal(got.isfinite(), true.isfinite())
        torch.testing.assert_close(got[got.isfinite()], true[true.isfinite()])
    with stored(model):
        again = gradients(model, x)
    for got, true in zip(mine, again, strict=True):
        torch.testing.assert_close(got, true, rtol=0, atol=0, equal_nan=True)
    assert model.chain.reach.begin() == model.chain.largest  # it says nothing of the range


@FIXED
def test_a_scaler_skips_the_step(case):
    model, scaler = toy(case, Linear), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    x = inputs_of(model, case).detach()
    with pytest.warns(UserWarning, match=NOT_FINITE):
        scaler.scale(model(x / 0).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert same(before.values(), model.state_dict().values())


@pytest.mark.parametrize("case", FLOAT, ids=str)
def test_nan_in_float_mode_gives_nan_as_without_revwire(case):
    model = toy(case, Linear)
    x = inputs_of(model, case).detach()
    x[0, 0, 0] = float("nan")
    out = model(x)
    out.sum().backward()
    assert out.isnan().any()
    assert model.branches[0].weight.grad.isnan().any()


# -- the range follows -------------------------------------------------------------------------------------------------


@FIXED
def test_a_range_that_is_not_left_stays_as_it_is(case):
    """Up to its end; so a forward that fits computes the same whatever came before."""
    model = toy(case, Linear)
    x = inputs_of(model, case)
    before = model(x).detach()
    bias = model.branches[0].bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.add_(15.0)  # in streams that end at 128
    Step.of(model, x)
    assert model.chain.reach.begin() == model.chain.largest
    with torch.no_grad():
        bias.copy_(kept)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        bias.add_(1e3)
        model(x)  # without gradients nothing follows, and nobody is warned
        model(x / 0)
    assert model.chain.reach.begin() == model.chain.largest


@FIXED
def test_a_range_that_grows_is_left_once_in_a_while(case):
    """Thousands of times as large after fourteen steps: scaled anew a few times, with one warning."""
    model, ranges = toy(case, Linear), set()

    def train():
        for _ in range(14):
            Step.of(model, inputs_of(model, case))
            ranges.add(model.chain.reach.begin())
            with torch.no_grad():
                model.branches[0].bias.mul_(2.2)
                model.branches[0].bias.add_(0.1)

    with pytest.warns(UserWarning, match=LEAVES) as warned:
        train()
    assert len(warned) == 1
    assert 2 <= len(ranges) <= 4
    with ranges_held([model.chain.reach]):
        check_gradients(model, (inputs_of(model, case),), tolerance=case.stored, stored=stored)


def test_reach_follows_what_left_it():
    reach = Reach(4.0)
    bound = 4.0 * 2**5
    reach.stay(bound / 4, bound)
    assert reach.careful == 0
    reach.stay(bound / 3, bound)
    assert reach.careful > 0
    assert reach.begin() == 4.0
    reach.leave(1e4)
    assert reach.largest == 4.0  # in the present forward
    assert reach.begin() == 1e4
    with ranges_held([reach]):
        reach.leave(1e6)
    reach.leave(float("nan"))
    assert reach.begin() == 1e4
    reach.leave(1e6)
    reach.leave(1e3)  # of a forward that began before
    assert reach.begin() == 1e6
    assert pickle.loads(pickle.dumps(reach)).begin() == 1e6


def test_reach_falls_slowly_and_not_below_the_example():
    reach = Reach(4.0)
    reach.leave(1e6)
    reach.begin()
    for _ in range(63):
        reach.stay(4.0, 2.0**5 * 1e6)
    assert reach.begin() == 1e6
    reach.stay(2e5, 2.0**5 * 1e6)  # needed after all
    for _ in range(63):
        reach.stay(4.0, 2.0**5 * 1e6)
    assert reach.begin() == 1e6
    reach.stay(4.0, 2.0**5 * 1e6)
    assert reach.begin() == 1e6 / 8
    for _ in range(1000):
        reach.stay(4.0, 2.0**5 * reach.begin())
    assert 4.0 <= reach.begin() < 4.0 * 64
    assert reach.careful == 0
    unknown = Reach(None)
    assert unknown.begin() == 0.0
    for _ in range(200):
        unknown.stay(1.0, 1e9)
    assert unknown.begin() == 0.0
