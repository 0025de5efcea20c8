"""What a comparison allows, from both sides of each tolerance."""

from types import SimpleNamespace

import pytest
import torch

from revwire import Bdia, ReconstructionError
from revwire._runtime.chain import Chain
from revwire._runtime.checks import Checks, _Pending
from revwire._streams.fixed import FixedStreams
from revwire._streams.floats import FloatStreams
from revwire._streams.samples import Fingerprint, alike, can_be_sampled, glance, same_glances, size_of_glance, spread

STATE, BRANCH = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([-1.0, 3.0], dtype=torch.float64)
NAN = float("nan")


class Wrapped(torch.Tensor):
    """It may have no memory of its own."""


def off(state, branch, dtype=torch.float32):
    """A fingerprint whose state and branch are off by so much of their size."""
    return Fingerprint(STATE * torch.tensor([1.0, 1.0 + state]), BRANCH + torch.tensor([0.0, 4.0 * branch]), dtype)


def judged(streams, before, after):
    """The checks, as a backward pass makes them, of a unit that was ``before`` and is ``after``."""
    unit = SimpleNamespace(path="blocks.1", where=lambda chain: "blocks.1")
    checks = Checks(Chain("chain 0", Bdia(1 / 8), exact=False, length=2), streams, deferred=False)
    checks._judge(_Pending(unit, before, after), streams.difference(before, after).tolist())


@pytest.mark.parametrize(
    ("dtype", "state", "branch"),
    [
        (torch.float32, 1e-4, 1e-2),
        (torch.float64, 1e-4, 1e-2),
        (torch.bfloat16, 1e-2, 5e-2),
        (torch.float16, 1e-2, 5e-2),
    ],
)
def test_float_streams_allow_what_they_say_and_no_more(dtype, state, branch):
    streams, before = FloatStreams(), off(0, 0, dtype)
    assert streams.allowed(before) == (state, branch)
    judged(streams, before, off(0.99 * state, 0.99 * branch, dtype))
    judged(streams, before, off(-0.99 * state, -0.99 * branch, dtype))
    for sign in (1, -1):
        with pytest.raises(ReconstructionError, match=rf"rebuilt input differs \(by .*; {state:.3g} is allowed\)"):
            judged(streams, before, off(sign * 1.01 * state, 0, dtype))
        with pytest.raises(ReconstructionError, match=rf"computed other values \(by .*; {branch:.3g} is allowed\)"):
            judged(streams, before, off(0, sign * 1.01 * branch, dtype))


@pytest.mark.parametrize(
    "streams", [FloatStreams(), FixedStreams.for_range(1.0, torch.float32)], ids=["float", "exact"]
)
def test_what_is_not_a_number_is_a_fault_unless_it_was_so_before(streams):
    before = off(0, 0)
    with pytest.raises(ReconstructionError, match="rebuilt input differs"):
        judged(streams, before, off(NAN, 0))
    with pytest.raises(ReconstructionError, match="computed other values"):
        judged(streams, before, off(0, NAN))


def test_float_streams_give_up_on_what_was_not_finite_in_both():
    streams = FloatStreams()
    judged(streams, off(NAN, 0), off(NAN, 0))
    judged(streams, off(0, NAN), off(0, NAN))
    for before, after in ((off(NAN, 0), off(0, NAN)), (off(0, NAN), off(NAN, 0)), (off(NAN, 0), off(0, 0))):
        assert not streams.hopeless(before, after)
        with pytest.raises(ReconstructionError, match=r"(differs|other values)"):
            judged(streams, before, after)


def test_the_largest_error_of_a_state_counts_and_the_mean_one_of_a_branch():
    streams, before = FloatStreams(), off(0, 0)
    after = Fingerprint(STATE - torch.tensor([0.5, -0.25]), BRANCH + torch.tensor([0.75, -0.25]), torch.float32)
    assert streams.difference(before, after).tolist() == pytest.approx([0.25, 0.25], rel=1e-12)
    empty = Fingerprint(torch.zeros(0), torch.zeros(0), torch.float32)
    assert streams.difference(empty, empty).tolist() == [0, 0]


def test_the_same_bits_are_those_of_the_state_and_of_the_branch():
    before = off(0, 0)
    assert before.same_bits(off(0, 0))
    assert not before.same_bits(off(1e-6, 0))
    assert not before.same_bits(off(0, 1e-6))


def test_anchors_come_closer_when_a_quarter_of_the_tolerance_is_used():
    chain = Chain("chain 0", Bdia(1 / 8), exact=False, length=9)
    chain.set_anchors(5, adapts=True, tolerance=4e-3)
    chain.drifted(1e-3)
    assert chain.spacing == 5
    chain.drifted(1.01e-3)
    assert chain.spacing == 2
    for _ in range(3):
        chain.drifted(1.0)
    assert chain.spacing == 1
    chain.set_anchors(5, tolerance=4e-3)
    chain.drifted(1.0)
    assert chain.spacing == 5


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1e-7), (torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)],
)
def test_parts_are_alike_up_to_the_rounding_of_products(dtype, allowed):
    """Relative to the largest finite number in the whole."""
    whole = torch.tensor([0.0, -4.0, NAN, float("inf")], dtype=dtype)
    error = torch.tensor([4 * allowed, 0.0, 0.0, 0.0])
    assert alike((whole + 0.99 * error).to(dtype), whole)
    assert not alike((whole + 1.01 * error).to(dtype), whole)
    assert not alike(whole.nan_to_num(nan=0.0), whole)


def test_what_are_no_floats_is_alike_where_it_is_equal():
    whole = torch.tensor([100, 2, 3])
    assert alike(whole.clone(), whole)
    assert not alike(whole + 1, whole)
    assert not alike(whole.int(), whole)
    assert not alike(whole[:2], whole)
    assert not alike(torch.ones(1), torch.ones(2))
    assert alike(torch.ones(0), torch.ones(0))
    assert alike(torch.complex(BRANCH, STATE), torch.complex(BRANCH, STATE + 1e-8))
    assert not alike(torch.complex(BRANCH, STATE), torch.complex(BRANCH, STATE + 1e-6))


def test_glances_differ_by_one_element():
    """Of few integers nothing can be said: they may be scratch space."""
    x = torch.arange(64.0)
    other = x.clone()
    other[63] += 1e-5
    assert same_glances([glance(x)], [glance(x.clone())])
    assert not same_glances([glance(x)], [glance(other)])
    assert not same_glances([glance(x)], [])
    assert not same_glances([glance(x)], [glance(x.double())])
    assert not same_glances([glance(x)], [glance(x[:63])])
    assert not same_glances([glance(x), glance(x)], [glance(x), glance(other)])
    assert glance(x[:0]).numel() == 0
    gone = torch.full((3,), NAN)
    assert same_glances([glance(gone)], [glance(gone.clone())])
    assert not same_glances([glance(gone)], [glance(torch.zeros(3))])
    assert glance(torch.tensor([1, 2])) is None
    assert glance(torch.tensor([1, 2, 3])) is not None
    assert glance(torch.tensor([True])) is not None
    assert glance(torch.tensor([1.0])) is not None
    assert glance(torch.zeros(9, dtype=torch.uint8)) is None
    for kind in (x.to_sparse(), x.as_subclass(Wrapped)):
        assert glance(kind) is None
        assert not can_be_sampled(kind)
    assert can_be_sampled(x)
    assert not can_be_sampled(x.int())


def test_samples_lie_at_equal_distances():
    assert glance(torch.arange(130.0)).tolist() == [*range(0, 128, 2)]
    assert glance(torch.arange(5.0)).tolist() == [*range(5)]
    assert (size_of_glance(130, torch.float32), size_of_glance(5, torch.float64)) == (256, 40)
    assert spread(torch.arange(9.0), 4).tolist() == [0, 2, 4, 6]
    assert spread(torch.arange(3.0), 64).tolist() == [0, 1, 2]
    assert spread(torch.arange(100.0)[::10], 64).tolist() == [*range(0, 90, 9)]
    assert spread(torch.ones(1).expand(5), 64).tolist() == [1]
    assert spread(torch.ones(0), 64).tolist() == []


def test_states_are_kept_every_so_many_units_and_before_checkpointed_ones():
    chain = Chain("chain 0", Bdia(1 / 8), exact=True, length=5)
    assert [chain.anchored(i) for i in range(5)] == [False] * 5
    chain.set_anchors(2)
    assert [chain.anchored(i) for i in range(5)] == [False, False, True, False, True]
    chain.set_anchors(1)
    assert [chain.anchored(i) for i in range(5)] == [False, True, True, True, True]
    chain.set_anchors(None)
    assert not any(ask(i) for i in range(5) for ask in (chain.checkpoints, chain.selects, chain.stores))
    for mode, checkpoints, selects in (("checkpointed", True, False), ("selective", True, True)):
        chain.modes = (mode,) * 5
        assert [chain.checkpoints(i) for i in range(5)] == [chain.anchored(i) for i in range(5)]
        assert [chain.checkpoints(i) for i in range(5)] == [False, *[checkpoints] * 4]
        assert [chain.selects(i) for i in range(5)] == [False, *[selects] * 4]
        assert not any(map(chain.stores, range(5)))
    chain.modes = ("stored",) * 5
    assert [chain.stores(i) for i in range(5)] == [True] * 5
    assert not any(map(chain.anchored, range(5)))
