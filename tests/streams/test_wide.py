"""Streams with a few channels much larger than the rest: the others keep the precision of their branches, and all else
holds as it does without.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import revwire
from cases import FAST
from revwire import Bdia, RandomBdia, Re2TAL
from revwire._runtime.range import Reach
from revwire._streams import fixed
from revwire._streams.fixed import FixedStreams, asks_for_wide
from revwire._streams.samples import usual_magnitude
from steps import gradients, same
from toys import Blocks, inputs_of, mixed, stored

WIDTH, LARGE = 64, [3, 17, 40]
OTHERS = [i for i in range(WIDTH) if i not in LARGE]

FIXED = pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)


class Ignoring(nn.Module):
    """x + an MLP of what the large channels leave: their size changes no branch, so that only streams may lose bits."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("others", torch.ones(WIDTH).index_fill_(0, torch.tensor(LARGE), 0.0))

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x * self.others))))


def network(place=None, size=1.0, depth=12):
    """(A network, its input): the large channels are in the input, or come from the unit at ``place``."""
    model = Blocks(Ignoring, depth)
    x = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    if place is None:
        x[..., LARGE] *= size
    else:
        with torch.no_grad():
            model.blocks[place].down.bias[LARGE] += size
    return model, x


def autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def error(out, true):
    """Relative, of the other channels."""
    return float((out.detach().double() - true)[..., OTHERS].norm() / true[..., OTHERS].norm())


def in_doubles(model, x, coupling):
    """The rule of a coupling in float64, written down a second time."""
    a, b, c = coupling.coefficients
    before = now = x.double()
    for block in copy.deepcopy(model).double().blocks:
        before, now = now, a * now + b * before + c * (block(now) - now)
    return coupling.merge(before, now).detach()


def integers(model, x):
    """The dtypes of the states of a forward pass."""
    kinds, step = [], FixedStreams.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedStreams, "step", lambda s, p, *a, **k: (kinds.append(p.dtype), step(s, p, *a, **k))[1])
        model(x)
    return set(kinds)


@pytest.mark.parametrize("size", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("place", [None, 0, 5])
@pytest.mark.parametrize("coupling", [Bdia(1 / 16), Re2TAL()], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_channels_keep_the_precision_of_the_network(size, place, coupling, dtype):
    """Twice the plain network's own rounding, as where no channel is large; up to eight times (2^3 of the 2^5 that 19
    bits of 24 allow) where 32-bit integers are left. Those alone have 90 to 800 times it at 10^3.
    """
    model, x = network(place, size)
    with torch.no_grad(), autocast(dtype):
        plain = error(model(x), copy.deepcopy(model).double()(x.double()))
        true = in_doubles(model, x, coupling)
        revwire.convert(model, x, coupling=coupling)
        assert error(model(x), true) < (8 if size == 1e1 else 2) * plain


@pytest.mark.parametrize("coupling", [Bdia(1 / 16), Re2TAL(), RandomBdia()], ids=lambda c: c.name)
@pytest.mark.parametrize("place", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"anchors": 2}], ids=str)
def test_wide_streams_are_exact(coupling, place, dtype, options):
    model, x = network(place, 1e5, depth=5)
    with autocast(dtype):
        revwire.convert(model.train(), x, coupling=coupling, **options)
        assert integers(model, x) == {torch.int64}
        check = revwire.verify(model, x)
    assert check.bit_exact
    assert len(check.units) >= 4


@FIXED
@pytest.mark.parametrize("mix", ["rrrrrr", "cccccc", "pppppp", "srcpsr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_are_units_in_all_modes(case, mix, dtype):
    model = mixed(case, mix)
    model.chain.reach = Reach(3e4, 1.0)
    x = inputs_of(model, case).detach()
    x[..., 2] *= 2e4
    x.requires_grad_()
    with autocast(dtype):
        assert integers(model, x) == {torch.int64}
        rebuilt = gradients(model, x)
        with stored(model):
            assert same(rebuilt, gradients(model, x))


@pytest.mark.parametrize("coupling", [Bdia(1 / 16), Re2TAL()], ids=lambda c: c.name)
def test_a_value_that_is_read_late_is_that_of_its_state(coupling, monkeypatch):
    """As on accelerators, where it is made in another way."""
    monkeypatch.setattr(fixed, "_is_read_late", lambda device: True)
    streams = replace(FixedStreams.for_range(1e6, torch.float32, 1.0), form=None)
    x = network(None, 1e6)[1]
    state, rule = streams.enter(x), coupling.rule("residual", x)
    stepped = streams.step(state, streams.read(state), x.roll(1), rule)
    assert stepped.value.dtype == torch.float32
    assert torch.equal(stepped.value, streams.read(stepped.state))


# -- when they are wide ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dtype", "wide"),
    [
        (1.0, torch.float32, False),
        (1e3, torch.float32, True),
        (1e3, torch.bfloat16, False),  # 14 bits, where branches have 8
        (1e5, torch.bfloat16, True),
    ],
)
def test_a_plan_knows_whether_streams_are_wide(size, dtype, wide):
    model, x = network(None, size)
    with autocast(dtype):
        plan = revwire.plan(model, x)
        revwire.convert(model, x)
        assert integers(model, x) == {torch.int64 if wide else torch.int32}
    assert plan.chains[0].stream_bytes == 2 * x.numel() * (8 if wide else 4)
    assert (
        revwire.plan(network(None, size)[0], x, coupling="momentum:.9", anchors=2).chains[0].stream_bytes
        == 8 * x.numel()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_16_bits_asks_for_fewer(dtype):
    model, x = network(None, 300.0)
    revwire.convert(model.to(dtype), x.to(dtype))
    assert integers(model, x.to(dtype)) == {torch.int32}


def test_bits_that_are_asked_for():
    assert not asks_for_wide(32.0, 1.0, torch.float32)
    assert asks_for_wide(33.0, 1.0, torch.float32)
    assert not asks_for_wide(2.0**10, 1.0, torch.float16)
    assert asks_for_wide(2.0**10 + 1, 1.0, torch.float16)
    assert not asks_for_wide(2.0**13, 1.0, torch.bfloat16)
    assert asks_for_wide(2.0**13 + 1, 1.0, torch.bfloat16)
    assert not asks_for_wide(1e9, 0.0, torch.float32)  # it is not known
    streams = FixedStreams.for_range(1e6, torch.float32, 1.0)
    assert streams.read(streams.enter(torch.tensor([1 / 3]))).item() == torch.tensor(1 / 3).item()
    assert streams.bound >= 2**5 * 1e6


def test_large_channels_in_the_input_that_the_example_had_not():
    model, x = network(None, 1e5)
    revwire.convert(model, network()[1])
    true = in_doubles(network()[0], x, Bdia(1 / 16))
    assert integers(model, network()[1]) == {torch.int32}
    assert integers(model, x) == {torch.int64}
    assert error(model(x), true) < 1e-6
    assert integers(model, 1e5 * network()[1]) == {torch.int32}  # no channel is larger than the rest
    assert revwire.verify(model, x).bit_exact


def test_large_channels_of_a_unit_that_the_example_had_not():
    model, x = network()
    revwire.convert(model, x)
    assert integers(model, x) == {torch.int32}
    with torch.no_grad():
        model.blocks[5].down.bias[LARGE] += 1e5
    true = in_doubles(network(5, 1e5)[0], x, Bdia(1 / 16))
    with pytest.warns(UserWarning, match="scaled anew"):
        assert integers(model, x) == {torch.int32, torch.int64}  # from there on
    assert integers(model, x) == {torch.int64}  # from the beginning
    assert error(model(x), true) < 1e-6
    assert revwire.verify(model, x).bit_exact


def test_reach_knows_what_is_usual_beside_the_largest():
    reach = Reach(4.0, 1.0)
    assert (reach.begin(), reach.beside) == (4.0, 1.0)
    reach.leave(1e6, 1e3)
    assert reach.beside == 1.0  # in the present forward
    assert (reach.begin(), reach.beside) == (1e6, 1e3)
    reach.leave(1e5, 1e5)  # of a forward that began before
    assert (reach.begin(), reach.beside) == (1e6, 1e3)
    for _ in range(64 * 9):
        reach.begin()
        reach.stay(4.0, 2.0**5 * reach.largest)
    assert reach.beside < 10.0
    reach.leave(1e7)  # read late: nothing is known beside it
    assert (reach.begin(), reach.beside) == (1e7, 1.0)


# -- what is usual -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((2, 8, 64), -1), ((4, 512, 768), -1), ((2, 768, 16, 16), 1)])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_a_few_channels_do_not_move_what_is_usual(shape, dim, size):
    """It is 1.15 standard deviations of a normal distribution; 4096 samples know that to 2 %, 1024 elements to 5 %."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for channel in (1, 5):
        x.select(dim, channel).mul_(size)
    for seen in (x, x.transpose(1, -1), x.to(torch.bfloat16)):
        assert usual_magnitude(seen) == pytest.approx(1.15, rel=0.15)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 4094, 4095, 4096])
def test_three_of_four_elements_stay_below_what_is_usual(count):
    x = torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.1
    assert usual_magnitude(-x) == float(x.quantile(0.75))


def test_what_is_usual_leaves_zeros_out():
    x = torch.zeros(1000)
    assert usual_magnitude(x) == 0.0
    x[::10] = -3.0
    assert usual_magnitude(x) == 3.0
    assert usual_magnitude(torch.full((4,), torch.nan)) == 0.0
    assert usual_magnitude(torch.empty(0, 3)) == 0.0
    assert usual_magnitude(torch.tensor(2.0, dtype=torch.float64)) == 2.0
