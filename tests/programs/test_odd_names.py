"""Names of modules and of keywords are data: whatever they are, they are looked up, and never run."""

import builtins

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

import revwire
from revwire._programs.compiled import Spelled, is_plain
from steps import gradients, same
from toys import Plain, X, noise

ODD = [
    'b"), revwire_ran(1), getattr(self, "training',
    "b'), revwire_ran(1), getattr(self, 'training",
    "b\n    revwire_ran(1)\n",
    "# COUNTER: 0",
    "\\",
    '"',
    " ",
    "class",
    "None",
    "self",
    "self_",
    "host",
    "x",
    "extra_0",
    "input_0",
    "torch",
    "odd_name_0",
    "0",
    "1a",
    "ﬁ",
    "fi",
    "²",
    "{x}",
    "forward",
]
NAMES = st.text(min_size=1, max_size=12).filter(lambda n: "." not in n and not hasattr(nn.ModuleDict(), n))


class Named(nn.Module):
    """x + F(x) for each layer, where what holds the layers, and what they hold, has the same names."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict(
            {n: nn.ModuleDict({n: nn.Linear(8, 8)}) for n in names if not hasattr(nn.ModuleDict, n)}
        )
        self.scales = nn.Module()
        for name in self.layers:
            if not hasattr(self.scales, name):
                self.scales.register_parameter(name, nn.Parameter(torch.rand(8)))

    def forward(self, x):
        for name, layer in self.layers.items():
            x = x + layer[name](x).tanh() * getattr(self.scales, name, 0.5)
        return x


@settings(deadline=None, max_examples=25)
@given(st.lists(NAMES, min_size=2, max_size=4, unique=True))
@example(ODD)
@example(["self", "self_", "self__1"])
def test_a_model_with_odd_names_is_converted_as_any_other(names):
    ran = []
    builtins.revwire_ran = ran.append
    try:
        model, x = Named(names).double(), X.clone().requires_grad_()
        before = [model(x).detach(), *gradients(model, x)]
        revwire.convert(model, x, coupling=Plain(), exact=False, tolerance=0.99)
        assert len(revwire.report(model).units) == len(model.layers)
        with revwire.stored_activations(model):
            assert same([model(x).detach(), *gradients(model, x)], before)
        assert not ran
    finally:
        del builtins.revwire_ran


def test_odd_names_are_rebuilt_exactly():
    model = revwire.convert(Named(ODD).double(), X)
    assert revwire.verify(model, X).bit_exact
    assert same(gradients(revwire.revert(model), X), gradients(Named(ODD).double(), X))


class ByName(nn.Module):
    """A layer that takes its input by a keyword of any name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.linear = name, nn.Linear(8, 8)

    def forward(self, **inputs):
        return self.linear(inputs[self.name])


class Calling(nn.Module):
    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.layers = name, nn.ModuleList([ByName(name) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(**{self.name: x}).tanh()
        return x


@pytest.mark.parametrize("name", [*(n for n in ODD if n != "self"), "x = revwire_ran(1), y", ""])
def test_names_of_keywords_are_data_too(name):
    model, x = Calling(name).double(), noise(2, 8)
    before = gradients(model, x)
    revwire.convert(model, x, coupling=Plain(), exact=False, tolerance=0.99)
    assert len(revwire.report(model).units) == 3
    with revwire.stored_activations(model):
        assert same(gradients(model, x), before)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a_1", True), ("_", True), ("ﬁ", False), ("if", False), ("a b", False), ("", False), ("a\n", False)],
)
def test_what_a_plain_name_is(name, plain):
    assert is_plain(name) is plain
    assert Spelled(len, name).__name__ == (name if plain else "call")
