"""Counters and bounds of the range checks, each to the number."""

from types import SimpleNamespace

import pytest
import torch

from revwire import RangeError
from revwire._runtime.range import RangeCheck, Reach, magnitude
from revwire._streams.base import Stepped

UNIT = SimpleNamespace(path="blocks.3")


def stepped(*values):
    return Stepped(torch.zeros(0), torch.tensor(values), None)


def check(reach=None, *, deferred=False, bound=8.0):
    return RangeCheck("chain 0", reach or Reach(1.0), bound, keep=True, deferred=deferred)


def test_each_unit_is_read_in_the_64_forwards_after_one_that_left_the_range():
    reach = Reach(4.0)
    reach.leave(1e3)
    for left in (*range(63, -1, -1), 0):
        reach.stay(1.0, 1e9)
        assert reach.careful == left


def test_a_range_falls_by_8_after_64_idle_forwards_each_time():
    reach = Reach(None)
    reach.leave(0.5)
    for following in (0.5, 0.5 / 8, 0.5 / 64):
        assert reach.begin() == following
        for _ in range(63):
            reach.stay(0.0, 1.0)
        assert reach.begin() == following
        reach.stay(0.0, 1.0)


def test_a_range_falls_to_that_of_the_example_and_no_further():
    reach = Reach(4.0)
    reach.leave(20.0)
    reach.begin()
    for _ in range(64):
        reach.stay(0.001, 640.0)
    assert reach.begin() == 4.0
    for _ in range(200):
        reach.stay(0.001, 640.0)
    assert reach.begin() == 4.0


def test_a_magnitude_is_that_of_all():
    assert magnitude(torch.zeros(0)) == 0.0
    assert magnitude(torch.tensor([-3.0, 1.0]), torch.tensor([2.0])) == 3.0
    assert magnitude(torch.tensor([1.0]), torch.tensor([2.0, -1.0])) == 2.0


def test_a_value_at_the_bound_is_out_of_range_on_either_side():
    checks = check()
    assert checks.largest == 0.0
    for values, largest in (((-5.0, 1.0), 5.0), ((1.0, 6.0), 6.0), ((0.5,), 6.0), ((), 6.0)):
        assert checks.holds(UNIT, stepped(*values))
        assert checks.largest == largest
    for value in (8.0, -8.0, float("nan"), float("-inf")):
        assert not checks.holds(UNIT, stepped(1.0, value))
    assert checks.largest == 6.0
    assert check(bound=None).holds(UNIT, stepped(1e30))


def test_what_is_read_late_stays_as_it_is_or_is_no_number():
    checks, inside, outside = check(deferred=True), stepped(-3.0, 2.0), stepped(1.0, -8.0)
    for one in (stepped(7.0), inside, stepped()):
        assert checks.holds(UNIT, one)
    assert inside.value.tolist() == [-3.0, 2.0]
    assert not checks.settle()
    assert checks.largest == 7.0
    assert checks.holds(UNIT, outside)
    assert outside.value.isnan().all()
    with pytest.raises(RangeError, match=r"blocks\.3 \(chain 0\): got a value of magnitude 8 or more; .*too late"):
        checks.settle()


@pytest.mark.parametrize(("met", "careful"), [(2.0, 0), (2.01, 64)])
def test_a_forward_that_came_near_the_end_is_followed_by_careful_ones(met, careful):
    reach = Reach(1.0)
    checks = check(reach)
    assert checks.holds(UNIT, stepped(met))
    checks.close()
    assert reach.careful == careful
    assert check(reach, deferred=True).deferred == (careful == 0)
