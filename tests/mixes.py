"""Chains of toys whose units come back in different ways, and what holds for every mix of those."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cases import FAST
from toys import WIDTH, PreNorm, stored, toy

LETTERS = {"s": "stored", "p": "selective", "c": "checkpointed", "r": "reversible"}
SHAPE = (16, 64, WIDTH)
STREAM = 16 * 64 * WIDTH * 4
"""Bytes of one state of this shape."""

LOOKS = 4096
"""At least the bytes of the samples that are kept of what a checkpointed unit saved."""

each_fast_exact_case = pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)


def modes_of(mix):
    return tuple(LETTERS[letter] for letter in mix)


def mixed(case, mix, kind=PreNorm):
    """A toy with a unit for each letter."""
    model = toy(case, kind, depth=len(mix))
    model.chain.modes = modes_of(mix)
    return model


def gradients(model, x, *extras):
    torch.manual_seed(3)
    out = model(x, *extras)
    tensors = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
    return torch.autograd.grad(sum(t.float().square().sum() for t in tensors), [x, *model.parameters()])


def same(a, b):
    return all(map(torch.equal, a, b))


def is_right(model, x, *extras):
    """Whether gradients are those of stored activations, to the bit."""
    rebuilt = gradients(model, x, *extras)
    with stored(model):
        return same(rebuilt, gradients(model, x, *extras))


def leaves_no_other_trace(model, x):
    """Whether a step leaves the buffers and the random state of one with stored activations, and has its gradients."""
    twin = copy.deepcopy(model)
    rebuilt, state = gradients(model, x), torch.get_rng_state()
    with stored(twin):
        true = gradients(twin, x)
    return same(rebuilt, true) and torch.equal(state, torch.get_rng_state()) and same(model.buffers(), twin.buffers())


def can_be_repeated(model, x):
    """Whether a backward pass that retains its graph can be followed by others like it."""
    loss, leaves = model(x).square().sum(), [x, *model.parameters()]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    return same(first, second) and same(first, torch.autograd.grad(loss, leaves))


def tape_of(out):
    """The tape behind an output, or a loss."""
    node = out.grad_fn
    while not hasattr(node, "tape"):
        node = node.next_functions[0][0]
    return node.tape


def records_of(loss):
    """What the tape behind a loss keeps of its units."""
    return [r for r in tape_of(loss).records if r is not None]


class Residual(nn.Module):
    """x + an MLP that widens ``factor`` times."""

    def __init__(self, width=8, factor=1):
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, factor * width), nn.GELU(), nn.Linear(factor * width, width)
        )

    def forward(self, x):
        return x + self.branch(x)
