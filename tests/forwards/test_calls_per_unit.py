"""What the machinery costs per unit, as a number that does not depend on what else the machine does."""

import json
import subprocess
import sys
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


SETTING, KERNELS = 1.0, {"sdpa": F.scaled_dot_product_attention}


def named(kernel):
    """Lets code reach a kernel by its name, as libraries of models do: with settings in enclosed variables."""

    def wrapped(forward):
        @wraps(forward)
        def with_kernel(self, *args):
            return forward(self, KERNELS[kernel], *args)

        return with_kernel

    return wrapped


class Attention(nn.Module):
    """With what attention of a library has: a configuration, settings outside, a table, a cache, what it saw last."""

    def __init__(self, config):
        super().__init__()
        self.config, self.heads, self.cache, self.last = config, config.heads, {}, None
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("places", torch.arange(16), persistent=False)

    @named("sdpa")
    def forward(self, kernel, x):
        self.last = x.shape
        self.cache["calls"] = self.cache.get("calls", 0) + 1
        q, k, v = self.qkv(x).view(16, 3, self.heads, -1).permute(1, 2, 0, 3)
        mask = (self.places[:, None] - self.places) * -SETTING
        dropout = self.config.dropout if self.training else 0.0
        return self.out(kernel(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(0, 1).reshape(16, 16))


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.up, self.down = config, nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)) * self.config.gain)


class Layer(nn.Module):
    """A layer of a transformer, written by hand: two units."""

    def __init__(self):
        super().__init__()
        config = SimpleNamespace(heads=2, dropout=0.1, gain=0.5)
        self.attention, self.mlp, self.dropout = Attention(config), Mlp(config), nn.Dropout(0.1)
        self.before, self.between = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x):
        if self.training is None:
            return x
        x = x + self.dropout(self.attention(self.before(x)))
        return x + self.dropout(self.mlp(self.between(x)))


class Quiet(Layer):
    """One that draws nothing."""

    def __init__(self):
        super().__init__()
        self.dropout.p = self.attention.config.dropout = 0.0


UNITS = {Straight: 1, Followed: 1, Layer: 2, Quiet: 2}


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
    assert sum(len(chain.units) for chain in revwire.report(model).chains) == depth * UNITS[block]
    for _ in range(3):  # what is looked up once
        model(x.requires_grad_()).sum().backward()
    loss, forward = calls(lambda: model(x).sum())
    return forward, calls(loss.backward)[1]


def per_block(block):
    few, many = per_step(block, 4), per_step(block, 12)
    return [(m - f) / 8 for m, f in zip(many, few, strict=True)]


@pytest.fixture(scope="module")
def counted():
    """Counted in a process of its own: what other tests load (FSDP, the compiler) is asked in each unit too."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(torch.__version__ < "2.14", reason="PyTorch's own calls count too, and others have more of them")
@pytest.mark.parametrize(
    ("block", "forward", "backward"),
    [(Straight, 164, 107), (Followed, 230, 113), (Layer, 639, 352), (Quiet, 602, 366)],
)
def test_a_block_makes_no_more_calls_than_it_did(block, forward, backward, counted):
    """A change that needs more should be worth it: a call of a Python function takes about 0.3 microseconds with what
    it does.
    """
    found = counted[block.__name__]
    assert found[0] <= forward
    assert found[1] <= backward


if __name__ == "__main__":
    sys.stdout.write(json.dumps({block.__name__: per_block(block) for block in UNITS}))
