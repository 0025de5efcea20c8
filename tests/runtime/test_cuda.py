"""The main laws on an accelerator: device generators, autocast, deferred checks, and the caching allocator's own
statistics.
"""

import pytest
import torch
from torch import nn

from cases import FAST, each_case, each_fast_case
from revwire import RangeError, ReconstructionError
from revwire.measure import peak_bytes
from revwire.testing import check_gradients, check_modes
from toys import Attention, Convolution, Dropped, Linear, PreNorm, attention_extras, inputs_of, stored, toy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_device(tensor):
    return tensor.detach().cuda().requires_grad_(tensor.requires_grad)


@each_case
@pytest.mark.parametrize("branch", [PreNorm, Dropped, Convolution, Linear], ids=lambda b: b.__name__)
def test_gradients_are_those_of_stored_activations(case, branch):
    model = toy(case, branch).cuda()
    check_gradients(model, on_device(inputs_of(model, case)), tolerance=10 * case.stored, stored=stored)


@each_fast_case
def test_extra_inputs_and_side_outputs(case):
    model = toy(case, Attention).cuda()
    bias, scale, gates = attention_extras()
    inputs = (on_device(inputs_of(model, case)), on_device(bias), scale, [on_device(gates[0])])
    check_gradients(model, inputs, tolerance=10 * case.stored, stored=stored)


@each_fast_case
def test_outputs_are_the_same_in_every_grad_mode(case):
    model = toy(case, Dropped).cuda()
    check_modes(model, on_device(inputs_of(model, case, requires_grad=False)))


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, dtype):
    model = toy(case, Dropped).cuda()

    class Autocast(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            with torch.autocast("cuda", dtype=dtype):
                return self.model(x)

    check_gradients(Autocast(), on_device(inputs_of(model, case)), stored=lambda m: stored(model))


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_units_that_keep_what_their_branches_gave_in_16_bits(case, dtype):
    model, x = toy(case, Dropped, depth=6).cuda(), torch.randn(Dropped.shape, device="cuda", requires_grad=True)
    model.chain.modes = tuple("checkpointed" if mark == "c" else "reversible" for mark in "rccrcc")

    def gradients():
        torch.manual_seed(3)
        with torch.autocast("cuda", dtype=dtype):
            out = model(x)
        return torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()])

    rebuilt = gradients()
    with stored(model):
        assert all(map(torch.equal, rebuilt, gradients()))


@each_fast_case
def test_a_changed_weight_is_an_error_at_the_end_of_the_backward(case):
    model = toy(case, Linear).cuda()
    out = model(on_device(inputs_of(model, case)))
    model.branches[3].weight.data.add_(0.1)
    with pytest.raises(ReconstructionError, match=r"branches\.3 "):
        out.sum().backward()


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_value_out_of_range_names_its_unit(case, value):
    """An error, except where the original network has no numbers either."""
    model = toy(case, Linear).cuda()
    with torch.no_grad():
        model.branches[3].weight[0] = value
    x = on_device(inputs_of(model, case))
    if value == 1e6:
        with pytest.raises(RangeError, match=r"branches\.3 "):
            model(x)
    else:
        with pytest.warns(UserWarning, match=r"branches\.3 .*not finite"):
            model(x).sum().backward()
        assert all(p.grad.isnan().all() for p in model.parameters())


@each_fast_case
def test_the_peak_of_a_step_does_not_grow_with_depth_but_for_the_kept_bits(case):
    x = torch.randn(64, 64, 8, device="cuda", requires_grad=True)

    def peak(depth):
        model = toy(case, depth=depth).cuda()
        return peak_bytes(lambda: model(x).square().sum().backward(), "cuda")

    bits = case.coupling.kept_bits if case.exact else 0
    assert (
        peak(12) - peak(4)
    ) / 8 <= x.nbytes / 32 * bits + 16384  # the allocator rounds every small tensor up to 512 bytes
