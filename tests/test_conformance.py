"""The conformance kit finds what it is there to find."""

import doctest

import pytest
import torch
from torch import nn

import revwire
from cases import FAST
from revwire import Bdia, Re2TAL, testing
from revwire.testing import (
    Step,
    check_gradients,
    check_invertible,
    check_modes,
    check_revert,
    check_saved_bytes,
    saved_by_autograd,
)
from toys import Dropped, Leapfrog, encoder, inputs_of, stored, toy

CASE = FAST[1]


def network(depth=4):
    torch.manual_seed(0)
    return encoder(depth)


INPUT = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0))


def test_the_examples_in_its_documentation_run():
    assert doctest.testmod(testing).failed == 0


def test_float_inversion_of_bdia_is_found_wanting():
    with pytest.raises(AssertionError, match=r"bdia:1/8: rebuilt with relative error .* after 20 units"):
        check_invertible(Bdia(1 / 8), exact=False, units=20, tolerance=1e-4)


@pytest.mark.parametrize(("check", "coupling", "match"), [
    (testing.check_error_growth, Leapfrog(a=0.5, b=0.5), "error growth is 2"),
    (testing.check_consistent, Re2TAL(), r"c = 1\.0, expected 1 \+ b = 2"),
    (testing.check_consistent, Leapfrog(), r"a \+ b = -1"),
])  # fmt: skip
def test_false_declarations_are_found(check, coupling, match):
    with pytest.raises(AssertionError, match=match):
        check(coupling)


def test_a_wrong_gradient_is_found():
    model = toy(CASE)
    model.branches[2].up.weight.register_hook(lambda g: g if model.chain.stored else g * 1.001)
    with pytest.raises(AssertionError, match=r"branches\.2\.up\.weight: relative difference 0\.001"):
        check_gradients(model, inputs_of(model, CASE), stored=stored)


def test_a_missing_gradient_is_found():
    model = toy(CASE)
    step = Step.of(model, inputs_of(model, CASE))
    model.branches[1].up.bias.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"branches\.1\.up\.bias.* missing"):
        Step.of(model, inputs_of(model, CASE)).assert_like(step)


def test_another_random_stream_is_found():
    model = toy(CASE, Dropped)
    model.branches[1].register_forward_hook(lambda *_: None if model.chain.stored else torch.rand(1) and None)
    with pytest.raises(AssertionError, match="random generator"):
        check_gradients(model, inputs_of(model, CASE), stored=stored)


def test_a_dependence_on_the_grad_mode_is_found():
    model = toy(CASE)
    model.branches[1].register_forward_hook(lambda m, i, o: o if torch.is_grad_enabled() else o + 1)
    with pytest.raises(AssertionError, match="depend on the grad mode"):
        check_modes(model, inputs_of(model, CASE, requires_grad=False))


def test_a_step_leaves_the_model_as_found():
    model = toy(CASE, Dropped)
    model.branches[0].up.weight.grad = kept = torch.ones_like(model.branches[0].up.weight)
    state = torch.get_rng_state()
    Step.of(model, inputs_of(model, CASE))
    assert model.branches[0].up.weight.grad is kept
    assert model.branches[0].down.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_saved_bytes_are_counted_once_and_without_parameters():
    x, layer = torch.zeros(10, 8, requires_grad=True), nn.Linear(8, 8)
    assert saved_by_autograd(lambda: x * x) == 320
    assert saved_by_autograd(lambda: layer(x).exp()) == 640
    assert saved_by_autograd(lambda: x + 1) == 0


@pytest.mark.parametrize("coupling", ["re2tal", "bdia"])
def test_a_converted_model_conforms(coupling):
    x = INPUT.repeat(4, 8, 1)
    model = revwire.convert(network(), x, coupling=coupling)
    check_gradients(model, x)
    check_modes(model, x)
    held, before = check_saved_bytes(model, x)
    assert held < before / 2


def test_the_bytes_of_a_model_that_stores_are_found():
    x = INPUT.repeat(4, 8, 1)
    model = revwire.convert(network(), x)
    with revwire.stored_activations(model), pytest.raises(AssertionError, match="fewer were promised"):
        check_saved_bytes(model, x)


def test_revert_is_the_inverse_of_convert():
    check_revert(network(), INPUT)


def test_a_model_that_is_not_left_as_it_was_is_found(monkeypatch):
    def careless(model):
        revwire.revert(model)
        model.layers[1].norm1.eps = 1e-3
        return model

    monkeypatch.setattr(testing, "revert", careless)
    with pytest.raises(AssertionError, match=r"layers\.1\.norm1: an attribute has another value"):
        check_revert(network(), INPUT)
