"""What the machinery costs per unit, as a number that does not depend on what else the machine does."""

import sys

import pytest
import torch
from torch import nn

import revwire
from revwire._streams import kernels

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the plain arithmetic makes other calls")


class Straight(nn.Module):
    """x + linear(norm(x)): code that is a straight line."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Followed(Straight):
    def forward(self, x):
        if self.training is None:
            return x
        return x + self.linear(self.norm(x))


def calls(run):
    """(What a function gives, the number of calls of Python functions in it.)"""
    count, before = [0], sys.getprofile()

    def profile(frame, event, arg):
        count[0] += event == "call"

    sys.setprofile(profile)
    try:
        return run(), count[0]
    finally:
        sys.setprofile(before)


def per_step(block, depth):
    """Calls of a forward, and of a backward pass."""
    x = torch.randn(16, 16)
    model = revwire.convert(nn.Sequential(*(block() for _ in range(depth))), x, coupling="re2tal")
    for _ in range(3):  # what is looked up once
        model(x.requires_grad_()).sum().backward()
    loss, forward = calls(lambda: model(x).sum())
    return forward, calls(loss.backward)[1]


@pytest.mark.parametrize(("block", "forward", "backward"), [(Straight, 172, 122), (Followed, 255, 153)])
def test_a_unit_makes_no_more_calls_than_it_did(block, forward, backward):
    """A change that needs more should be worth it: a call of a Python function takes about 0.3 microseconds with what
    it does.
    """
    few, many = per_step(block, 4), per_step(block, 12)
    assert (many[0] - few[0]) / 8 <= forward
    assert (many[1] - few[1]) / 8 <= backward
