"""Values that leave the range of the fixed-point streams, or are not finite: an error that names the unit and the
remedy.
"""

import pytest
import torch

from cases import EXACT, FAST
from revwire import RangeError
from revwire._runtime import run as runner
from toys import Linear, inputs_of, toy

FLOAT = [c for c in FAST if not c.exact]


@pytest.mark.parametrize("case", [c for c in EXACT if c.dtype == torch.float32], ids=str)
def test_overflow_names_the_unit(case):
    model = toy(case, Linear)
    with torch.no_grad():
        model.branches[5].weight.mul_(1e6)
    with pytest.raises(RangeError, match=r"branches\.5 \(chain 0\): .*of magnitude .* or more.*exact=False"):
        model(inputs_of(model, case))


@pytest.mark.parametrize("case", [c for c in EXACT if c.dtype == torch.float32], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_names_the_unit(case, value):
    model = toy(case, Linear)
    with torch.no_grad():
        model.branches[5].bias[2] = value
    with pytest.raises(RangeError, match=r"branches\.5 \(chain 0\): got a value that is not finite"):
        model(inputs_of(model, case))
    with pytest.raises(RangeError, match=r"branches\.0 \(chain 0\): got a largest magnitude of"):
        model(inputs_of(model, case).detach() + value)


@pytest.mark.parametrize("case", [c for c in EXACT if c.dtype == torch.float32], ids=str)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_a_network_may_leave_the_range(case, mode):
    """Nothing has to be rebuilt, so it goes on in float streams; so does one that is given a NaN."""
    model = toy(case, Linear)
    with torch.no_grad():
        model.branches[5].weight.mul_(1e6)
    x = inputs_of(model, case).detach()
    with mode():
        torch.testing.assert_close(model(x), model.oracle(x), rtol=1e-4, atol=1.0)
        x = x + float("nan")
        assert model(x).isnan().all()


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_gradients_cannot_begin_where_the_range_was_left(case):
    model = toy(case, Linear)
    with torch.no_grad():
        model.branches[1].weight.mul_(1e8)
        h = inputs_of(model, case).detach()
        for unit, branch in zip(model.units[:3], model.branches, strict=False):
            h = runner.apply(model.chain, unit, branch, h)[0]
    with pytest.raises(RangeError, match=r"branches\.1 \(chain 0\): got a value"):
        runner.apply(model.chain, model.units[3], model.branches[3], h)


@pytest.mark.parametrize("case", FLOAT, ids=str)
def test_nan_in_float_mode_gives_nan_as_without_revwire(case):
    model = toy(case, Linear)
    x = inputs_of(model, case).detach()
    x[0, 0, 0] = float("nan")
    out = model(x)
    out.sum().backward()
    assert out.isnan().any()
    assert model.branches[0].weight.grad.isnan().any()
