"""Arithmetic of the streams: packing, layouts, range, fingerprints."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from revwire import Bdia, RangeError, Re2TAL
from revwire._streams.base import canonical, stream_dtype
from revwire._streams.bits import pack_bits, unpack_bits
from revwire._streams.fixed import FixedStreams
from revwire._streams.floats import FloatStreams
from revwire._streams.samples import can_be_sampled
from revwire.couplings.base import Rule

RULE = Rule.of(Bdia(1 / 16).coefficients)
NO_BITS = Rule.of(Re2TAL().coefficients)


def fixed(scale=20, integer=torch.int32):
    return FixedStreams(scale, integer)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.integers(1, 7))
def test_packing_keeps_the_low_bits(values, bits):
    state = torch.tensor(values, dtype=torch.int32)
    packed = pack_bits(state, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(len(values) / 8) * bits
    assert torch.equal(unpack_bits(packed, bits, state), state & (1 << bits) - 1)


def test_packing_follows_the_memory_layout():
    state = torch.randint(-1000, 1000, (2, 8, 3, 5), dtype=torch.int32).to(memory_format=torch.channels_last)
    back = unpack_bits(pack_bits(state, 3), 3, state)
    assert back.stride() == state.stride()
    assert torch.equal(back, state & 7)


@pytest.mark.parametrize("make", [
    lambda: torch.randn(2, 8, 3, 5),
    lambda: torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last),
    lambda: torch.randn(4, 6).t(),
    lambda: torch.randn(8, 8)[:, 2:6],
    lambda: torch.randn(3, 1).expand(3, 4),
    lambda: torch.randn(0, 4),
    lambda: torch.randn(()),
])  # fmt: skip
@pytest.mark.parametrize(
    ("streams", "rule"),
    [
        (FloatStreams(), NO_BITS),
        (fixed(), RULE),
        (fixed(), NO_BITS),
        (fixed(44, torch.int64), RULE),
        (fixed(44, torch.int64), NO_BITS),
    ],
    ids=["float", "fixed-4", "fixed-0", "wide-4", "wide-0"],
)
def test_states_are_rebuilt_in_value_and_layout(make, streams, rule):
    x = canonical(make())
    start, f = streams.enter(x), torch.randn(x.shape)
    following, value, bits, *_ = streams.step(start, streams.read(start), f, rule)
    rebuilt = streams.unstep(following, streams.read(start), f, rule, bits).state
    assert torch.equal(value, streams.read(following))
    assert rebuilt.stride() == start.stride() == x.stride()
    torch.testing.assert_close(rebuilt, start, rtol=0, atol=1e-6 if isinstance(streams, FloatStreams) else 0)


def test_a_dense_tensor_stays_and_others_are_copied():
    dense = torch.randn(4, 6).t()
    assert canonical(dense) is dense
    assert canonical(torch.randn(8, 8)[:, 2:6]).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_streams_are_never_narrower_than_float32(dtype):
    assert stream_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("dtype", "fraction"), [(torch.float32, 2.0**-25), (torch.float64, 2.0**-52)])
@pytest.mark.parametrize("largest", [1e-6, 0.7, 1.0, 3e4])
def test_the_scale_leaves_headroom_and_resolution(dtype, largest, fraction):
    streams = FixedStreams.for_range(largest, dtype)
    assert 2.0**-streams.scale <= fraction * largest * 2
    assert streams.bound >= 2**5 * largest


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("usual", [0.0, 1e-3], ids=["", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_what_is_not_a_number_in_range_is_seen(value, dtype, size, usual):
    compiled = FixedStreams.for_range(1.0, dtype, usual)
    for streams in {compiled, replace(compiled, form=None)}:
        before = streams.enter(torch.linspace(-30, 30, size, dtype=dtype))
        f = torch.zeros(size, dtype=dtype)
        f[size // 2] = value
        following = streams.step(before, streams.read(before), f, RULE).state
        assert not float(streams.read(following).abs().amax()) < streams.bound


def test_a_range_cannot_be_chosen_for_what_is_not_finite():
    with pytest.raises(RangeError, match="largest magnitude of nan"):
        FixedStreams.for_range(math.nan, torch.float32)


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 1000, 4097])
def test_one_changed_bit_changes_the_fingerprint(size):
    streams, f = fixed(), torch.zeros(size)
    state = torch.randint(-(2**20), 2**20, (size,), dtype=torch.int32)
    before = streams.fingerprint(state, f, [])
    assert before.same_bits(streams.fingerprint(state.clone(), f, []))
    assert streams.difference(before, streams.fingerprint(state.clone(), f, [])).tolist() == [0, 0]
    for at in {0, size // 2, size - 1}:
        other = state.clone()
        other[at] ^= 1
        difference = streams.difference(before, streams.fingerprint(other, f, []))
        assert difference[0] > streams.allowed(before)[0]
        assert difference[1] == 0


def test_one_changed_element_of_a_sample_is_not_allowed():
    streams, state, f = fixed(), torch.zeros(64, dtype=torch.int32), torch.zeros(64)
    before = streams.fingerprint(state, f, [])
    f[7] = 1e-30
    difference = streams.difference(before, streams.fingerprint(state, f, []))
    assert difference[0] == 0
    assert difference[1] > streams.allowed(before)[1]


def test_a_permutation_across_the_state_changes_the_fingerprint():
    streams, f = fixed(), torch.zeros(256)
    state = torch.arange(256, dtype=torch.int32)
    assert not streams.fingerprint(state, f, []).same_bits(streams.fingerprint(state.flip(0), f, []))


def test_a_float_fingerprint_sees_more_than_its_tolerance_and_no_rounding():
    streams, state, f = FloatStreams(), torch.randn(3, 1000), torch.randn(3, 1000)
    before = streams.fingerprint(state, f, [])

    def errors(state, f):
        values = streams.difference(before, streams.fingerprint(state, f, [])).tolist()
        return [value > allowed for value, allowed in zip(values, streams.allowed(before), strict=True)]

    assert errors(state * (1 + 1e-6), f * (1 + 1e-6)) == [False, False]
    assert errors(state + 1e-2 * torch.randn(state.shape), f) == [True, False]
    assert errors(state, torch.nn.functional.dropout(f, 0.1)) == [False, True]
    assert errors(torch.cat([state[:1] * 0, state[1:]]), f)[0]


def test_samples_may_be_of_any_layout():
    streams, state = fixed(), torch.zeros(4, dtype=torch.int32)
    saved = [
        torch.randn(4, 6).t(),
        torch.randn(3, 1).expand(3, 4),
        torch.randn(8, 8)[:, 2:6],
        torch.ones(3, dtype=torch.bool),
        torch.randn(2, 0),
    ]
    before = streams.fingerprint(state, torch.randn(()), [t for t in saved if can_be_sampled(t)])
    assert before.branch.isfinite().all()
    assert before.branch.numel() == 1 + 16 + 3 + 16
