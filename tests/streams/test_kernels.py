"""The compiled arithmetic against its plain form: the same law to the bit, the same values up to the last bit of one
rounding.
"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import revwire
from revwire import Bdia, Dr2Net, Momentum, Re2TAL
from revwire._streams import kernels as _kernels
from revwire._streams.bits import pack_bits
from revwire._streams.fixed import FixedStreams
from revwire.couplings.base import Rule
from revwire.measure import peak_bytes

pytest.importorskip("numba")

COUPLINGS = [Re2TAL(), *(Bdia(2.0**-m) for m in range(1, 8)), Momentum(1 / 8), Dr2Net(7 / 8, 1 / 8)]
SCALE = 20


def streams_of(size, layout, seed):
    g = torch.Generator().manual_seed(seed)
    shape = {"flat": (size,), "channels last": (1, 3, size, 2), "transposed": (size, 5)}[layout]
    tensors = [torch.randn(shape, generator=g) for _ in range(3)]
    if layout == "channels last":
        tensors = [t.to(memory_format=torch.channels_last) for t in tensors]
    elif layout == "transposed":
        tensors = [t.t() for t in tensors]
    return tensors


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 70),
    st.sampled_from(["flat", "channels last", "transposed"]),
    st.sampled_from(COUPLINGS),
    st.sampled_from(["residual", "block"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 9),
)
def test_compiled_and_plain_forms_agree(size, layout, coupling, kind, dtype, integer, seed):
    """The last bit of float32 below 16, where values lie, is one of 32-bit integers here, and 2^24 of 64-bit ones."""
    scale, last = (SCALE, 1) if integer == torch.int32 else (44, 2**24)
    compiled, plain = FixedStreams(scale, integer, form=_kernels), FixedStreams(scale, integer)
    before, x, f = streams_of(size, layout, seed)
    rule, f = Rule.of(coupling.coefficients if kind == "residual" else coupling.coefficients.for_block), f.to(dtype)
    previous, current = plain.enter(before), plain.enter(x)
    x = compiled.read(current)
    assert torch.equal(x, plain.read(current))
    mine, reference = (s.step(previous, x, f, rule) for s in (compiled, plain))
    assert mine.in_range
    assert mine.state.stride() == previous.stride()
    assert (mine.state - reference.state).abs().amax().item() <= last if size else True
    assert mine.state.dtype == mine.summary.dtype == integer
    assert not size or mine.largest / 2 <= mine.value.abs().amax().item() <= mine.largest + 2.0**-20
    assert torch.equal(mine.value, plain.read(mine.state))
    assert (mine.bits is None) == (reference.bits is None)
    if mine.bits is not None:
        assert torch.equal(mine.bits, reference.bits)
    undone = compiled.unstep(mine.state, x, f, rule, mine.bits)
    assert torch.equal(undone.state, previous)
    assert torch.equal(undone.summary, mine.summary)
    assert torch.equal(compiled.summary(previous), mine.summary)
    assert mine.summary.sum(dtype=integer) == previous.sum(dtype=integer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_branch", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 9, 100_001])
def test_a_step_by_the_state_gives_its_value_in_any_dtype(size, of_branch, dtype):
    streams, rule = FixedStreams(SCALE, torch.int32, form=_kernels), Rule.of(Bdia(1 / 8).coefficients)
    before, x, f = streams_of(size, "transposed", 0)
    previous, current, f = streams.enter(before), streams.enter(x), f.to(of_branch)
    expected = streams.step(previous, streams.read(current), f, rule)
    for x_k in (current, streams.read(current)):
        done = streams.step(previous, x_k, f, rule, dtype=dtype)
        assert done.in_range
        assert torch.equal(done.state, expected.state)
        assert torch.equal(done.value, expected.value.to(dtype))
        assert torch.equal(done.bits, expected.bits)
        assert torch.equal(done.summary, expected.summary)
        assert done.largest == expected.largest


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 1000])
def test_kept_bits_lie_as_in_the_plain_form(bits, size):
    previous = torch.randint(-(2**29), 2**29, (size,), dtype=torch.int32)
    rule = 8.0, 8.0, 1 / 8, bits, False
    done = _kernels.advance(previous, torch.zeros(size), torch.zeros(size), rule, keep=True, dtype=torch.float32)
    assert torch.equal(done.bits, pack_bits(previous + (1 << bits - 1), bits))


@pytest.mark.parametrize("at", [0, 50, 63, 64, 999])
def test_a_change_anywhere_shows_in_the_summary(at):
    streams, state = FixedStreams(SCALE, torch.int32, form=_kernels), torch.arange(1000, dtype=torch.int32)
    other = state.clone()
    other[at] ^= 1
    assert not torch.equal(streams.summary(state), streams.summary(other))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 2.0**10, -(2.0**10)])
@pytest.mark.parametrize("at", [0, 17, 99])
@pytest.mark.parametrize(("scale", "integer"), [(SCALE, torch.int32), (SCALE + 32, torch.int64)])
def test_what_is_out_of_range_is_told(value, at, scale, integer):
    streams, f = FixedStreams(scale, integer, form=_kernels), torch.zeros(100)
    f[at] = value
    start = streams.enter(torch.zeros(100))
    stepped = streams.step(start, streams.read(start), f, Rule.of(Re2TAL().coefficients))
    assert not stepped.in_range
    assert not float(stepped.value.abs().amax()) < streams.bound


@pytest.mark.parametrize("at", [0, 50_000, 100_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_it_is_in_whichever_piece(at, dtype):
    streams, f = FixedStreams(SCALE, torch.int32, form=_kernels), torch.zeros(100_001, dtype=dtype)
    f[at] = 1e30
    start = streams.enter(torch.zeros(100_001))
    stepped = streams.step(start, start, f, Rule.of(Re2TAL().coefficients), dtype=dtype)
    assert not stepped.in_range
    assert not float(stepped.value.abs().amax()) < streams.bound


def test_many_threads_make_the_same_bits(monkeypatch):
    monkeypatch.setattr(_kernels, "_LEAST_PER_THREAD", 100)
    before, x, f = (torch.randn(1001) for _ in range(3))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            streams = FixedStreams(SCALE, torch.int32, form=_kernels)
            previous, x = streams.enter(before), streams.read(streams.enter(x))
            results.append(streams.step(previous, x, f, Rule.of(Bdia().coefficients)))
            undone = streams.unstep(results[-1].state, x, f, Rule.of(Bdia().coefficients), results[-1].bits)
            assert torch.equal(undone.state, previous)
            assert torch.equal(undone.summary, results[-1].summary)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results[0][:4], results[1][:4], strict=True))


def test_other_devices_and_streams_of_64_bits_take_the_plain_form():
    assert FixedStreams.for_range(1.0, torch.float32, 1e-3).form is _kernels  # float32, in wide integers
    assert FixedStreams.for_range(1.0, torch.float64).form is None
    assert FixedStreams.for_range(1.0, torch.float32).form is _kernels
    assert not _kernels.suits(torch.empty(3, device="meta", dtype=torch.int32))
    assert not _kernels.suits(torch.empty(2, 3, dtype=torch.int32), torch.empty(3, 2).t())


class Wrapped(torch.Tensor):
    """One of the kinds of tensors that have no memory of their own."""


def test_tensors_of_other_kinds_are_not_read_at_their_address():
    plain, saved = torch.randn(200), [torch.randn(32)]
    assert torch.equal(_kernels.sampled(plain, saved, 64, 16)[:64], plain[::3][:64])
    assert _kernels.sampled(plain.as_subclass(Wrapped), saved, 64, 16) is None
    assert _kernels.sampled(plain, [saved[0].as_subclass(Wrapped)], 64, 16) is None
    assert _kernels.sampled(plain.double(), saved, 64, 16) is None
    assert _kernels.sampled(plain[:63], saved, 64, 16) is None
    assert _kernels.sampled(torch.randn(20, 20).t(), saved, 64, 16) is None
    assert not _kernels.suits(plain.as_subclass(Wrapped))


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_network_is_exact_with_and_without(switch):
    code = (
        "import torch, revwire; from torch import nn; torch.manual_seed(0); layer = nn.TransformerEncoderLayer(16, 2, "
        "32, norm_first=True, batch_first=True); m = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False); x = "
        "torch.randn(2, 5, 16); revwire.convert(m, x); check = revwire.verify(m, x); from revwire._streams import "
        "kernels; print(check.bit_exact, kernels.available())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "REVWIRE_KERNELS": switch},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["True", str(switch == "1")]


def test_every_coupling_declares_what_the_kernels_need():
    for coupling in COUPLINGS:
        rule = Rule.of(coupling.coefficients)
        assert isinstance(rule.a, float)
        assert isinstance(rule.c, float)
        assert rule.bits == coupling.kept_bits
    assert revwire.Bdia().kept_bits == 4


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("size", [8, 5056, 16, 13])
def test_bytes_are_compared_to_the_last(size, compiled, monkeypatch):
    if compiled:
        _kernels._native()
    else:
        monkeypatch.delitem(sys.modules, "revwire._streams.native", raising=False)
    a = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert _kernels.same_bytes(a, a.clone())
    for place in {0, size // 2, size - 1}:
        b = a.clone()
        b[place] ^= 128
        assert not _kernels.same_bytes(a, b)
    assert not _kernels.same_bytes(a, torch.cat([a, a]))


@pytest.mark.parametrize("sign", [1, -1])
def test_an_increment_may_be_larger_than_the_state_that_it_leads_to(sign):
    """x_{k+1} is in range, and x_{k+1} − b·x_{k-1} is not."""
    streams = FixedStreams.for_range(1.0, torch.float32)
    assert streams.form is not None
    largest = torch.linspace(0.8, 0.99, 64) * streams.bound
    x, rule = largest, Rule(1.25, -0.25 * sign, 0.0, 2)
    previous = streams.enter(x * sign)
    done = streams.step(previous, x, x, rule)
    assert done.in_range
    assert torch.equal(streams.unstep(done.state, x, x, rule, done.bits).state, previous)


@pytest.mark.parametrize("size", [1, 1000, 100_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [_kernels, None], ids=["compiled", "plain"])
def test_a_step_is_undone_by_the_state_as_by_its_value(size, dtype, form):
    streams, rule = FixedStreams(SCALE, torch.int32, form=form), Rule.of(Bdia(1 / 8).coefficients)
    before, x, f = streams_of(size, "transposed", 0)
    previous, current, f = streams.enter(before), streams.enter(x), f.to(dtype)
    done = streams.step(previous, streams.read(current), f, rule)
    undone = streams.unstep(done.state, current, f, rule, done.bits)
    assert torch.equal(undone.state, previous)
    assert undone.summary is None or torch.equal(undone.summary, streams.summary(previous))


def test_undoing_a_step_of_16_bits_makes_no_value_of_a_whole_stream():
    streams, rule, n = FixedStreams(SCALE, torch.int32, form=_kernels), Rule.of(Bdia(1 / 8).coefficients), 1 << 18
    before, x, f = streams_of(n, "flat", 0)
    previous, current, f = streams.enter(before), streams.enter(x), f.bfloat16()
    done = streams.step(previous, streams.read(current), f, rule)
    peak = peak_bytes(lambda: streams.unstep(done.state, current, f, rule, done.bits))
    assert peak < 1.3 * previous.nbytes  # the state that comes back, and pieces
