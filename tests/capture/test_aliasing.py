"""Writes in place: a rewired host gives what the original gives, or is refused."""

import pytest
import torch
from torch import nn

import revwire
from steps import TOLERANCE, assert_same_step, reasons, twin
from toys import Loop, X, block, stack


def zeroed(self, x):
    h = self.f(x)
    h[:, 0] = 0
    return x + h


def written_view(self, x):
    h = self.f(x)
    h[:, 0].zero_()
    return x + h


def into_branch(self, x):
    h = self.f(x)
    h += x
    return h


def relu_of_sum(self, x):
    return torch.relu_(x + self.f(x))


def own_buffer(self, x):
    self.count += 1
    return x + self.f(x) * 0.5


@pytest.mark.parametrize("forward", [zeroed, written_view, into_branch, relu_of_sum], ids=lambda f: f.__name__)
def test_writes_to_the_branch_itself_are_kept(forward):
    model, reference = twin(stack(forward))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)


def side_before_write(self, x):
    h = self.f(x)
    side = h.sum()
    h.relu_()
    return x + self.g(h), side


def extra_between(self, x, y):
    h = self.f(x) * y
    y.add_(1)
    return x + self.g(h) * y


def stream_through_view(self, x):
    x.view(-1, 8).mul_(0.5)
    return x + self.f(x)


def into_stream(self, x):
    x += self.g(x.mean(0, keepdim=True)) * 0 + self.drop(torch.ones_like(x))
    return x


def data_of(self, x):
    x.data = x.data * 0.5
    return x + self.f(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (stream_through_view, "stands alone"),  # what is added to is another value than the stream
        (into_stream, "adds in place to its own input"),
        (data_of, "changes data of a tensor"),
    ],
    ids=["view", "stream", "data"],
)
def test_writes_that_would_be_seen_elsewhere_are_refused(forward, reason):
    with pytest.warns(revwire.NothingToRewireWarning, match="nothing was rewired"):
        model, _ = twin(stack(forward))
    assert not revwire.report(model).chains
    assert reason in reasons(model)


def test_a_write_between_parts_of_a_unit_leaves_one_unit_as_a_whole():
    model, reference = twin(stack(side_before_write))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)


@pytest.mark.filterwarnings("ignore:.*writes in place to a tensor from outside of it:UserWarning")
def test_an_extra_input_that_is_written_in_between():
    """It cannot be given to a recompute as the branch found it; autograd refuses such a write in the original too."""
    model, reference = twin(Loop(block(extra_between)).double(), (X, X * 1.0))
    with torch.no_grad():
        torch.testing.assert_close(model(X, X * 1.0), reference(X, X * 1.0), **TOLERANCE)
    with pytest.warns(UserWarning, match="writes in place to a tensor from outside of it"):
        out = model(X.clone().requires_grad_(), X * 1.0)
    torch.testing.assert_close(out, reference(X, X * 1.0), **TOLERANCE)
    for m in (model, reference):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            m(X.clone().requires_grad_(), X * 1.0)[0].sum().backward()


def test_the_example_and_the_model_stay_as_they_were():
    class Writer(nn.Module):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            self.register_buffer("late", torch.zeros(1))
            return x.mul_(2)

    model = nn.Sequential(
        Writer(), stack(own_buffer, lambda self: self.register_buffer("count", torch.zeros(4, dtype=torch.long)))
    )
    example, state, attributes = X.clone(), {k: v.clone() for k, v in model.state_dict().items()}, dict(vars(model[0]))
    revwire.convert(model, example)
    torch.testing.assert_close(example, X, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert vars(model[0]) == attributes


def test_buffers_written_in_opened_code():
    model, reference = twin(
        stack(own_buffer, lambda self: self.register_buffer("count", torch.zeros(4, dtype=torch.long)))
    )
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: (setattr(self, "last", self.f(x)), x + self.last)[1],
        lambda self, x: (self.seen.append(1), x + self.f(x))[1],
        lambda self, x: (setattr(self, "ema", self.ema * 0.9), x + self.f(x) * self.ema)[1],
    ],
    ids=["tensor", "list", "buffer"],
)
def test_assignments_in_the_code_of_a_host_happen_once(forward):
    def init(self):
        self.seen = []
        self.register_buffer("ema", torch.ones(()))

    model, reference = twin(stack(forward, init))
    assert len(revwire.report(model).units) == 3
    for _ in range(2):
        assert_same_step(model, reference, X)
    for mine, theirs in zip(model.blocks, reference.blocks, strict=True):
        assert mine.seen == theirs.seen
    model = revwire.revert(model)
    assert revwire.verify(revwire.convert(model, X, coupling="bdia:1/2"), X).bit_exact
