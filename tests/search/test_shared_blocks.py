"""Blocks that are shared, skipped, called twice, or left early; streams that are tapped on the way."""

import copy

import pytest
import torch
from torch import nn

import revwire
from steps import assert_same_step, tensors, twin
from toys import Plain, X, block, pre_norm, stack


class Shared(nn.Module):
    """One block for all depths."""

    def __init__(self, depth=4):
        super().__init__()
        self.block, self.depth = block(pre_norm)(), depth
        self.double()

    def forward(self, x):
        for _ in range(self.depth):
            x = self.block(x)
        return x


class Flexible(nn.Module):
    """Layer drop, early return, hidden states, a pyramid."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = stack(pre_norm, depth=4).blocks, nn.Linear(8, 8)
        self.double()

    def forward(self, x, skip=(), stop=9, states=False, pyramid=False):
        seen = [x]
        for i, b in enumerate(self.blocks):
            if i == stop:
                return x
            if i not in skip:
                x = b(x)
                seen.append(x)
        if pyramid:
            return {"last": x, **{f"p{i}": self.head(s) for i, s in enumerate(seen[1:])}}
        return (x, seen) if states else x


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = stack(pre_norm)

    def forward(self, a, b):
        return self.tower(a)[0] - self.tower(b)[0]


class Twice(nn.Module):
    """The same loop over the same blocks, two times over."""

    def __init__(self):
        super().__init__()
        self.tower = stack(pre_norm)

    def forward(self, x):
        return self.tower(self.tower(x)[0].tanh())[0]


class Neighbours(nn.Module):
    """Two modules that share their linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(pre_norm)(), block(pre_norm)()
        self.second.f = self.first.f
        self.double()

    def forward(self, x):
        return self.second(self.first(x))


CALLS = [{}, {"skip": (1,)}, {"skip": (0, 3)}, {"stop": 2}, {"states": True}, {"pyramid": True}]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_paths_through_a_flexible_model(call):
    model, reference = twin(Flexible())
    assert len(revwire.report(model).units) == 4
    assert_same_step(model, reference, X, **call)


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/4"])
def test_paths_are_exact(call, coupling):
    model = revwire.convert(Flexible(), X, coupling=coupling)
    assert revwire.verify(model, {"x": X.clone().requires_grad_(), **call}).bit_exact


@pytest.mark.parametrize(("make", "units"), [(Shared, 4), (Neighbours, 2), (Twice, 6)])
def test_shared_blocks(make, units):
    model, reference = twin(make())
    assert len(revwire.report(model).units) == units
    assert_same_step(model, reference, X)
    model = revwire.revert(model)
    assert revwire.verify(revwire.convert(model, X, coupling="bdia:1/2"), X).bit_exact


def test_a_shared_block_used_more_often_than_in_the_example():
    model, reference = twin(Shared())
    model.depth = reference.depth = 6
    assert_same_step(model, reference, X)


def test_siamese_use():
    other = X.flip(0).clone()
    model, reference = twin(Siamese(), (X, other))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X, other)
    assert_same_step(model, reference, X, X)
    assert revwire.verify(revwire.convert(revwire.revert(model), (X, other)), (X, other)).bit_exact


def recurrence(model, x, a, b, c):
    """The two-step rule, written out for the blocks of `Flexible` in evaluation mode."""
    previous = current = x
    for blk in model.blocks:
        f = blk.g(blk.f(current).tanh())
        previous, current = current, a * current + b * previous + c * f
    return previous, current


@pytest.mark.parametrize(("coupling", "rule"), [("re2tal", (0, 1, 1)), ("bdia:1/4", (0.75, 0.25, 1.25))])
def test_the_streams_follow_the_recurrence(coupling, rule):
    model = revwire.convert(Flexible().eval(), X, coupling=coupling)
    previous, current = recurrence(model, X, *rule)
    expected = (previous + current) / 2 if coupling == "re2tal" else current
    torch.testing.assert_close(model(X), expected, rtol=1e-6, atol=1e-6)


def test_an_early_return_gives_the_stream_as_it_is():
    model = revwire.convert(Flexible().eval(), X, coupling="re2tal")
    copied = copy.copy(model)
    copied.blocks = model.blocks[:2]
    torch.testing.assert_close(model(X, stop=2), recurrence(copied, X, 0, 1, 1)[1], rtol=1e-6, atol=1e-6)


def test_two_models_that_share_a_block():
    shared = block(pre_norm)().double()
    first, second = nn.Sequential(shared, block(pre_norm)().double()), nn.Sequential(shared, block(pre_norm)().double())
    revwire.convert(first, X)
    with pytest.raises(revwire.ConversionError, match="converted already"):
        revwire.convert(second, X, coupling=Plain(), exact=False)
    assert len(tensors(second(X))) == 1


@pytest.mark.parametrize(("coupling", "rule"), [("re2tal", (0, 1, 1)), ("bdia:1/4", (0.75, 0.25, 1.25))])
def test_a_block_used_at_every_depth_is_one_chain(coupling, rule):
    """Weights shared across depth: the streams go on from call to call, and end after the last."""

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Deep()

        def forward(self, x):
            for _ in range(5):
                x = self.block(x)
            return x

    model, x, (a, b, c) = Same(), torch.randn(3, 8), rule
    previous = current = x
    for _ in range(5):
        previous, current = current, a * current + b * previous + c * (model.block(current) - current)
    expected = (previous + current) / 2 if coupling == "re2tal" else current
    revwire.convert(model, x, coupling=coupling)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert len(revwire.verify(model, x).units) == 5


class Ending(nn.Module):
    """A residual whose copy, in train mode, lets the chain end in the module around it."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        y = x + self.f(x).tanh()
        return y.clone() if self.training else y


class Writing(nn.Module):
    """Residuals, behind which its code writes to a part of a tensor."""

    def __init__(self):
        super().__init__()
        self.f, self.inner = nn.Linear(8, 8), nn.ModuleList([Ending(), Ending()])

    def forward(self, x):
        h = self.f(x).tanh()
        for inner in self.inner:
            h = inner(h)
        out = torch.zeros_like(x)
        out[:, :2] = h[:, :2]
        h = h + out
        out = x.clone()
        out[:, 1:] += h[:, 1:]
        return out, h.mean()


class Thrice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Writing()

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)[0]
        return x


def test_what_leads_to_the_same_module_again_is_tried_as_a_whole():
    model, reference = twin(Thrice().double(), rewire="everywhere")
    found = [(u.path, u.pattern) for u in revwire.report(model).units]
    assert found == [("block.inner.0.f", "block"), ("block.inner.1.f", "block")]
    assert_same_step(model, reference, X)
