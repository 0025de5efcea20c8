"""Couplings that are drawn at random, mixed, changed while training, scheduled, and helped by anchors."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import revwire
from cases import Case
from revwire import (
    Bdia,
    ConversionError,
    Coupling,
    CouplingError,
    Dr2Net,
    Momentum,
    RandomBdia,
    Re2TAL,
    ReconstructionError,
)
from revwire._forwards.converted import chains_of
from revwire._runtime import run as runner
from revwire.couplings.base import Coefficients, Rule, random_signs
from revwire.measure import saved_bytes
from steps import gradients, same
from toys import KINDS, WIDTH, Dropped, PreNorm, encoder, inputs_of, stored, toy

RANDOM = [
    Case(RandomBdia(g), True, torch.float32, 0.0, 0.0, "signs are drawn from the same random state")
    for g in (1 / 2, 1 / 4)
]


def network(depth=3):
    return nn.Sequential(nn.Linear(8, 16), encoder(depth), nn.Linear(16, 2))


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))


# -- random signs
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", RANDOM, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("form", ["residual", "block"])
def test_random_signs_are_exact(case, kind, form):
    model = toy(case, kind, kind=form).train()
    x = inputs_of(model, case)
    got = gradients(model, x)
    with stored(model):
        assert same(got, gradients(model, x))


def test_random_signs_are_those_of_the_formula():
    model = toy(RANDOM[0], PreNorm, depth=3).train()
    x = inputs_of(model, RANDOM[0])
    torch.manual_seed(5)
    signs = [torch.randint(0, 2, (x.shape[0], 1, 1), dtype=torch.float32) * 2 - 1 for _ in range(3)]
    before = now = x
    for branch, sign in zip(model.branches, signs, strict=True):
        gamma = sign / 2
        before, now = now, gamma * before + (1 - gamma) * now + (1 + gamma) * branch(now)
    torch.manual_seed(5)
    torch.testing.assert_close(model(x), now, rtol=1e-5, atol=1e-5)
    assert len({tuple(s.flatten().tolist()) for s in signs}) > 1


def test_random_signs_in_eval_mode_are_the_original_network():
    torch.manual_seed(0)
    model = network().eval()
    with torch.no_grad():
        before = model(X)
    original = gradients(model, X)
    revwire.convert(model.train(), X, coupling="bdia-random:1/2")
    check = revwire.verify(model, X)
    assert check.bit_exact
    assert len(check.units) == 6
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(X), before)
    assert same(gradients(model, X), original)


# -- one coupling for each unit
# -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "couplings", [[Re2TAL(), Bdia(1 / 16)], [Bdia(1 / 2), Momentum(1 / 8), RandomBdia(1 / 4)]], ids=["two", "three"]
)
def test_couplings_can_be_mixed_in_one_chain(couplings):
    torch.manual_seed(0)
    mixed = [couplings[i % len(couplings)] for i in range(6)]
    model = toy(Case(mixed[0], True, torch.float32, 0.0, 0.0, ""), Dropped, depth=6).train()
    model.chain.couplings = tuple(mixed)
    x = inputs_of(model, RANDOM[0])
    got = gradients(model, x)
    with stored(model):
        assert same(got, gradients(model, x))


def test_globs_choose_the_coupling_of_units_and_hosts():
    model = revwire.convert(network(), X, coupling={"*.self_attn": "re2tal", "1.layers.1": "bdia:1/2"})
    names = [c.name for c in chains_of(model)[0].couplings]
    assert names == ["re2tal", "bdia:1/16", "re2tal", "bdia:1/2", "re2tal", "bdia:1/16"]
    assert revwire.report(model).chains[0].coupling == "re2tal + bdia:1/16 + bdia:1/2"
    kept = [u.kept_bytes for u in revwire.report(model).units]
    assert kept == [0, 4 * 5 * 16 * 4 // 8, 0, 4 * 5 * 16 // 8, 0, 4 * 5 * 16 * 4 // 8]
    assert revwire.verify(model, X).bit_exact


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(
        ConversionError, match=r"got the glob 'blocks\.\*', which matches no unit; expected one that does: 1\.layers\.0"
    ):
        revwire.convert(network(), X, coupling={"blocks.*": "re2tal"})


# -- changes
# ------------------------------------------------------------------------------------------------------------------


def test_set_coupling_gives_what_a_fresh_conversion_gives():
    torch.manual_seed(0)
    model = network()
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    revwire.convert(model, X)
    gradients(model, X)
    revwire.set_coupling(model, "momentum:1/4")
    torch.manual_seed(1)
    revwire.convert(fresh, X, coupling="momentum:1/4")
    assert revwire.report(model) == replace(revwire.report(fresh), peaks=None)
    assert same(gradients(model, X), gradients(fresh, X))


def test_a_backward_that_waits_keeps_the_coupling_of_its_forward():
    torch.manual_seed(0)
    model = revwire.convert(network(), X, coupling="bdia:1/4")
    true = gradients(model, X, seed=0)
    torch.manual_seed(0)
    loss = model(X).square().sum()
    revwire.set_coupling(model, "re2tal")
    assert same(torch.autograd.grad(loss, list(model.parameters())), true)
    assert not same(gradients(model, X), true)


class PostActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return (x + self.b(self.a(x).relu())).relu()


def test_post_activation_blocks_move_their_activation_with_the_coupling():
    torch.manual_seed(0)
    model = nn.Sequential(*(PostActivation() for _ in range(3)))
    published = nn.Sequential(*(PostActivation() for _ in range(3)))
    published.load_state_dict(model.state_dict())
    revwire.convert(model, X)
    model(X)
    revwire.set_coupling(model, "re2tal")
    revwire.convert(published, X, coupling="re2tal")
    assert torch.equal(model(X), published(X))


def test_a_coupling_that_cannot_be_set_changes_nothing():
    model = revwire.convert(network(), X)
    before = revwire.report(model)
    with pytest.raises(CouplingError, match=r"got b = 0\.3; .* choose dr2net:1,1/4, or pass exact=False"):
        revwire.set_coupling(model, "dr2net:1,0.3")
    with pytest.raises(ConversionError, match="matches no unit"):
        revwire.set_coupling(model, {"nothing": "re2tal"})
    assert revwire.report(model) == before


def test_globs_leave_other_units_as_they_are():
    model = revwire.convert(network(), X, coupling="bdia:1/2")
    revwire.set_coupling(model, {"1.layers.2": "re2tal"})
    assert [c.name for c in chains_of(model)[0].couplings] == ["bdia:1/2"] * 4 + ["re2tal"] * 2


# -- schedules
# ----------------------------------------------------------------------------------------------------------------


def test_a_schedule_in_exact_streams_goes_by_powers_of_two_and_stays_exact():
    torch.manual_seed(0)
    model = revwire.convert(network(), X, coupling="dr2net:1,1/16")
    schedule = revwire.CouplingSchedule(model, "dr2net:0,1", total=4)
    betas = []
    for _ in range(6):
        schedule.step()
        betas.append(schedule.coupling.beta)
        assert chains_of(model)[0].couplings == (schedule.coupling,) * 6
        assert revwire.verify(model, X).bit_exact
    assert betas == [1 / 4, 1 / 2, 1, 1, 1, 1]
    assert schedule.coupling == Dr2Net(0.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ("linear", {"total": 4}, [0.25, 0.5, 0.75, 1]),
        ("cosine", {"total": 4}, [0.14644660940672627, 0.5, 0.8535533905932737, 1]),
        ("step", {"milestones": [2, 4]}, [0, 0.5, 0.5, 1]),
    ],
)
def test_shapes(shape, options, expected):
    model = revwire.convert(network(), X, coupling="momentum:1/2")
    schedule = revwire.CouplingSchedule(model, "momentum:1/8", shape=shape, **options)
    shares = []
    for _ in range(4):
        schedule.step()
        shares.append(schedule.share)
    assert shares == pytest.approx(expected)


def test_a_schedule_goes_on_from_its_state():
    model, again = (revwire.convert(network(), X, coupling="dr2net:1,1/16") for _ in range(2))
    schedule = revwire.CouplingSchedule(model, "dr2net:0,1", total=7)
    for _ in range(3):
        schedule.step()
    other = revwire.CouplingSchedule(again, "dr2net:1/2,1", total=2)
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert chains_of(again)[0].couplings == chains_of(model)[0].couplings
    schedule.step()
    other.step()
    assert other.coupling == schedule.coupling


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: revwire.CouplingSchedule(m, "re2tal", total=3),
            r"got a way to 're2tal'; expected a coupling of the same kind",
        ),
        (lambda m: revwire.CouplingSchedule(m, "bdia:1/2"), r"got total=None; expected the number of steps"),
        (
            lambda m: revwire.CouplingSchedule(m, "bdia:1/2", shape="step", milestones=[4, 2]),
            r"got milestones \[4, 2\]; expected ascending",
        ),
        (
            lambda m: revwire.CouplingSchedule(m, "bdia:1/2", shape="square", total=1),
            r"got shape 'square'; expected 'linear'",
        ),
        (
            lambda m: revwire.CouplingSchedule(m, "bdia:1/2", total=1).load_state_dict({"count": 1}),
            r"got a state with \['count'\]",
        ),
        (lambda m: revwire.convert(network(), X, anchors=0), r"anchors: got 0; expected a number of units"),
        (lambda m: revwire.convert(network(), X, tolerance=2), r"tolerance: got 2; expected a relative error"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(CouplingError, match=message):
        make(revwire.convert(network(), X))


def test_a_model_that_waits_for_its_first_call_cannot_be_scheduled_yet():
    with pytest.raises(CouplingError, match="waits for its first call; expected one that was called"):
        revwire.CouplingSchedule(revwire.convert(network()), "bdia:1/2", total=1)


# -- anchors
# ------------------------------------------------------------------------------------------------------------------


def drifting(spacing, depth=24, coupling=None):
    """A chain in float streams whose inverse multiplies errors by 4 a unit."""
    model = toy(Case(coupling or Bdia(1 / 4), False, torch.float32, 0, 0, ""), depth=depth)
    model.chain.set_anchors(spacing)
    return model


def test_without_anchors_a_drifting_chain_is_an_error():
    model = drifting(None)
    with pytest.raises(ReconstructionError, match="rebuilt input differs"):
        gradients(model, inputs_of(model, RANDOM[0]))


@pytest.mark.parametrize("spacing", [1, 3, 5])
def test_anchors_bound_the_drift(spacing):
    model = drifting(spacing)
    x = inputs_of(model, RANDOM[0])
    got = gradients(model, x)
    with stored(model):
        true = gradients(model, x)
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().amax()))


@pytest.mark.parametrize("coupling", [Bdia(1 / 16), Re2TAL()], ids=str)
@pytest.mark.parametrize("spacing", [1, 4])
def test_anchors_in_exact_streams_are_exact(coupling, spacing):
    model = toy(Case(coupling, True, torch.float32, 0, 0, ""), Dropped, depth=9).train()
    model.chain.set_anchors(spacing)
    x = inputs_of(model, RANDOM[0])
    got = gradients(model, x)
    with stored(model):
        assert same(got, gradients(model, x))


@pytest.mark.parametrize(("exact", "states"), [(False, 2), (True, 1)])
def test_anchors_keep_two_states_each_or_one_where_the_other_is_exact(exact, states):
    stream = 16 * 64 * WIDTH * 4
    held = []
    for spacing in (None, 4):
        model = toy(Case(Re2TAL(), exact, torch.float32, 0, 0, ""), depth=12)
        model.chain.set_anchors(spacing)
        held.append(saved_bytes(lambda m=model: m(torch.randn(16, 64, WIDTH, requires_grad=True))))
    assert abs(held[1] - held[0] - 2 * states * stream) <= 8192  # before units 4 and 8


def test_a_write_to_an_anchor_is_seen():
    model = drifting(2, depth=6)
    x = taps = [inputs_of(model, RANDOM[0])]
    for unit, branch in zip(model.units, model.branches, strict=True):
        taps.append(runner.apply(model.chain, unit, branch, taps[-1])[0])
    loss = x[-1].square().sum()
    with torch.no_grad():
        taps[2].mul_(2)
    with pytest.raises((ReconstructionError, RuntimeError), match=r"written in place|modified by an inplace operation"):
        loss.backward()


def test_automatic_anchors_let_a_drifting_coupling_run_in_float_streams():
    torch.manual_seed(0)
    model = network(depth=12)
    with pytest.raises(CouplingError, match="anchors='auto'"):
        revwire.convert(model, X, coupling="dr2net:1,0.3", exact=False)
    revwire.convert(model, X, coupling="dr2net:1,0.3", exact=False, anchors="auto")
    spacing = chains_of(model)[0].spacing
    assert 1 < spacing < 24
    check = revwire.verify(model, X)
    assert check.reconstruction_error < 1e-4
    assert check.gradient_error < 1e-3


def test_automatic_anchors_come_closer_where_states_drift():
    model = toy(Case(Bdia(1 / 4), False, torch.float32, 0, 0, ""), depth=24)
    model.chain.set_anchors(12, adapts=True, tolerance=1e-2)
    x = inputs_of(model, RANDOM[0])
    for _ in range(4):
        try:
            gradients(model, x)
        except ReconstructionError:
            continue
    assert model.chain.spacing < 12
    gradients(model, x)


@dataclass(frozen=True)
class SignsOfOne(Coupling):
    """b has a random sign; c is a number."""

    name = "signs"
    coefficients = Coefficients(0.0, 0.5, 1.0)

    def rule(self, kind, x):
        signs = random_signs(x)
        return Rule(1 - 0.5 * signs, 0.5, 1.0, bits=1, signs=signs)

    def merge(self, previous, current):
        return current


def test_a_coupling_of_ones_own_may_draw_the_signs_of_one_coefficient():
    x = torch.randn(4, 5, 16)
    model = revwire.convert(encoder(dropout=0.0), x, coupling=SignsOfOne())
    assert revwire.verify(model, x).bit_exact
