"""`verify` measures, and leaves no trace."""

import pytest
import torch

import revwire
from toys import X, encoder, pre_norm, stack


def converted(**options):
    return revwire.convert(stack(pre_norm), X, **options)


@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/2", "bdia:1/16"])
def test_exact_streams_are_bit_exact(coupling):
    check = revwire.verify(converted(coupling=coupling, exact=True), X)
    assert check.bit_exact
    assert check.output_equal
    assert check.reconstruction_error == check.gradient_error == 0
    assert len(check.units) == 3
    assert {u.path for u in check.units} == {u.path for u in revwire.plan(stack(pre_norm), X).units}


def test_float_streams_have_an_error():
    check = revwire.verify(converted(coupling="re2tal", exact=False), X)
    assert not check.bit_exact
    assert check.output_equal
    assert 0 < check.reconstruction_error < 1e-14
    assert 0 < check.gradient_error < 1e-12
    assert check.inexact


def test_it_prints_and_exports():
    check = revwire.verify(converted(), X)
    assert str(check).startswith("bit-exact: 3 states rebuilt, largest error 0; ")
    assert check.to_dict()["bit_exact"] is True


def test_nothing_is_left_behind():
    model = converted()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    state, deterministic, example = (
        torch.get_rng_state(),
        torch.are_deterministic_algorithms_enabled(),
        X.clone().requires_grad_(),
    )
    revwire.verify(model, example)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert example.grad is None


def test_it_sees_a_branch_that_changes():
    calls = []

    def drifting(self, x):
        return x + self.leaf(x)

    class Leaf(torch.nn.Module):
        def forward(self, x):
            calls.append(1)
            return x * len(calls)

    model = revwire.convert(stack(drifting, lambda self: setattr(self, "leaf", Leaf())), X)
    with pytest.raises(revwire.ReconstructionError, match=r"its (branch computed other values|rebuilt input differs)"):
        revwire.verify(model, X.clone().requires_grad_())


def test_only_a_converted_model():
    with pytest.raises(revwire.ConversionError, match="not converted"):
        revwire.verify(stack(pre_norm), X)


def test_verification_in_evaluation_mode_and_with_frozen_weights():
    model = converted().eval()
    assert revwire.verify(model, X).bit_exact
    for p in model.parameters():
        p.requires_grad_(False)
    assert revwire.verify(model, X.clone().requires_grad_()).bit_exact


@pytest.mark.parametrize(
    ("coupling", "least", "most"), [("re2tal", 0.05, 10), ("bdia:1/16", 1e-4, 0.1), ("bdia:1/128", 1e-6, 0.01)]
)
def test_the_change_of_the_function_is_measured(coupling, least, most):
    torch.manual_seed(0)
    model, x = encoder(4, dropout=0.0), torch.randn(2, 5, 16)
    before = model(x).detach()
    check = revwire.verify(revwire.convert(model, x, coupling=coupling), x)
    expected = float((model(x).detach() - before).norm() / before.norm())
    assert check.function_change == pytest.approx(expected, rel=1e-4)
    assert least < check.function_change < most
    assert f"{check.function_change:.2%}" in str(check)
