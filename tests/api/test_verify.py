"""`verify` measures, and leaves no trace."""

import math
from collections import UserList

import pytest
import torch

import revwire
from revwire._api.verify import _largest_error
from revwire._forwards.base import standing_forward
from revwire._forwards.converted import chains_of
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
    calls = UserList()  # no recompute puts it back

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


@pytest.mark.parametrize("chunks", [None, 2])
def test_the_change_of_the_function_does_not_depend_on_chunks(chunks):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 16)
    model = revwire.convert(encoder(3, dropout=0.1), x, chunks=chunks)
    cuts = [chain.cuts for chain in chains_of(model)]
    assert any(any(c) for c in cuts if c) == bool(chunks)
    assert revwire.verify(model, x).function_change < 0.05  # other random numbers make it 0.2
    assert [chain.cuts for chain in chains_of(model)] == cuts


@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
def test_the_rewired_network_is_the_original_under_the_ordinary_rule(coupling):
    check = revwire.verify(converted(coupling=coupling), X)
    assert check.original_error == 0
    assert "(by 0 under its own rule)" in str(check)
    assert check.to_dict()["original_error"] == 0


def test_it_is_so_with_random_numbers_in_chunks_and_on_further_inputs():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 16)
    model = revwire.convert(encoder(3, dropout=0.1), x, chunks=2)
    check = revwire.verify(model, x, further_inputs=[x[:2], (torch.randn(1, 7, 16),), {"src": x}])
    assert check.original_error == 0


@pytest.mark.parametrize("others", [(), [X[:1]], [X, X[:1]]])
@pytest.mark.parametrize("least", [1, 2])
def test_a_wrong_rewiring_shows_on_the_inputs_for_which_it_is_wrong(least, others, monkeypatch):
    model = converted()
    last = standing_forward(model.blocks[-1])
    right = type(last).__call__

    def wrong(self, x):
        out = right(self, x)
        return 1.01 * out if self is last and len(x) <= least else out

    monkeypatch.setattr(type(last), "__call__", wrong)
    check = revwire.verify(model, X, further_inputs=others)
    assert check.bit_exact  # it is wrong in the same way each time
    seen = any(len(x) <= least for x in (X, *others))
    assert check.original_error == (pytest.approx(0.01, rel=1e-3) if seen else 0)
    assert vars(model.blocks[-1])["forward"] is last


def test_other_outputs_are_infinitely_wrong():
    for others in ([X, X], [X.float()], [X[:1]], [X * math.nan]):
        assert _largest_error(others, [X]) == math.inf
    assert _largest_error([X], [X]) == 0


def test_further_inputs_are_a_list():
    with pytest.raises(revwire.ConversionError, match=r"got Tensor as further_inputs; expected a list .*pass \[inputs"):
        revwire.verify(converted(), X, further_inputs=X)
