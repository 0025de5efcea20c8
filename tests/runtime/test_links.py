"""How the units of a chain find each other: grad modes, views, forks, entering late and leaving early, copies of a
tensor.
"""

import copy
import io

import pytest
import torch

from cases import each_exact_case, each_fast_case
from revwire._runtime import run as runner
from revwire._runtime.entries import ViewRecord
from revwire._streams.floats import FloatStreams
from toys import SHAPE, WIDTH, Linear, Weightless, inputs_of, run_units, stored, toy


def grads(model, out, *more):
    return torch.autograd.grad(out.square().sum(), [*model.parameters(), *more], allow_unused=True)


def assert_close(got, true, case):
    for a, b in zip(got, true, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=10 * case.stored * float(b.abs().amax()))


def same_with_stored_activations(model, case, function, x):
    """``function(model, x)`` gives (a tensor, further tensors whose gradients count)."""
    got = function(model, x)
    got = (got[0], grads(model, got[0], x, *got[1:]))
    with stored(model):
        true = function(model, x)
        true = (true[0], grads(model, true[0], x, *true[1:]))
    assert torch.equal(got[0], true[0])
    assert_close(got[1], true[1], case)


@each_fast_case
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_the_function_does_not_depend_on_where_gradients_begin(case, first):
    model = toy(case)
    x = inputs_of(model, case)
    true = model(x)
    with torch.no_grad():
        h = run_units(model, x, 0, 3)
    assert torch.equal(run_units(model, h, 3), true)
    h = run_units(model, x, 0, 3)
    with first():
        assert torch.equal(run_units(model, h, 3), true)


@each_fast_case
def test_a_prefix_without_gradients(case):
    def function(model, x):
        with torch.no_grad():
            h = run_units(model, x, 0, 3)
        return (run_units(model, h, 3),)

    model = toy(case)
    same_with_stored_activations(model, case, function, inputs_of(model, case))


@each_fast_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_begins_in_the_middle(case, dtype):
    def function(model, x):
        h = run_units(model, x.detach().to(dtype), 0, 3)
        h.requires_grad_()
        return run_units(model, h, 3), h

    model = toy(case, Linear)
    model.requires_grad_(False).to(dtype)
    x = inputs_of(model, case)
    got = torch.autograd.grad(*reversed_pair(function(model, x)))
    with stored(model):
        true = torch.autograd.grad(*reversed_pair(function(model, x)))
    torch.testing.assert_close(got, true, rtol=0, atol=10 * case.stored)
    assert float(got[0].abs().sum()) > 0


def reversed_pair(pair):
    return pair[0].square().sum(), pair[1]


@each_fast_case
def test_detaching_in_place_cuts_both_streams(case):
    model = toy(case)
    x = inputs_of(model, case)
    h = run_units(model, x, 0, 3)
    h.detach_()
    out = run_units(model, h, 3)
    assert torch.equal(out, model(x))
    found = grads(model, out, x)
    assert found[-1] is None
    assert sum(g is None for g in found) == 1 + 3 * len(list(model.branches[0].parameters()))


@each_fast_case
def test_views_between_units(case):
    def function(model, x):
        h = run_units(model, x, 0, 3)
        h = runner.relayout(model.chain, lambda t: t.reshape(1, -1, WIDTH), h)
        h = runner.relayout(model.chain, lambda t: t.transpose(0, 1), h)
        h = run_units(model, h, 3, 6)
        h = runner.relayout(model.chain, lambda t: t.transpose(0, 1).reshape(SHAPE), h)
        return (run_units(model, h, 6),)

    model = toy(case)
    x = inputs_of(model, case)
    same_with_stored_activations(model, case, function, x)
    assert torch.equal(function(model, x)[0], model(x))


@each_fast_case
def test_views_in_a_frozen_prefix(case):
    def function(model, x):
        h = run_units(model, x.detach(), 0, 2)
        h = runner.relayout(model.chain, lambda t: t.transpose(0, 1), h)
        h = run_units(model, h, 2, 5)
        h = runner.relayout(model.chain, lambda t: t.transpose(0, 1), h)
        return (run_units(model, h, 5),)

    model = toy(case)
    for branch in model.branches[:4]:
        branch.requires_grad_(False)
    frozen = [p for p in model.parameters() if p.requires_grad]
    got = torch.autograd.grad(function(model, inputs_of(model, case))[0].sum(), frozen)
    with stored(model):
        true = torch.autograd.grad(function(model, inputs_of(model, case))[0].sum(), frozen)
    assert_close(got, true, case)


@each_fast_case
def test_a_view_in_another_grad_mode_does_not_end_the_chain(case):
    model = toy(case)
    x = inputs_of(model, case)
    h = run_units(model, x, 0, 3)
    with torch.no_grad():
        looked = runner.relayout(model.chain, lambda t: t.transpose(0, 1), h)
    assert torch.equal(looked, h.transpose(0, 1))
    out = run_units(model, h, 3)
    assert torch.equal(out, model(x))
    assert_close(grads(model, out, x), grads(model, model(x), x), case)


@pytest.mark.filterwarnings("ignore:.*something between two units made:UserWarning")
@each_fast_case
@pytest.mark.parametrize(
    "view", [lambda t: t[:, 1:], lambda t: t + 0, lambda t: t.expand(2, *t.shape)], ids=["part", "copy", "expand"]
)
def test_what_is_not_a_view_of_the_whole_begins_a_new_chain(case, view):
    def function(model, x):
        return (run_units(model, runner.relayout(model.chain, view, run_units(model, x, 0, 3)), 3),)

    model = toy(case)
    same_with_stored_activations(model, case, function, inputs_of(model, case))


@each_fast_case
def test_leaving_early_and_entering_late(case):
    model = toy(case)
    x = inputs_of(model, case)
    same_with_stored_activations(model, case, lambda m, x: (run_units(m, x, 0, 5),), x)
    same_with_stored_activations(model, case, lambda m, x: (run_units(m, x, 3),), x)


@each_fast_case
def test_skipping_a_unit_still_ends_the_chain(case):
    def function(model, x):
        return (run_units(model, run_units(model, x, 0, 4), 5),)

    model = toy(case)
    x = inputs_of(model, case)
    same_with_stored_activations(model, case, function, x)
    a, b, c = model.chain.couplings[0].coefficients
    before, now = x, x
    for branch in [*model.branches[:4], *model.branches[5:]]:
        before, now = now, a * now + b * before + c * branch(now)
    torch.testing.assert_close(
        function(model, x)[0], model.chain.couplings[-1].merge(before, now), rtol=1e-5, atol=1e-5
    )


@each_fast_case
def test_a_loop_over_the_same_units_begins_again(case):
    def function(model, x):
        return (run_units(model, run_units(model, x, 0, 4), 0, 4),)

    model = toy(case)
    same_with_stored_activations(model, case, function, inputs_of(model, case))


@each_fast_case
def test_a_fork(case):
    """One tensor that two chains, and something else, take."""
    other = toy(case, Weightless, seed=5)

    def function(model, x):
        h = run_units(model, x, 0, 4)
        return (run_units(model, h, 4) + run_units(other, h) + h.square(),)

    model = toy(case)
    with stored(other):
        same_with_stored_activations(model, case, function, inputs_of(model, case))
    same_with_stored_activations(model, case, function, inputs_of(model, case))


@each_fast_case
def test_taps_on_every_unit(case):
    def function(model, x):
        taps = []
        for i in range(len(model.units)):
            x = run_units(model, x, i, i + 1)
            taps.append(x)
        return (torch.stack(taps[::2]).sin(),)

    model = toy(case)
    same_with_stored_activations(model, case, function, inputs_of(model, case))


@pytest.mark.filterwarnings("ignore:.*something between two units made:UserWarning")
@each_exact_case
def test_a_write_between_two_units_begins_a_new_chain(case):
    def function(model, x):
        h = run_units(model, x, 0, 4)
        h += 1
        return (run_units(model, h, 4),)

    model = toy(case)
    same_with_stored_activations(model, case, function, inputs_of(model, case))
    with torch.inference_mode():
        inference = function(model, inputs_of(model, case))[0]
    assert torch.equal(inference, function(model, inputs_of(model, case))[0])


@each_fast_case
def test_a_copied_or_pickled_tensor_is_like_any_other(case):
    model = toy(case)
    with torch.no_grad():
        h = run_units(model, inputs_of(model, case), 0, 4)
    file = io.BytesIO()
    torch.save(h, file)
    assert len(file.getvalue()) < 4000
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(h)):
        assert torch.equal(other, h)
        with torch.no_grad():
            assert torch.equal(run_units(model, other, 4), run_units(model, h.clone(), 4))


@each_fast_case
def test_an_operation_that_comes_between_two_units_is_said_once(case):
    model = toy(case)
    x = inputs_of(model, case)
    with pytest.warns(
        UserWarning,
        match=r"branches\.3 \(chain 0\): got a tensor that something between two units made \(MulBackward0\)",
    ):
        run_units(model, run_units(model, x, 0, 3) * 1.5, 3)
    run_units(model, run_units(model, x, 0, 3) * 1.5, 3)


@each_fast_case
def test_units_used_by_themselves_are_no_reason_to_warn(case):
    model = toy(case)
    run_units(model, inputs_of(model, case) * 2, 3)


def test_a_state_before_a_view_has_the_strides_that_it_had():
    """Those of a dimension of size 1 too: by them convolutions choose the layout of their results."""
    x = torch.randn(1, 49, 16)
    seen = x.transpose(1, 2).view(1, 16, 7, 7)
    assert seen.stride() != torch.empty_like(torch.empty_like(seen, device="meta"), device="cpu").stride()
    record = ViewRecord(lambda t: t.flatten(2).transpose(1, 2), torch.empty_like(seen, device="meta"))
    undone, _ = record.undo(FloatStreams(), x, x)
    assert undone.stride() == seen.stride()
    assert torch.equal(undone, seen)
