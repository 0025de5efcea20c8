"""Plans in files, and plans applied: the same layout without a measurement, or the first difference."""

import json
from dataclasses import fields, replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import revwire
from revwire import ConversionError, CouplingError, Plan
from revwire._forwards.converted import converted
from revwire._plan.saved import SCHEMA
from toys import Leapfrog, X, encoder, pre_norm, stack

INPUTS = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0))


def network(depth=4):
    torch.manual_seed(0)
    return nn.Sequential(encoder(depth, 16, 2, 64, dropout=0.0), nn.Linear(16, 2)).train()


def convnet():
    """Two chains, and between them a block that changes its shape."""

    class Block(nn.Module):
        def __init__(self, before, after):
            super().__init__()
            self.f = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.Conv2d(after, after, 1))
            self.short = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

        def forward(self, x):
            return self.short(x) + self.f(x)

    torch.manual_seed(0)
    return nn.Sequential(*(Block(a, b) for a, b in ((8, 8), (8, 8), (8, 16), (16, 16), (16, 16)))).train()


IMAGES = torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(0))


class Maps(nn.Module):
    """Attention that makes its map, so that its core may run in parts."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(attended.transpose(1, 2).flatten(-2))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = Maps()

    def forward(self, x):
        return x + self.attend(x)


def attention():
    torch.manual_seed(0)
    return nn.Sequential(*(Attends() for _ in range(4))).train()


class Twice(nn.Module):
    """Calls each of its blocks twice, which report what comes in: only what lies within them is rewired, and only in
    one of the calls.
    """

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.means = nn.Linear(8, 8), []
            self.inner = stack(lambda inner, x: x + inner.g(inner.f(x).tanh()), depth=2).blocks

        def forward(self, x):
            h = self.first(x.tanh())
            self.means.append(float(h.detach().mean()))
            for inner in self.inner:
                h = inner(h)
            return x + h

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.float()

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = block(x) * 1.0
        return x


def layout(model):
    """All by which a converted model runs."""
    state = converted(model)
    chains = [(c.name, c.couplings, c.exact, c.spacing, c.adapts, c.tolerance, c.keeps_last) for c in state.chains]
    forms = [(c.modes or ("reversible",) * c.length, c.cuts or (None,) * c.length) for c in state.chains]
    hosts = {
        name: [(s.key, s.posts, s.chain.name, s.index, s.path, s.later) for s in m.forward.slots]
        for name, m in model.named_modules()
        if hasattr(vars(m).get("forward"), "slots")
    }
    parted = [(p.forward.path, p.forward.count, p.chain, p.place) for p in state.parted]
    return chains, forms, hosts, [f.path for f in state.checkpointed], parted


def step(model, x):
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


CASES = {
    "default": (network, INPUTS, {}),
    "coupling": (network, INPUTS, {"coupling": {"0.layers.1*": "re2tal", "*": "bdia:1/8"}}),
    "floats with anchors": (network, INPUTS, {"coupling": "re2tal", "exact": False, "anchors": 3, "tolerance": 1e-3}),
    "anchors that adapt": (network, INPUTS, {"coupling": "re2tal", "exact": False, "anchors": "auto"}),
    "include": (network, INPUTS, {"include": "0.layers.[1-2]*"}),
    "whole": (network, INPUTS, {"whole": "0.layers.*"}),
    "chunks": (network, INPUTS, {"chunks": {"*self_attn": 2, "*": 4}}),
    "least": (network, INPUTS, {"memory_budget": "least"}),
    "a budget": (network, INPUTS, {"memory_budget": "250KiB"}),
    "auto": (network, INPUTS, {"memory_budget": "250KiB", "whole": "auto"}),
    "stays": (convnet, IMAGES, {"checkpoint": "stays"}),
    "least of two chains": (convnet, IMAGES, {"memory_budget": "least"}),
    "cores": (attention, INPUTS, {"chunks": 8}),
    "called twice": (Twice, INPUTS[..., :8], {"rewire": "everywhere"}),
}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    make, x, options = CASES[request.param]
    planned = revwire.convert(make(), x, **options)
    return make, x, planned, revwire.report(planned)


def test_a_plan_comes_back_from_its_file(case, tmp_path):
    *_, plan = case
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(str(tmp_path / "plan.json")).to_dict() == plan.to_dict() == json.loads(json.dumps(plan.to_dict()))


def test_an_applied_plan_makes_the_same_layout_and_the_same_gradients(case, monkeypatch):
    make, x, planned, plan = case
    monkeypatch.setattr("revwire._budget.meter.measured", None)  # nothing is measured
    monkeypatch.setattr("revwire._budget.ways.probed", None)
    again = revwire.convert(make(), x, plan=Plan.from_dict(plan.to_dict()))
    assert layout(again) == layout(planned)
    assert revwire.report(again) == plan
    for a, b in zip(step(again, x), step(planned, x), strict=True):
        assert torch.equal(a, b)


def test_other_data_and_other_sizes_make_the_same_layout(case):
    make, x, planned, plan = case
    for other in (
        torch.zeros_like(x),
        30 * torch.randn_like(x)[:2],
        torch.randn_like(x).repeat(2, *[1] * (x.dim() - 1)),
    ):
        assert layout(revwire.convert(make(), other, plan=plan)) == layout(planned)


def test_the_cases_have_what_they_are_for():
    def planned(name):
        make, x, options = CASES[name]
        return revwire.report(revwire.convert(make(), x, **options))

    assert {u.mode for u in planned("a budget").units} > {"reversible"}
    assert any(u.cut for u in planned("chunks").units)
    assert any(u.cores for u in planned("cores").units)
    assert planned("stays").checkpointed == ("2",)
    assert all(u.add[1] == -1 for u in planned("whole").units)
    assert len(planned("least of two chains").chains) == 2


def test_a_model_that_waits_for_its_first_call_takes_a_plan():
    plan = revwire.plan(network(), INPUTS, chunks=2)
    model = revwire.convert(network(), plan=plan)
    model(INPUTS[:2])
    assert revwire.report(model) == plan


# -- plans of other models ---------------------------------------------------------------------------------------------


def renamed():
    model = network()
    layer = model[0].layers[1]
    layer.other = layer.linear1
    del layer.linear1
    layer._ff_block = lambda x: layer.dropout2(layer.linear2(layer.dropout(layer.activation(layer.other(x)))))
    return model


class Scaled(nn.Module):
    """The network's blocks in another pattern."""

    def __init__(self, block):
        super().__init__()
        self.f, self.g = block.f, block.g

    def forward(self, x):
        return torch.relu(x + self.f(x))


@pytest.mark.parametrize(
    ("planned", "other", "x", "options", "difference"),
    [
        (
            lambda: network(4),
            lambda: network(3),
            INPUTS,
            {},
            r"has units in 0\.layers\.3, and .* no module of that name",
        ),
        (
            lambda: network(3),
            lambda: network(4),
            INPUTS,
            {},
            r"says nothing of 0\.layers\.3\.self_attn, a residual add",
        ),
        (
            network,
            renamed,
            INPUTS,
            {},
            r"chain 0, unit 3: the plan has 0\.layers\.1\.linear1 .*this model 0\.layers\.1\.oth",
        ),
        (
            lambda: nn.Sequential(*stack(pre_norm, depth=3).blocks),
            lambda: nn.Sequential(*map(Scaled, stack(pre_norm, depth=3).blocks)),
            X,
            {},
            r"chain 0, unit 0: the plan has 0\.\w \(residual, in 0\), this model 0\.f \(post-activation, in 0\)",
        ),
        (convnet, lambda: nn.Sequential(*convnet()[:2], nn.Identity(), *convnet()[:2]), IMAGES, {}, r"chain 0, unit 2"),
        (
            convnet,
            lambda: Uncalled(*convnet()[:2], nn.Conv2d(8, 16, 1), *convnet()[3:]),
            IMAGES,
            {"checkpoint": "stays"},
            r"the plan checkpoints what cannot be checkpointed here",
        ),
        (attention, lambda: without_maps(attention()), INPUTS, {"chunks": 8}, r"runs the core of 0\.attend in parts"),
    ],
    ids=["shallower", "deeper", "renamed", "another pattern", "one chain for two", "not called", "no core"],
)
def test_a_plan_of_another_model_is_refused_with_the_first_difference(planned, other, x, options, difference):
    plan = revwire.report(revwire.convert(planned(), x, **options))
    model = other()
    model = model.double() if x.dtype == torch.float64 else model
    before = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(
        ConversionError, match=rf"got the plan of another Sequential: .*{difference}.*expected a plan of"
    ):
        revwire.convert(model, x, plan=plan)
    assert [dict(vars(m)) for m in model.modules()] == before


class Uncalled(nn.Sequential):
    """The blocks of the network, with a product by the weight of the third in place of a call of it."""

    def forward(self, x):
        x = torch.einsum("oi,bihw->bohw", self[2].weight[:, :, 0, 0], self[1](self[0](x)))
        return self[4](self[3](x))


def without_maps(model):
    for block in model:
        block.attend.forward = block.attend.out.forward
    return model


# -- what is no plan, or too much --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("coupling", "re2tal"),
        ("exact", True),
        ("include", "*"),
        ("exclude", "0*"),
        ("whole", "0*"),
        ("anchors", 2),
        ("tolerance", 1e-3),
        ("chunks", 1),
        ("checkpoint", []),
        ("strict", True),
        ("memory_budget", "least"),
        ("rewire", "everywhere"),
    ],
)
def test_other_options_beside_a_plan_are_refused(option, value):
    plan = revwire.plan(network(), INPUTS)
    with pytest.raises(
        ConversionError, match=rf"got both plan= and {option}=.*expected one of them.*leave {option}= out"
    ):
        revwire.convert(network(), INPUTS, plan=plan, **{option: value})


def test_defaults_beside_a_plan_are_not_options():
    plan = revwire.plan(network(), INPUTS)
    model = revwire.convert(network(), INPUTS, plan=plan, coupling="bdia", strict=False, memory_budget=None)
    assert revwire.report(model) == plan


def test_every_option_of_convert_is_the_plans():
    from inspect import signature

    tried = {m.args[1][i][0] for m in test_other_options_beside_a_plan_are_refused.pytestmark for i in range(12)}
    assert tried == {*signature(revwire.convert).parameters} - {"model", "example_inputs", "plan", "calibrate"}


@pytest.mark.parametrize("plan", ["plan.json", {}, revwire.plan])
def test_what_is_no_plan_is_refused(plan):
    with pytest.raises(ConversionError, match=r"plan: got .*; expected a revwire\.Plan, as revwire\.plan"):
        revwire.convert(network(), INPUTS, plan=plan)


def edited(change):
    data = revwire.plan(network(2), INPUTS, chunks=2).to_dict()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d.update(schema=SCHEMA + 1, revwire="9.9"),
            r"schema version 2, written by revwire 9\.9; expected 1",
        ),
        (lambda d: d.pop("schema"), r"got data without a schema version; expected a plan"),
        (lambda d: d.update(colour="red"), r"got plan with 'colour', which is not known here"),
        (lambda d: d.pop("model"), r"got plan with no 'model'"),
        (
            lambda d: d["chains"][0]["units"][1].update(mode="quick"),
            r"plan\.chains\[0\]\.units\[1\]\.mode = 'quick'; exp",
        ),
        (lambda d: d["chains"][0]["units"][1].update(shape=3), r"units\[1\]\.shape = 3; expected a list"),
        (lambda d: d["chains"][0]["units"][1].update(add=["a"]), r"units\[1\]\.add = \['a'\]; expected a list of 2"),
        (lambda d: d["chains"][0].update(exact=1), r"chains\[0\]\.exact = 1; expected bool"),
        (lambda d: d["chains"][0]["units"][0].update(cut=7), r"units\[0\]\.cut = 7; expected a dict"),
        (lambda d: d["chains"].__setitem__(0, None), r"plan\.chains\[0\] = None; expected a dict"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(change, message, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(edited(change)))
    with pytest.raises(ConversionError, match=rf"plan\.json: got .*{message}|plan\.json: {message}"):
        Plan.load(path)


def test_a_file_that_is_no_json_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\x80\x04\x95pickled")
    with pytest.raises(ConversionError, match=r"got a file that is no JSON .*; expected one that Plan\.save wrote"):
        Plan.load(path)


def test_fields_that_a_file_has_not_are_their_defaults():
    plan = revwire.plan(network(2), INPUTS)
    data = plan.to_dict()
    del data["trained"], data["peaks"]
    assert Plan.from_dict(data) == replace(plan, peaks=None)
    assert {f.name for f in fields(Plan)} == {*plan.to_dict()} - {"schema", "revwire", "coverage", "bytes_saved"}


def test_couplings_of_ones_own_are_named_when_a_plan_is_loaded(tmp_path):
    own = Leapfrog(0.25, 0.75, 1.75)
    plan = revwire.plan(network(2), INPUTS, coupling=own, exact=False)
    assert revwire.report(revwire.convert(network(2), INPUTS, plan=plan)) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", couplings=[own]) == plan
    with pytest.raises(
        CouplingError, match=r"scheme 'leapfrog', which is no coupling of revwire's.*couplings=\[\.\.\.\]"
    ):
        Plan.load(tmp_path / "plan.json")


# -- as HTML -----------------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_a_notebook_shows_the_table():
    class Odd(nn.Sequential):
        pass

    Odd.__name__ = "Net<8>"
    plan = revwire.plan(Odd(*network()), INPUTS)
    found, lines = Cells(plan._repr_html_()), str(plan).splitlines()
    assert found.cells[:4] == ["chain", "host", "units", "pattern"]
    assert found.cells[8:11] == [*lines[3].split("  ")[0:1], "0.layers.0 .. 3", "8"]
    assert "Net<8>: " in found.text


def test_a_notebook_shows_a_plan_without_chains():
    plan = revwire.plan(nn.Sequential(nn.Linear(16, 16)), INPUTS)
    assert not Cells(plan._repr_html_()).cells
    assert "nothing is rewired" in Cells(plan._repr_html_()).text
