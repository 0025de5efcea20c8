"""Containers whose classes have code of their own: nothing but the model calls it, and it works as in the model."""

from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

import revwire


class Loads(OrderedDict):
    """As tables of what may be imported: to list the values is to load them all, which fails."""

    calls = 0

    def values(self):
        type(self).calls += 1
        raise ImportError("not installed")

    items = values


class Log(list):
    """A class of a project's own, which has a list's methods."""


class Counts(dict):
    def add(self, name):
        self[name] = self.get(name, 0) + 1


LOG, COUNTS, TABLE = Log(), Counts(), Loads(a=torch.tanh, b=torch.sigmoid)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.own, self.seen = nn.Linear(8, 8), Loads(a=torch.tanh), Counter()

    def forward(self, x):
        self.seen.update("ab")
        LOG.append(0)
        COUNTS.add("calls")
        return x + TABLE["a"](self.own["a"](self.f(x)))


def converted_and_verified(model, x):
    revwire.verify(revwire.convert(model, x), x)


@pytest.mark.parametrize("call", [revwire.plan, revwire.convert, converted_and_verified])
def test_their_code_runs_as_in_the_model(call):
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 8)
    LOG.clear()
    COUNTS.clear()
    call(model, x)
    assert Loads.calls == 0
    assert not LOG
    assert not COUNTS
    assert all(block.seen == Counter() for block in model)
    model(x).sum().backward()
    assert (len(LOG), COUNTS) == (3, {"calls": 3})
    assert all(block.seen == Counter("ab") for block in model)
