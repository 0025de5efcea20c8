"""What the machinery costs per unit, as a number that does not depend on what else the machine does."""

import json
import subprocess
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


def per_unit(block):
    few, many = per_step(block, 4), per_step(block, 12)
    return [(m - f) / 8 for m, f in zip(many, few, strict=True)]


@pytest.fixture(scope="module")
def counted():
    """Counted in a process of its own: what other tests load (FSDP, the compiler) is asked in each unit too."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("block", "forward", "backward"), [(Straight, 167, 112), (Followed, 247, 129)])
def test_a_unit_makes_no_more_calls_than_it_did(block, forward, backward, counted):
    """A change that needs more should be worth it: a call of a Python function takes about 0.3 microseconds with what
    it does.
    """
    found = counted[block.__name__]
    assert found[0] <= forward
    assert found[1] <= backward


if __name__ == "__main__":
    sys.stdout.write(json.dumps({block.__name__: per_unit(block) for block in (Straight, Followed)}))
