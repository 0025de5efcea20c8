"""Gradients of states have the dtype that they have in the plain network, and are as good as its own."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import revwire
from revwire._runtime.links import LINK
from revwire.measure import peak_bytes

WIDTH = 64


class Block(nn.Module):
    def __init__(self, hidden=2 * WIDTH):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def network(seed, dtype, depth=12, hidden=2 * WIDTH):
    torch.manual_seed(seed)
    blocks = (Block(hidden) for _ in range(depth))
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.LayerNorm(WIDTH)).to(dtype)


def gradients(model, x, wanted):
    x = x.clone().requires_grad_()
    (model(x).double() - wanted).square().mean().backward()
    return [x.grad.double(), *(p.grad.double() for p in model.parameters())]


def error(dtype, coupling):
    """The mean relative error of all gradients, against the same function in float64."""
    found = []
    for seed in range(4):
        model, x = network(seed, dtype), torch.randn(WIDTH, WIDTH).to(dtype)
        wanted = torch.randn(WIDTH, WIDTH).double()
        exact = copy.deepcopy(model).double()
        if coupling:
            revwire.convert(model, x, coupling=coupling, rewire="everywhere")
            revwire.convert(exact, x.double(), coupling=coupling, rewire="everywhere")
        pairs = zip(gradients(model, x, wanted), gradients(exact, x.double(), wanted), strict=True)
        found += [float((g - e).norm() / e.norm()) for g, e in pairs if e.norm()]
    return sum(found) / len(found)


@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16", "bdia:1/2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_no_worse_than_the_plain_networks(dtype, coupling):
    assert error(dtype, coupling) <= 1.05 * error(dtype, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_carries_a_state_is_what_the_network_hands_on(dtype):
    model, x = network(0, dtype), torch.randn(8, WIDTH).to(dtype)
    revwire.convert(model, x, rewire="everywhere")
    found = []

    def see(_module, _args, out):
        link = getattr(out, LINK)
        found.append((link.current, link.previous.dtype))

    for block in model[1:-2]:
        block.register_forward_hook(see)
    model(x)
    assert found == [(None, dtype)] * 11


def test_a_step_holds_two_states_and_two_gradients_beside_a_branch():
    state = 4096 * WIDTH * 2  # bytes, in 16 bits

    def peak(convert):
        model = network(0, torch.bfloat16, 8, 4 * WIDTH)
        x = torch.randn(4096, WIDTH).bfloat16()
        if convert:
            revwire.convert(model, x, coupling="bdia:1/2", rewire="everywhere")
        else:
            model = revwire.rival(model, x).model
        return peak_bytes(lambda: model(x).sum().backward())

    bits = 8 * state / 16
    # beside a branch checkpointing has 7 inputs and one gradient, and here are two states of 32 bits, two gradients
    assert peak(True) - peak(False) <= (2 * 2 + 2) * state + bits - (7 + 1) * state + 0.1 * state
