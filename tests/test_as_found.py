"""Whoever runs a model to learn something leaves it as found: one context manager, `left_as_found`."""

import random
import threading

import numpy
import pytest
import torch
from torch import nn

import revwire
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.buffers import buffers_exchanged

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))


class Restless(nn.Module):
    """Changes all that a forward can change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("order", torch.arange(8))
        self.calls = 0
        self.log = [1]

    def forward(self, x):
        self.calls += 1
        self.log.append(random.random() + numpy.random.rand())
        self.average.mul_(0.9).add_(x.mean((0, 1)).detach())
        self.order.copy_(self.order.flip(0))
        return self.linear(self.norm(x)) + torch.rand(8)


def state(model):
    return (
        [m.training for m in model.modules()],
        {name: (b, b.clone()) for name, b in model.named_buffers()},
        [p.grad for p in model.parameters()],
        (model.calls, model.log, [*model.log]),
        (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()),
    )


def assert_same_state(model, before, *, attributes=True):
    now = state(model)
    assert now[0] == before[0]
    assert all(now[1][name][0] is b and torch.equal(b, old) for name, (b, old) in before[1].items())
    assert all(a is b for a, b in zip(now[2], before[2], strict=True))
    if attributes:
        assert now[3][0] == before[3][0]
        assert now[3][1] is before[3][1]
        assert now[3][2] == before[3][2]
    assert torch.equal(now[4][0], before[4][0])
    assert now[4][1] == before[4][1]
    assert (now[4][2] == before[4][2]).all()


@pytest.mark.parametrize("training", [True, False])
def test_everything_comes_back(training):
    model = Restless().train(training)
    model.linear.weight.grad = torch.ones(8, 8)
    before = state(model)
    with left_as_found(model, X, backward=True):
        assert all(p.grad is None for p in model.parameters())
        model.train(not training)
        model(X).sum().backward()
        model.train(training)
        model(X)
        assert model.calls == 2
    assert_same_state(model, before)


def test_everything_comes_back_after_an_error():
    model = Restless()
    before = state(model)
    with pytest.raises(ZeroDivisionError), left_as_found(model, X):
        model(X).div(1 / len([]))
    assert_same_state(model, before)


def test_what_is_assigned_may_stay():
    model = Restless()
    before = state(model)
    with left_as_found(model, X, attributes=False):
        model(X)
    assert model.calls == 1
    assert len(model.log) == 2
    assert_same_state(model, before, attributes=False)


def test_a_buffer_that_modules_share_is_shared_inside():
    model = nn.ModuleList([Restless(), Restless()])
    model[1].average = model[0].average
    with left_as_found(model):
        model[0].average.add_(1)
        assert model[1].average is model[0].average
    assert not model[0].average.any()


def test_a_backward_pass_in_a_thread_of_its_own_may_exchange_buffers():
    """That of an accelerator does; a lock around it would never be given back."""
    model, done = Restless(), []

    def recompute():
        with buffers_exchanged([model, model.norm]):
            done.append(model.average)

    with left_as_found(model, X, backward=True):
        thread = threading.Thread(target=recompute, daemon=True)
        thread.start()
        thread.join(10)
        assert done


def test_a_conversion_in_eval_mode_writes_no_buffer():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("average", torch.zeros(8))

        def forward(self, x):
            self.average.mul_(0.9).add_(x.mean((0, 1)).detach())
            return x + self.linear(x - self.average)

    model = nn.Sequential(Block(), Block(), Block()).eval()
    revwire.convert(model, X)
    assert not any(b.any() for b in model.buffers())


def test_verify_leaves_what_the_model_notes_of_its_calls():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.body(x)

    model = revwire.convert(Counting(), X)
    model(X)
    assert revwire.verify(model, X).bit_exact
    revwire.profile(model, X, repeats=1)
    assert model.calls == 1
