"""What goes into a host and comes out of it besides the stream: structures keep their type, objects are refused if
looked into.
"""

from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import revwire
from steps import TOLERANCE, assert_same_step, twin
from toys import Loop, X, block, stack


class Named(NamedTuple):
    y: Tensor
    a: Tensor


@dataclass
class Data:
    y: Tensor
    a: Tensor
    number: int = 3


class Box:
    def __init__(self, y, a):
        self.y, self.a = y, a


class Unpacking(Loop):
    """Blocks return structures; ``get`` finds the stream in them."""

    def __init__(self, make, get):
        super().__init__(block(lambda self, x: make(x + self.f(x), self.g(x))))
        self.get = get
        self.double()

    def forward(self, x):
        outs = []
        for b in self.blocks:
            outs.append(b(x))
            x = self.get(outs[-1])
        return outs


STRUCTURES = {
    "list": (lambda y, a: [y, None, a, "text"], lambda o: o[0]),
    "dict": (lambda y, a: {"y": y, "a": a, 1: 2}, lambda o: o["y"]),
    "ordered dict": (lambda y, a: OrderedDict(y=y, a=a), lambda o: o["y"]),
    "named tuple": (Named, lambda o: o.y),
    "dataclass": (Data, lambda o: o.y),
    "nested": (lambda y, a: (Data(y, a), [{"a": a}]), lambda o: o[0].y),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_keep_their_type(name):
    model, reference = twin(Unpacking(*STRUCTURES[name]))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
    assert [type(o) for o in model(X)] == [type(o) for o in reference(X)]


def test_objects_of_an_unknown_kind():
    model, reference = twin(Unpacking(Box, lambda o: o.y))
    assert revwire.report(model).units
    assert_same_step(model, reference, X)


def test_a_list_that_is_filled():
    def forward(self, x, seen):
        seen.append(x)
        return x + self.f(x)

    model, reference = twin(stack(forward), (X, []))
    assert len(revwire.report(model).units) == 3
    seen = [], []
    torch.testing.assert_close(model(X, seen[0]), reference(X, seen[1]), **TOLERANCE)
    torch.testing.assert_close(*seen, **TOLERANCE)


def test_a_root_that_takes_its_list_apart():
    class Popping(Loop):
        def forward(self, xs):
            return super().forward(xs.pop())

    example = [X]
    model, reference = twin(Popping(block(lambda self, x: x + self.f(x))).double(), (example,))
    assert len(example) == 1
    assert_same_step(model, reference, [X])


class Cache:
    def __init__(self, length=0):
        self.length, self.keys = length, []

    def __len__(self):
        return self.length

    def update(self, t):
        self.length += 1
        self.keys.append(t)
        return torch.cat(self.keys, 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, cache):
        k = self.k(x) if cache is None else cache.update(self.k(x))
        return torch.softmax(self.q(x) @ k.transpose(1, 2), -1) @ k


def with_attention(forward):
    return stack(forward, lambda self: setattr(self, "attention", Attention()), depth=1 + 2)


class PerBlock(Loop):
    def forward(self, x, caches=None):
        for b, cache in zip(self.blocks, caches or [None] * 3, strict=True):
            x = b(x, cache)
        return x


def test_a_stateful_object_may_be_passed_on():
    def forward(self, x, cache=None):
        return x + self.attention(x, cache)

    model, reference = twin(PerBlock(block(forward, lambda self: setattr(self, "attention", Attention()))).double())
    caches = [Cache() for _ in range(3)], [Cache() for _ in range(3)]
    with torch.no_grad():
        for _ in range(3):  # generation: the caches grow
            torch.testing.assert_close(model(X, caches[0]), reference(X, caches[1]))
    assert [c.length for c in caches[0]] == [3, 3, 3]


@pytest.mark.parametrize(
    ("look", "given"),
    [
        (lambda c: c.length > 0, Cache),
        (lambda c: len(c) > 0, Cache),
        (lambda c: bool(c), Cache),
        (lambda c: c.on, lambda: SimpleNamespace(on=True)),
        (lambda c: "a" in c, lambda: {"a"}),
    ],
    ids=["attribute", "len", "bool", "namespace", "set"],
)
def test_a_block_that_looks_into_an_object(look, given):
    model, reference = twin(stack(lambda self, x, c: x + (self.f(x) if look(c) else self.g(x))), (X, given()))
    assert [u.pattern for u in revwire.report(model).units] == ["residual"] * 3
    assert_same_step(model, reference, X, given())


def test_a_block_that_fills_a_cache():
    def forward(self, x, cache=None):
        h = self.f(x)
        cache.kept = h.detach() if cache.kept is None else cache.kept + h.detach()
        return x + self.g(h * cache.kept), cache

    class Filled(PerBlock):
        def forward(self, x, caches):
            for b, cache in zip(self.blocks, caches, strict=True):
                x, _ = b(x, cache)
            return x

    def caches():
        return [SimpleNamespace(kept=None) for _ in range(3)]

    model, reference = twin(Filled(block(forward)).double(), (X, caches()))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X, caches())
    given = caches(), caches()
    for _ in range(2):
        torch.testing.assert_close(model(X, given[0]), reference(X, given[1]), rtol=1e-9, atol=1e-9)
    model = revwire.revert(model)
    assert revwire.verify(revwire.convert(model, (X, caches()), coupling="bdia:1/2"), (X, caches())).bit_exact


def test_a_host_that_returns_its_input():
    model, reference = twin(stack(lambda self, x, skip=False: x if skip else x + self.f(x)))
    assert_same_step(model, reference, X)
    assert_same_step(model, reference, X, skip=True)
