"""What every coupling declares, measured on chains of any depth: rebuilt bits, gradients, bytes kept per element and
unit.
"""

from functools import lru_cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from cases import BENT, Case
from revwire import Bdia, Dr2Net, Innovation, Midpoint, Momentum, RandomBdia, Re2TAL
from revwire._runtime.observer import Observer
from revwire.measure import saved_bytes
from steps import gradients
from toys import WIDTH, Toy, as_block, as_residual, stored, toy

EVERY = [
    Re2TAL(),
    *(Bdia(2.0**-m) for m in range(1, 8)),
    *(RandomBdia(g) for g in (1 / 2, 1 / 4)),
    *(Momentum(2.0**-m) for m in (1, 3, 7)),
    *(Dr2Net(1 - b, b) for b in (1 / 8, 1.0)),
    *(Midpoint(a, h) for a, h in ((1 / 2, 1.5), (1, 2))),
    *(Innovation(e) for e in (1 / 2, -1 / 2, 1 / 4, -1 / 4, 1 / 128)),
    *(Innovation(e, BENT) for e in (1.0, 1 / 2, 1 / 4)),
]
"""Each scheme, with each number of bits that it may keep, or the fewest, some and the most."""

FAMILIES = [
    Re2TAL(),
    Bdia(1 / 16),
    RandomBdia(1 / 2),
    Momentum(1 / 8),
    Dr2Net(7 / 8, 1 / 8),
    Midpoint(1 / 2),
    Midpoint(1, 2),
    Innovation(1 / 2, BENT),
]

numbers = st.floats(1 / 8, 1)
powers = st.integers(1, 7).map(lambda m: 2.0**-m)
couplings = st.one_of(
    st.sampled_from(EVERY),
    powers.map(Momentum),
    st.builds(
        lambda share, beta: Dr2Net(share * (1 - beta), beta), numbers, powers
    ),  # more would leave the range in a deep chain
    st.builds(lambda share, a: Midpoint(a, 2 * share), numbers, powers),
)
"""All that declare to be exact, with any value of the coefficients that may have any."""


class Small(nn.Linear):
    """A branch whose streams stay in range over a thousand units."""

    shape = (2, WIDTH)

    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        return 0.02 * torch.tanh(super().forward(x))


class Mixed(Toy):
    """Residual units and whole blocks in turn; residual units only where |b| = 1, under which whole blocks leave the
    range at last.
    """

    def __init__(self, branches, coupling):
        super().__init__(branches, Case(coupling, True, torch.float32, 0.0, 0.0, ""))
        for i, unit in enumerate(self.units if coupling.kept_bits else ()):
            object.__setattr__(unit, "kind", ("residual", "block")[i % 2])
            object.__setattr__(unit, "branch", (as_residual, as_block)[i % 2])


class Rebuilt(Observer):
    """Holds what was dropped, and counts what was rebuilt to the bit."""

    def __init__(self):
        self.dropped, self.equal = {}, 0

    def on_drop(self, key, state):
        self.dropped[key] = state.clone()

    def on_rebuild(self, rebuilt):
        self.equal += torch.equal(self.dropped.pop(rebuilt.key), rebuilt.state)


def check_exact(coupling, depth, autocast, seed=0):
    torch.manual_seed(seed)
    model = Mixed([Small() for _ in range(depth)], coupling).train()
    x = torch.randn(Small.shape, requires_grad=True)
    model.chain.observer = rebuilt = Rebuilt()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = gradients(model, x)
        assert rebuilt.equal == depth
        model.chain.observer = None
        with stored(model):
            assert all(map(torch.equal, got, gradients(model, x)))


precision = pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(coupling=couplings, depth=st.integers(2, 30), autocast=st.booleans(), seed=st.integers(0, 1000))
def test_exactness_of_any_coupling(coupling, depth, autocast, seed):
    check_exact(coupling, depth, autocast, seed)


@pytest.mark.parametrize("coupling", EVERY, ids=lambda c: c.name)
@precision
def test_exactness_over_ten_units(coupling, autocast):
    check_exact(coupling, 10, autocast)


@pytest.mark.parametrize("coupling", FAMILIES, ids=lambda c: c.name)
@precision
def test_exactness_over_a_hundred_units(coupling, autocast):
    check_exact(coupling, 100, autocast)


@pytest.mark.slow
@pytest.mark.parametrize(("coupling", "autocast"), [(c, i % 2 == 0) for i, c in enumerate(FAMILIES)], ids=str)
def test_exactness_over_a_thousand_units(coupling, autocast):
    check_exact(coupling, 1000, autocast)


# -- bytes
# --------------------------------------------------------------------------------------------------------------------


@lru_cache
def held(coupling, depth=7, batch=64):
    """Bytes that a chain keeps between forward and backward."""
    model = toy(Case(coupling, True, torch.float32, 0.0, 0.0, ""), depth=depth).train()
    return saved_bytes(lambda: model(torch.zeros(batch, 16, WIDTH, requires_grad=True)))


@pytest.mark.parametrize("coupling", [c for c in EVERY if c.kept_bits > 1], ids=lambda c: c.name)
def test_a_unit_keeps_the_bits_that_its_coupling_declares(coupling):
    """All units of seven but the first; random signs are three numbers a sample besides: the sign, and what it makes of
    a and c.
    """
    units, elements, signs = 6, 64 * 16 * WIDTH, 64 * 12 if isinstance(coupling, RandomBdia) else 0
    more = units * elements * (coupling.kept_bits - 1) // 8
    assert held(coupling) - held(Bdia(1 / 2)) == more + 7 * signs


def test_a_unit_with_one_bit_keeps_an_eighth_of_a_byte_more_than_one_without():
    assert (
        held(Bdia(1 / 2), 7) - held(Bdia(1 / 2), 5) == held(Re2TAL(), 7) - held(Re2TAL(), 5) + 2 * 64 * 16 * WIDTH // 8
    )


def test_without_bits_a_unit_keeps_nothing_that_grows_with_the_stream():
    assert held(Re2TAL(), 7) - held(Re2TAL(), 5) == held(Re2TAL(), 7, batch=256) - held(Re2TAL(), 5, batch=256)
