"""`convert` and `revert`: in place, and undone to the bit."""

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

import revwire
from steps import TOLERANCE, assert_same_step, twin
from toys import Plain, X, pre_norm, stack


class Named(nn.Module):
    """A model with a method and hooks of its own."""

    def __init__(self):
        super().__init__()
        self.body, self.head = stack(pre_norm), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(5)
        self.double()

    def features(self, x):
        return self.norm(self.body(x)[0])

    def forward(self, x, *, scale=1.0):
        return self.head(self.features(x)) * scale


def test_the_model_stays_the_same_object():
    model = Named()
    before = (
        type(model),
        list(model.state_dict()),
        [id(p) for p in model.parameters()],
        [id(m) for m in model.modules()],
    )
    assert revwire.convert(model, X) is model
    after = type(model), list(model.state_dict()), [id(p) for p in model.parameters()], [id(m) for m in model.modules()]
    assert after == before
    assert isinstance(model, Named)
    assert model.features(X).shape == (2, 5, 8)


def test_everything_is_left_as_found():
    model = Named().train()
    model.body.blocks[1].eval()
    calls = []
    model.body.register_forward_hook(lambda *_: calls.append(1))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    flags, buffers = [m.training for m in model.modules()], {k: b.clone() for k, b in model.named_buffers()}
    state, example = torch.get_rng_state(), X.clone().requires_grad_()
    revwire.convert(model, example)
    assert [m.training for m in model.modules()] == flags
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert example.grad is None
    assert not calls
    model(X)
    assert len(calls) == 1


def test_revert_is_exact():
    model = Named().eval()
    out, attributes = model(X), [set(vars(m)) for m in model.modules()]
    revwire.convert(model, X)
    assert not torch.equal(model(X), out)  # the default coupling is another function, nearly
    assert revwire.revert(model) is model
    assert torch.equal(model(X), out)
    assert [set(vars(m)) for m in model.modules()] == attributes


def test_weights_that_were_trained_meanwhile_stay():
    model = revwire.convert(Named(), X)
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    weights = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(revwire.revert(model).state_dict(), weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "example", [X, (X,), {"x": X}, {"x": X, "scale": 2.0}], ids=["tensor", "tuple", "dict", "dict with flag"]
)
def test_kinds_of_examples(example):
    assert len(revwire.report(revwire.convert(Named(), example)).units) == 3


def test_an_example_without_elements_is_refused():
    """Nothing is drawn for it: with dropout the next call was another function."""
    model = stack(pre_norm)
    with pytest.raises(revwire.ConversionError, match=r"without elements \(shape \(0, 5, 8\)\).*at least one"):
        revwire.convert(model, torch.zeros(0, 5, 8))
    revwire.convert(model, X)  # nothing is left half-converted


def test_a_list_is_one_argument():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = stack(pre_norm)

        def forward(self, xs):
            return self.body(xs[0])

    assert len(revwire.plan(First(), [X, X]).units) == 3


def test_converting_twice_is_refused():
    model = revwire.convert(Named(), X)
    with pytest.raises(revwire.ConversionError, match=r"converted already .* call revwire.revert\(model\) first"):
        revwire.convert(model, X)
    with pytest.raises(revwire.ConversionError, match="converted already"):
        revwire.plan(nn.Sequential(model), X)


@pytest.mark.parametrize("call", [revwire.report, revwire.revert])
def test_what_is_not_converted_cannot_be_reported_or_reverted(call):
    with pytest.raises(
        revwire.ConversionError, match=r"not converted; .* call revwire.convert\(model, example_inputs\)"
    ):
        call(Named())


def test_strict():
    assert revwire.convert(Named(), X, strict=True)
    model = nn.Sequential(*stack(pre_norm).blocks, nn.Linear(8, 8), stack(pre_norm, depth=1)).double()
    with pytest.raises(
        revwire.ConversionError, match=r"strict=True, and 1 residual adds would stay: \S+, at toys.py:\d+: stands alone"
    ):
        revwire.convert(model, X, strict=True)
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(revwire.ConversionError, match="no chain of residual units was found"):
        revwire.convert(nn.Linear(8, 8).double(), X, strict=True)


def test_a_model_without_residuals_is_returned_as_it_is():
    model = nn.Linear(8, 8).double()
    out = model(X)
    with pytest.warns(revwire.NothingToRewireWarning, match="Linear: nothing was rewired, .* made no residual add"):
        revwire.convert(model, X)
    assert torch.equal(model(X), out)
    assert not revwire.report(model).chains


def test_the_warning_says_the_commonest_reason_and_names_the_callers_line():
    apart = nn.Sequential(*[m for b in stack(pre_norm).blocks for m in (b, nn.Linear(8, 8))]).double()
    message = (
        r"of 3 residual adds, 3 stay, at toys\.py:\d+, because: stands alone.*; checkpoint='stays' recomputes its block"
    )
    with pytest.warns(revwire.NothingToRewireWarning, match=message) as seen:
        revwire.convert(apart, X)
    assert seen[0].filename == __file__
    with pytest.warns(revwire.NothingToRewireWarning, match=r"excluded by the caller; let it through by include="):
        revwire.convert(stack(pre_norm), X, exclude="*")


def test_where_warnings_are_errors_the_model_is_as_before():
    model = nn.Linear(8, 8).double()
    before = dict(vars(model))
    with pytest.raises(revwire.NothingToRewireWarning):
        revwire.convert(model, X)
    assert vars(model) == before
    with pytest.raises(revwire.NothingToRewireWarning):
        revwire.convert(model)(X)


def test_float_streams_that_would_lose_the_input_are_refused():
    with pytest.raises(
        revwire.CouplingError, match=r"exact=False .* rebuild a state with a relative error .* pass exact=True"
    ):
        revwire.convert(stack(pre_norm, depth=8), X, coupling="bdia:1/8", exact=False)


def test_the_first_call_is_the_example():
    model, reference = Named().eval(), None
    reference = copy.deepcopy(model)
    revwire.convert(model, coupling=Plain(), exact=False)
    with pytest.raises(revwire.ConversionError, match=r"waits for its first call .* call it once"):
        revwire.report(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X, scale=2.0), reference(X, scale=2.0), **TOLERANCE)
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)


def test_a_first_call_that_fails_leaves_it_waiting():
    model = revwire.convert(Named())
    with pytest.raises(revwire.ConversionError, match="failed on the example inputs"):
        model(torch.zeros(2, 5, 7, dtype=torch.float64))
    model(X)
    assert len(revwire.report(model).units) == 3


def test_waiting_may_be_reverted():
    model = Named().eval()
    out = model(X)
    assert torch.equal(revwire.revert(revwire.convert(model))(X), out)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_forward_that_was_patched_on_the_instance():
    model = stack(pre_norm).eval()
    for b in model.blocks:
        b.forward = lambda x, own=b.forward: own(x) * 0.5
    patched = [b.forward for b in model.blocks]
    converted, out = model, model(X)[0]
    revwire.convert(converted, X, coupling=Plain(), exact=False)
    with torch.no_grad():
        torch.testing.assert_close(converted(X)[0], out, **TOLERANCE)
    revwire.revert(converted)
    assert [b.forward for b in model.blocks] == patched
    assert torch.equal(model(X)[0], out)


def test_half_precision_and_memory_formats():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model, example = stack(pre_norm).to(dtype), X.to(dtype)
        assert revwire.verify(revwire.convert(model, example), example).bit_exact
        assert model(example)[0].dtype == dtype
    convolutions = nn.Sequential(*(Convolution() for _ in range(3))).double()
    model, reference = twin(convolutions, torch.randn(2, 4, 6, 6, dtype=torch.float64))
    for image in (
        torch.randn(2, 4, 5, 7).double(),
        torch.randn(2, 4, 6, 6).double().to(memory_format=torch.channels_last),
    ):
        assert_same_step(model, reference, image)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return torch.relu(x + self.n(self.c(x)))


class Result(NamedTuple):
    out: torch.Tensor
    map: torch.Tensor


class Spelling(nn.Module):
    """Operators that stand under another name in their module, and a named tuple inside of a dict."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        h = self.linear(self.norm(x) ** 2)
        h = 2.0 ** h.tanh() + 1.0 / (1 + h**2) - (3 - h) * 2
        y = x + h
        return {"result": Result(y, h), "list": [Result(h, y)]}


class Spelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Spelling() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            found = block(x)
            assert isinstance(found["result"], Result)
            x = found["result"].out
        return x


def test_operators_and_named_tuples_in_the_code_of_a_host():
    model, reference = twin(Spelled().double())
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
