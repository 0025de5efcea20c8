"""The layout of a step that needs least: the forecast is what a step takes, and no other layout takes less."""

import copy
from functools import partial
from itertools import chain as joined
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import revwire
from revwire._capture.run import record
from revwire._paper import scratch
from revwire._paper.cuts import cut_of, peak
from revwire._paper.leanest import cuts_of, leanest
from revwire._paper.step import Step
from revwire.measure import peak_bytes

CLOSE = 0.03
"""By how much a forecast may miss: the loss, and the samples and records of units, are not in it."""


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deep(nn.Module):
    """Twelve layers of one width, behind a projection."""

    def __init__(self, width=48, depth=12):
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 8)
        self.layers = nn.Sequential(*(Layer(width) for _ in range(depth)))

    def forward(self, x):
        return self.head(self.layers(self.stem(x)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.b(torch.relu(self.norm(self.a(x)))))


class Shallow(nn.Module):
    """Stages of two blocks of different widths: chains too short to pay."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stages = nn.ModuleList(nn.Sequential(Block(w), Block(w)) for w in (16, 32, 64))
        self.downs = nn.ModuleList(nn.Conv2d(w, 2 * w, 2, 2) for w in (16, 32))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            x = self.downs[i](x) if i < 2 else x
        return self.head(x.mean((2, 3)))


MAKE = {
    "deep": lambda: (Deep(), torch.randn(8, 64, 8)),
    "shallow": lambda: (Shallow(), torch.randn(4, 3, 32, 32)),
    "encoder": lambda: (
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 128, 0.0, batch_first=True), 8, enable_nested_tensor=False
        ),
        torch.randn(4, 64, 32),
    ),
}


def made(name):
    torch.manual_seed(0)
    return MAKE[name]()


def step_on(model, x):
    return Step(record(model, (x,), {}))


def measured(model, x):
    return peak_bytes(lambda: model(x).square().mean().backward())


def checkpoint_blocks(model, names):
    for name in names:
        module = model.get_submodule(name)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
    return model


@pytest.mark.parametrize("name", MAKE)
def test_the_forecasts_are_what_a_step_takes(name):
    model, x = made(name)
    plan = revwire.plan(model, x)
    assert plan.peaks.stored == pytest.approx(measured(model, x), rel=CLOSE)
    blocks = {"deep": "layers.{}", "encoder": "layers.{}", "shallow": "stages.{}.{}"}[name]
    numbers = [(s, i) for s in range(3) for i in range(2)] if name == "shallow" else [(i,) for i in range(12)]
    names = [n for n in (blocks.format(*several) for several in numbers) if n in dict(model.named_modules())]
    rival = measured(checkpoint_blocks(made(name)[0], names), x)
    assert plan.peaks.checkpointing == pytest.approx(rival, rel=CLOSE)
    planned = measured(revwire.convert(made(name)[0], x), x)
    assert plan.peaks.planned == pytest.approx(planned, rel=CLOSE)
    assert planned < 1.01 * rival  # which keeps no samples


def test_a_deep_chain_pays():
    model, x = made("deep")
    plan = revwire.plan(model, x)
    assert [len(c.units) for c in plan.chains] == [12]
    assert plan.peaks.planned < 0.8 * plan.peaks.checkpointing


def test_short_chains_stay_and_their_function_is_what_it_was():
    model, x = made("shallow")
    plain = copy.deepcopy(model)
    revwire.convert(model, x)
    plan = revwire.report(model)
    assert plan.chains == ()
    assert plan.checkpointed
    assert all("rewire='everywhere'" in s.reason for s in plan.skipped)
    expected, got = plain(x), model(x)
    assert torch.equal(got, expected)
    for out in (expected, got):
        out.square().sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0)
    for p, q in zip(plain.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=0)


@pytest.mark.parametrize("name", MAKE)
def test_no_other_choice_of_checkpoints_takes_less(name):
    """Tried on all choices among a few calls; the search ends within a part of 2^12 of the stored step."""
    model, x = made(name)
    step = step_on(model, x)
    calls = [e.number for e in step.events[1:] if e.is_module]
    cuts = sorted(cuts_of(step, calls), key=lambda c: c.inner.all)[-9:]
    subsets = joined.from_iterable(combinations(cuts, k) for k in range(len(cuts) + 1))
    apart = [s for s in subsets if all(a.end <= b.begin or b.end <= a.begin for a, b in combinations(s, 2))]
    best = min(peak(step, s).all for s in apart)
    found = leanest(step, cuts, [], lambda *_: False)
    assert best <= found.peak.all <= best + peak(step, ()).all / 2**12 + 1
    assert peak(step, found.cuts).all <= found.peak.all


def test_a_checkpoint_that_lowers_nothing_is_not_made():
    model, x = made("deep")
    found = revwire.plan(model, x, rewire="leanest", exclude="*")
    assert found.checkpointed
    assert "head" not in found.checkpointed
    step = step_on(model, x)
    cuts = [cut_of(step, e.number) for e in step.events[1:] if e.is_module and e.target in list(model.layers)]
    kept = leanest(step, cuts, [], lambda *_: False).cuts
    assert all(peak(step, [c for c in kept if c is not one]).all > peak(step, kept).all for one in kept[-1:])


def test_a_module_is_checkpointed_in_all_of_its_calls_or_in_none():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(64, 64), Layer(64), nn.Linear(64, 64)

        def forward(self, x):
            x = self.again(self.first(x))
            return self.last(self.again(x.flip(0)))

    x = torch.randn(64, 16, 64)
    model = revwire.convert(Twice(), x)
    plan = revwire.report(model)
    assert measured(model, x) == pytest.approx(plan.peaks.planned, rel=CLOSE)


def test_a_profile_around_a_conversion_goes_on():
    model, x = made("shallow")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        revwire.plan(model, x)
        torch.ones(12345).exp()
    assert any(event.name == "aten::exp" for event in profile.events())


def test_kernels_that_refuse_are_left_out(monkeypatch):
    """As they do where determinism is asked for, or memory is short."""

    def refuse(*_, **__):
        raise RuntimeError("no such kernel")

    model, x = made("shallow")
    with_scratch = revwire.plan(model, x).peaks
    monkeypatch.setattr(scratch, "_backward", refuse)
    without = revwire.plan(model, x).peaks
    assert without.stored < with_scratch.stored
    monkeypatch.setattr(scratch, "_forward", refuse)
    assert revwire.plan(model, x).peaks == without


def test_convolutions_of_one_kernel_with_long_inputs_and_with_many_weights():
    """The scratch memory of the one grows with the input, that of the other with the weights."""
    torch.manual_seed(0)
    wide = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((8, 16), (16, 16)))
    deep = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((16, 512), (512, 512)))
    model = nn.Sequential(*wide, nn.MaxPool2d(32), *deep)
    x = torch.randn(2, 8, 128, 128)
    model(x).mean().backward()
    assert revwire.plan(model, x).peaks.stored == pytest.approx(measured(model, x), rel=CLOSE)


class Windows(nn.Module):
    """Attention within windows, for which PyTorch has no kernel that makes no map."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(3, 0, 1, 4, 2, 5)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)
        return x + self.out(attended.transpose(2, 3).flatten(-2))


class Overlapping(nn.Module):
    """Windows of which each holds half of the one before, without a copy."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(64, 32)

    def forward(self, x):
        batch, channels, length, width = x.shape
        h = self.up(x)
        windows = h.as_strided((batch, channels, length // 2 - 1, 4 * width), (*h.stride()[:2], 2 * width, 1))
        return x + F.pad(self.down(windows).flatten(2), (0, 2 * width)).view_as(x)


@pytest.mark.parametrize("kind", [Windows, Overlapping])
def test_what_the_backward_of_a_call_needs_for_itself(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(kind() for _ in range(3))), torch.randn(8, 4, 128, 16)
    drawn = torch.get_rng_state()
    peaks = revwire.plan(model, x).peaks
    assert torch.equal(torch.get_rng_state(), drawn)
    model(x).mean().backward()
    assert peaks.stored == pytest.approx(measured(model, x), rel=CLOSE)


def test_a_block_that_makes_a_layer_without_state_can_be_checkpointed():
    class Attention(Layer):
        def forward(self, x):
            scores = nn.Softmax(-1)(self.norm(x) @ x.mT)
            return x + self.down(torch.relu(self.up(scores @ x)))

    model = nn.Sequential(*(Attention(48) for _ in range(4)))
    plan = revwire.plan(model, torch.randn(8, 64, 48), exclude="*")
    assert plan.checkpointed
    assert plan.peaks.planned <= plan.peaks.checkpointing


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rewire": "everywhere"},
        {"coupling": "re2tal"},
        {"strict": True},
        {"include": "stages*"},
        {"anchors": 1},
        {"whole": "stages.?.?"},
        {"chunks": 2},
    ],
    ids=str,
)
def test_who_asks_for_units_gets_them_everywhere(options):
    model, x = made("shallow")
    assert [len(c.units) for c in revwire.report(revwire.convert(model, x, **options)).chains] == [2, 2, 2]


def test_the_leanest_of_what_is_asked_for():
    model, x = made("shallow")
    plan = revwire.plan(model, x, coupling="re2tal", rewire="leanest")
    assert plan.chains == ()


def test_no_checkpoints_where_they_are_forbidden():
    plan = revwire.plan(*made("shallow"), checkpoint=[])
    assert plan.checkpointed == ()
    assert plan.peaks.planned < plan.peaks.stored  # by the chains alone


def test_checkpoints_that_were_asked_for_are_made():
    model, x = made("shallow")
    plan = revwire.plan(model, x, checkpoint="stages.0.1")
    assert plan.checkpointed == ("stages.0.1",)
    assert {u.host for u in plan.units} <= {"stages.1.0", "stages.1.1", "stages.2.0", "stages.2.1"}


def test_a_model_that_is_frozen_or_tiny_tells_nothing():
    model, x = made("deep")
    frozen = revwire.plan(model.requires_grad_(False), x)
    assert [len(c.units) for c in frozen.chains] == [12]
    tiny = revwire.plan(made("shallow")[0], x.new_zeros(1, 3, 8, 8))
    assert [len(c.units) for c in tiny.chains] == [2, 2, 2]


def test_what_is_no_way_to_rewire():
    model, x = made("deep")
    with pytest.raises(
        revwire.ConversionError, match=r"rewire: got 'all'; expected 'leanest' .* 'everywhere', or None"
    ):
        revwire.plan(model, x, rewire="all")


def test_the_first_call_may_be_the_example():
    model, x = made("shallow")
    revwire.convert(model)
    model(x).sum().backward()
    assert revwire.report(model).chains == ()
    assert revwire.report(model).checkpointed


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_last_line_of_a_plan_is_the_net_gain():
    model, x = made("deep")
    last = str(revwire.plan(model, x)).splitlines()[-1]
    assert last.startswith("peak of a step: ")
    assert last.endswith("of checkpointing)")
    assert " before, " in last
    assert "with each block checkpointed, " in last
    everywhere = str(revwire.plan(*made("shallow"), rewire="everywhere")).splitlines()[-1]
    assert everywhere.endswith("with this plan: revwire gains nothing here, use checkpointing")


def test_a_plan_as_data_has_its_peaks():
    found = revwire.plan(*made("deep")).to_dict()["peaks"]
    assert found["planned"] < found["checkpointing"] < found["stored"]


def test_under_a_budget_the_last_line_is_of_what_was_planned():
    plan = revwire.plan(*made("deep"), memory_budget="4MiB")
    assert plan.peaks.planned == plan.forecast.peak_bytes
    assert plan.peaks.stored == revwire.plan(*made("deep")).peaks.stored
