"""How often the host waits for an accelerator: once per step, for all chains and units, whatever their modes. And what
must be told all the same.
"""

import copy
import gc
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import revwire
from cases import FAST, each_fast_case, each_fast_exact_case
from revwire import RangeError, ReconstructionError
from revwire._runtime.range import Reach
from revwire.testing import Step
from stand_in import as_accelerator, waits
from toys import LARGE, Dropped, Linear, PreNorm, ResidualMlp, Setting, inputs_of, mixed, stored, toy


@pytest.fixture(autouse=True)
def accelerated(monkeypatch):
    as_accelerator(monkeypatch)


def step_of(model, x):
    def step():
        model(x).float().square().sum().backward()

    return step


def warmed(step, times=2):
    """A step, after the first ones, in which is learned what is expected."""
    for _ in range(times):
        step()
    return step


def counted(step, monkeypatch):
    with waits(monkeypatch) as found:
        warm = step()
    del warm
    return sum(found.values()), dict(found)


@pytest.mark.parametrize("mix", ["rrrrrr", "rccrccrc", "rpprpr", "rscrsr", "ssss", "rrrrrrrrrrrr"])
@each_fast_case
def test_a_step_waits_once_whatever_the_modes_of_units(case, mix, monkeypatch):
    model, x = mixed(case, mix), torch.randn(LARGE, requires_grad=True)
    count, names = counted(warmed(step_of(model, x)), monkeypatch)
    assert count == (case.exact or "r" in mix), names


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"anchors": 2, "exact": False}], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("coupling", ["bdia:1/8", "bdia", "bdia-random", "re2tal", "momentum:1/8"])
def test_a_step_of_a_converted_network_waits_once(coupling, autocast, options, monkeypatch):
    if options.get("exact") is False:
        coupling = "re2tal"
    torch.manual_seed(0)
    model, x = nn.Sequential(*(ResidualMlp(8, 2) for _ in range(4))), torch.randn(4, 6, 8)
    revwire.convert(model, x, coupling=coupling, **options)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        count, names = counted(warmed(step_of(model, x)), monkeypatch)
    assert count == 1, names


class Stages(nn.Module):
    """Chains one behind the other."""

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Sequential(*(ResidualMlp() for _ in range(3))) for _ in range(count))
        self.between = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x):
        for stage, between in zip(self.stages, self.between, strict=True):
            x = between(stage(x))
        return x


def test_all_chains_of_a_model_are_read_together(monkeypatch):
    x = torch.randn(4, 6, 8)
    model = revwire.convert(Stages(3), x)
    assert len(revwire.report(model).chains) == 3
    assert counted(warmed(step_of(model, x)), monkeypatch)[0] == 1
    loss = model(x).sum()
    for stage in model.stages:
        stage[1].branch[1].weight.data.mul_(2)
    with pytest.raises(ReconstructionError, match=r"stages\.2\.1"):
        loss.backward()


@each_fast_exact_case
def test_forwards_that_wait_for_their_backward_together_wait_for_the_device_once(case, monkeypatch):
    model, x = toy(case), inputs_of(toy(case), case)

    def step():
        (model(x).sum() + model(x).sum() + model(x).sum()).backward()

    assert counted(warmed(step, 3), monkeypatch)[0] == 1


@each_fast_exact_case
def test_a_forward_without_gradients_waits_twice_however_deep_it_is(case, monkeypatch):
    """Its input may ask for a wider range; and whether it stayed in that is told at its end."""
    for depth in (3, 9):
        model = toy(case, depth=depth)
        warmed(step_of(model, inputs_of(model, case)))
        with torch.no_grad():
            assert counted(lambda model=model: model(inputs_of(model, case)), monkeypatch)[0] == 2


# -- what is told, and when --------------------------------------------------------------------------------------------


def trained(case, kind=Linear):
    """A toy whose backward is expected."""
    model = toy(case, kind)
    x = inputs_of(model, case)
    warmed(step_of(model, x))
    return model, x


def leave_the_range(model):
    with torch.no_grad():
        model.branches[3].weight.mul_(1e6)


LEFT = r"branches\.3 \(chain 0\): got a value of magnitude .* or more; .*too late"


@each_fast_exact_case
def test_an_overflow_is_an_error_before_an_optimizer_can_run(case):
    model, x = trained(case)
    leave_the_range(model)
    out = model(x)
    assert out.isnan().all()
    with pytest.raises(RangeError, match=LEFT):
        out.sum().backward()
    assert model.chain.reach.careful
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "branches")  # where it grows on
        step = Step.of(model, x)  # scaled for it
    assert all(g.isfinite().all() for g in step.gradients.values())


@each_fast_exact_case
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_an_evaluation_is_told_at_its_end(case, grad):
    model, x = trained(case)
    leave_the_range(model)
    model.eval()
    with torch.set_grad_enabled(grad), pytest.raises(RangeError, match=LEFT):
        model(x)


@each_fast_exact_case
@pytest.mark.parametrize("how", ["forward", "no_grad", "backward"])
def test_a_forward_whose_backward_never_comes_is_told_by_what_comes_next(case, how):
    model, x = trained(case)
    weight = model.branches[3].weight
    right = weight.detach().clone()
    leave_the_range(model)
    out = model(x)
    assert out.isnan().all()
    del out
    gc.collect()
    with torch.no_grad():
        weight.copy_(right)
    come = step_of(model, x) if how == "backward" else lambda: model(x)
    with torch.set_grad_enabled(how != "no_grad"), pytest.raises(RangeError, match=LEFT):
        come()
    assert not model.chain.reach.unread
    assert Step.of(model, x).gradients


@each_fast_exact_case
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "input"])
def test_what_is_not_finite_is_nan_as_in_the_original(case, value, where):
    model, x = trained(case)
    with torch.no_grad():
        (model.branches[3].weight if where == "weight" else x)[0] = value
    out = model(x)
    assert out.isnan().any()
    with pytest.warns(UserWarning, match=r"branches\.\d \(chain 0\): got a value that is not finite; .*skip the step"):
        found = torch.autograd.grad(out.nan_to_num().sum(), [x, *model.parameters()])
    assert all(g.isnan().all() for g in found)


@each_fast_exact_case
def test_an_input_out_of_range_never_passes_for_a_number(case):
    model, x = trained(case)
    wide = (x.detach() * 1e6).requires_grad_()
    out = model(wide)
    assert out.isnan().all()
    with pytest.raises(RangeError, match=r"branches\.0 \(chain 0\): .*too late"):
        out.sum().backward()
    step = Step.of(model, wide)  # scaled for it
    assert step.outputs[0].isfinite().all()
    with stored(model):
        step.assert_like(Step.of(model, wide))


@each_fast_exact_case
def test_a_wider_input_has_the_next_forward_look_at_its_own(case, monkeypatch):
    model, x = trained(case)
    wide = (x.detach() * 3).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        step, counts = step_of(model, wide), []
        for _ in range(3):
            counts.append(counted(step, patch)[0])
    assert counts == [1, 3, 1]
    assert model.chain.reach.largest == pytest.approx(float(wide.detach().abs().amax()))


@each_fast_exact_case
def test_a_loss_that_uses_inner_states_alone_has_no_gradient_of_what_is_not_finite(case):
    """The output of the chain, where gradients enter as a rule, is no part of the loss."""
    model, x = trained(case)
    with torch.no_grad():
        model.branches[1].weight[0] = float("nan")
    taps = []
    model.branches[3].register_forward_pre_hook(lambda module, inputs: taps.append(inputs[0]))
    model(x)
    with pytest.warns(UserWarning, match="not finite"):
        found = torch.autograd.grad(taps[0].sum(), list(model.branches[:3].parameters()))
    assert all(g.isnan().all() for g in found)


def test_a_copy_waits_for_no_backward_of_the_original():
    model, x = trained(FAST[-1])
    out = model(x)
    assert len(model.chain.reach.unread) == 1
    assert copy.deepcopy(model.chain.reach).unread == []
    out.sum().backward()
    assert model.chain.reach.unread == []
    assert copy.deepcopy(Reach(1.0)) == Reach(1.0)


# -- recomputes that stop early ----------------------------------------------------------------------------------------


class Scaled(PreNorm):
    """A branch with a number that nothing but its values shows."""

    scale = Setting(1.0)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x) * self.scale)))


@pytest.mark.parametrize("mix", ["rrcrrr", "rrprrr"])
@each_fast_exact_case
def test_a_recompute_that_stopped_and_computed_other_values_is_an_error(case, mix):
    model, x = mixed(case, mix, Scaled), torch.randn(LARGE, requires_grad=True)
    step = warmed(step_of(model, x))
    loss = model(x).square().sum()
    model.branches[2].scale = 1.001
    with pytest.raises(ReconstructionError, match=r"branches\.2 .*its branch computed other values"):
        loss.backward()
    assert model.chain.run_whole == {"branches.2"}
    step()


class Scratch(PreNorm):
    """Saves memory that nobody writes to, which happens to hold the same in forward and recompute."""

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            left = torch.empty(256)
            if not torch.are_deterministic_algorithms_enabled():  # else PyTorch fills it
                left.zero_()
            ctx.save_for_backward(left)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g + 0 * ctx.saved_tensors[0].numel()

    def forward(self, x):
        return self.down(self.Save.apply(self.up(x)))


@each_fast_exact_case
def test_scratch_space_is_known_though_it_held_the_same_twice(case):
    model, x = mixed(case, "rrcrrr", Scratch), torch.randn(LARGE, requires_grad=True)
    step_of(model, x)()
    assert model.chain.run_whole == {"branches.2"}
    plain = mixed(case, "rrcrrr", Dropped)
    step_of(plain, x)()
    assert plain.chain.run_whole == set()
