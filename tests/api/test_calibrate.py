"""`revwire.calibrate` and ``convert(coupling="innovation", calibrate=...)``: predictors fitted to examples."""

import copy
import json

import pytest
import torch
from torch import nn

import revwire
from revwire import CalibrationWarning, CouplingError, Innovation
from revwire._api.calibrate import channels_of
from revwire._forwards.converted import chains_of
from revwire.couplings import Affine, coupling_from

WIDE = 16


class Block(nn.Module):
    """x + a matrix and a little that is not linear: what a predictor of rank 16 can learn but for that little."""

    def __init__(self, bend=0.05):
        super().__init__()
        self.mix, self.more, self.bend = nn.Linear(WIDE, WIDE), nn.Linear(WIDE, WIDE), bend
        with torch.no_grad():
            self.mix.weight.mul_(0.6)

    def forward(self, x):
        return x + (self.mix(x) + self.bend * torch.sin(3 * self.more(x)))


def network(depth=6, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDE), *(Block(**options) for _ in range(depth)), nn.Linear(WIDE, 2))


def walks(count=16, steps=32, seed=0):
    """Signals as real ones are: neighbours have to do with each other, and the parts are alike."""
    t = torch.linspace(0, 6, steps).view(1, -1, 1)
    phases, rates = torch.rand(2, count, 1, 4, generator=torch.Generator().manual_seed(seed)) * 3
    return torch.sin(t * (1 + rates) + phases)


X = walks()


def converted(coupling, net=None, **options):
    return revwire.convert(network() if net is None else net, X, coupling=coupling, rewire="everywhere", **options)


def change(model, x=X):
    return revwire.verify(model, x).function_change


def bits(model):
    return [c.kept_bits for chain in chains_of(model) for c in chain.couplings[:-1]]


def maps(model):
    return [c.map for chain in chains_of(model) for c in chain.couplings[:-1]]


def test_a_predictor_keeps_the_function_where_no_bit_is_kept():
    ours, plain = converted("innovation:1"), converted("re2tal")
    assert set(bits(ours)) == {0}
    assert min(p.predicted for p in maps(ours)) > 0.9
    assert change(ours, walks(seed=1)) < 0.2 * change(plain, walks(seed=1))
    assert change(ours) < change(converted("innovation:1", calibrate=()))
    assert revwire.verify(ours, X).bit_exact


def test_one_bit_is_nearer_than_none_and_than_one_bit_of_bdia():
    errors = [change(converted(c), walks(seed=1)) for c in ("innovation:1/2", "innovation:1", "bdia:1/2")]
    assert errors[0] == min(errors)


def test_without_a_number_each_unit_keeps_what_it_needs():
    easy, hard = (converted("innovation", network(bend=bend)) for bend in (0.01, 0.5))
    assert sum(bits(easy)) < sum(bits(hard))
    assert max(change(easy), change(hard)) < 0.2
    assert revwire.report(easy).chains[0].bits == max(bits(easy))
    assert [u.kept_bytes for u in revwire.report(easy).units] == [
        X[..., :1].numel() * WIDE * b // 8 for b in (*bits(easy), 0)
    ]


def test_the_plan_tells_its_peaks_while_units_keep_as_much_as_was_planned():
    examples = walks()
    planned = revwire.plan(network(), examples, coupling="innovation:1/2", rewire="everywhere")
    model = revwire.convert(network(), examples, coupling="innovation:1/2", rewire="everywhere", calibrate=[examples])
    assert planned.peaks is not None
    assert revwire.report(model).peaks == planned.peaks
    assert str(planned.peaks) in str(revwire.report(model))
    revwire.set_coupling(model, "innovation:1/4")  # another bit
    assert revwire.report(model).peaks is None


def test_calibration_leaves_the_model_as_it_was():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.norm, self.calls = network(), nn.BatchNorm1d(2), []

        def forward(self, x):
            self.calls.append(1)
            return self.norm(self.blocks(x).mT).mT + torch.rand(())

    model = Counting()
    model = revwire.convert(model, X, coupling="innovation:1/2", rewire="everywhere")
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    revwire.calibrate(model, [X, -X])
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert torch.equal(state, torch.get_rng_state())
    assert model.calls == []
    assert model.training


def test_the_keys_of_the_state_dict_stay():
    assert converted("innovation:1/2").state_dict().keys() == network().state_dict().keys()


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (torch.randn(16, 32, 4, generator=torch.Generator().manual_seed(0)), "random numbers"),
        (torch.ones(16, 32, 4), "constant"),
        (X[:1, :20], "fewer than 32 rows"),
    ],
    ids=["noise", "constant", "few"],
)
@pytest.mark.parametrize("coupling", ["innovation", "innovation:1"])
def test_examples_that_tell_nothing_make_it_bdia(example, reason, coupling):
    with pytest.warns(CalibrationWarning, match=reason):
        model = revwire.convert(network(), example, coupling=coupling, rewire="everywhere")
    assert set(bits(model)) == {4}
    bdia = revwire.convert(network(), X, coupling="bdia:1/16", rewire="everywhere")
    assert change(model) == pytest.approx(change(bdia), rel=0.3)
    revwire.calibrate(model, [X])  # what was asked for is remembered
    assert set(bits(model)) == {0} if coupling == "innovation:1" else sum(bits(model)) < 4 * 5


def test_random_tokens_are_known_from_text():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks = nn.Embedding(128, 4), network()

        def forward(self, tokens):
            return self.blocks(self.embed(tokens))

    text = torch.tensor([*(__doc__ + str(Block.__doc__) * 3).encode()]).clamp_max(127)[:192].view(2, -1)
    revwire.convert(Model(), text, coupling="innovation:1/2", rewire="everywhere")
    drawn = torch.randint(128, (2, 96), generator=torch.Generator().manual_seed(0))
    with pytest.warns(CalibrationWarning, match="random numbers"):
        revwire.convert(Model(), drawn, coupling="innovation:1/2", rewire="everywhere")


@pytest.mark.parametrize("options", [{"chunks": 2}, {"memory_budget": "least"}, {"whole": "*"}], ids=str)
def test_it_is_exact_however_units_run(options):
    model = converted("innovation:1/2", **options)
    assert revwire.verify(model, X).bit_exact
    with torch.autocast("cpu", torch.bfloat16):
        assert revwire.verify(model, X).bit_exact


@pytest.mark.parametrize("mode", ["stored", "checkpointed", "selective"])
def test_it_is_exact_in_every_mode(mode):
    model = converted("innovation:1/2")
    for several in (("reversible", mode) * 3, (mode,) * 6):
        chains_of(model)[0].modes = several
        assert revwire.verify(model, X).bit_exact


def test_a_saved_plan_has_the_predictors(tmp_path):
    model = converted("innovation")
    revwire.save_config(model, tmp_path / "config.json")
    again = converted_as(tmp_path / "config.json")
    assert torch.equal(again(X), model(X))
    assert [p.predicted for p in maps(again)] == [p.predicted for p in maps(model)]
    assert torch.equal(copy.deepcopy(model)(X), model(X))


def converted_as(path):
    return revwire.convert(network(), X, plan=revwire.load_config(path))


def test_a_plan_with_a_broken_predictor_is_refused(tmp_path):
    path = tmp_path / "config.json"
    revwire.save_config(converted("innovation:1/2"), path)
    data = json.loads(path.read_text())
    del data["chains"][0]["units"][0]["scheme"]["map"]
    path.write_text(json.dumps(data))
    with pytest.raises(CouplingError, match="innovation"):
        revwire.load_config(path)


def test_predictors_stay_when_epsilon_moves():
    model = converted("innovation:1/4")
    before = maps(model)
    revwire.set_coupling(model, "innovation:1")
    assert maps(model) == before
    assert set(bits(model)) == {0}
    schedule = revwire.CouplingSchedule(model, "innovation:1/4", total=2)
    schedule.step()
    assert schedule.coupling.name == "innovation:1/2"
    assert maps(model) == before
    assert revwire.verify(model, X).bit_exact


def test_it_trains_as_with_stored_activations():
    ours, theirs = converted("innovation:1/2"), converted("innovation:1/2")
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            with revwire.stored_activations(model) if model is theirs else torch.enable_grad():
                loss = model(X).square().mean()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]


def test_what_cannot_be_calibrated_is_said():
    with pytest.raises(CouplingError, match="innovation"):
        revwire.calibrate(converted("bdia"), [X])
    with pytest.raises(CouplingError, match="no examples"):
        revwire.calibrate(converted("innovation:1/2"), [])
    with pytest.raises(CouplingError, match="one example; expected an iterable"):
        converted("innovation:1/2", calibrate=X)
    with pytest.raises(CouplingError, match="in one chain"):
        converted({"1": "innovation:1/2", "*": "bdia"})
    with pytest.raises(CouplingError, match=r"epsilon = 0\.3"):
        converted("innovation:0.3")
    model = network()
    with pytest.raises(CouplingError, match="innovation"):
        converted("bdia", model, calibrate=[X])
    assert torch.equal(revwire.revert(converted("bdia", model))(X), network()(X))  # it was left as it was


def test_another_width_than_that_of_the_examples_is_an_error():
    p = maps(converted("innovation:1/2"))[0]
    with pytest.raises(CouplingError, match="expected 16 channels in dimension -1"):
        p.value(torch.zeros(2, 3, 8))


@pytest.mark.parametrize(
    ("shape", "modules", "dim"),
    [
        ((2, 8, 4, 4), [nn.Conv2d(8, 8, 3)], 1),
        ((2, 8, 8, 8), [nn.Conv2d(8, 8, 3)], 1),
        ((2, 8, 4, 4, 4), [nn.BatchNorm3d(8)], 1),
        ((2, 7, 7, 8), [nn.Linear(8, 16), nn.LayerNorm(8)], -1),
        ((2, 8, 8), [nn.Linear(8, 16)], -1),
        ((6, 8), [nn.Linear(8, 8)], -1),
        ((2, 5, 7), [nn.Linear(8, 8)], None),
    ],
    ids=str,
)
def test_channels_are_the_dimension_that_weights_know(shape, modules, dim):
    assert channels_of(torch.zeros(shape), modules) == dim


@pytest.mark.parametrize("layout", ["tokens", "images", "channels_last", "one sample"])
def test_an_affine_map_and_its_gradient(layout):
    generator = torch.Generator().manual_seed(0)
    down, up, bias = (torch.randn(*s, generator=generator) for s in ((6, 3), (3, 6), (6,)))
    shape, dim = ((4, 5, 6), -1) if layout == "tokens" else ((6,), -1) if layout == "one sample" else ((4, 6, 3, 3), 1)
    y = torch.randn(shape, generator=generator)
    y = y.to(memory_format=torch.channels_last) if layout == "channels_last" else y
    p, g = Affine(dim, down, up, bias), torch.randn(shape, generator=generator)
    at = y.detach().requires_grad_()
    expected = (bias + at.movedim(dim, -1) @ down @ up).movedim(-1, dim)
    torch.testing.assert_close(p.value(y), expected)
    torch.testing.assert_close(p.pulled(g, lambda: y), torch.autograd.grad(expected, at, g)[0])


def test_an_innovation_is_data_and_back():
    scheme = Innovation(None, Affine(1, torch.ones(4, 2), torch.ones(2, 4), torch.zeros(4), 0.5), 1 / 2)
    again = coupling_from(json.loads(json.dumps(scheme.to_plain())))
    assert (again.name, again.epsilon, again.map.dim, again.map.predicted) == ("innovation:1/2", None, 1, 0.5)
    assert torch.equal(again.map.down, scheme.map.down)
    assert Innovation(1 / 2).to_plain() == "innovation:1/2"
