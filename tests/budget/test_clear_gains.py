"""What is said and chosen only where it gains clearly: each margin of the planner, from both sides."""

from types import SimpleNamespace

import pytest

from revwire._budget.advice import idle
from revwire._budget.fit import _tried
from revwire._budget.forms import Form
from revwire._budget.rewire import _serves_better
from revwire._budget.rival import rival
from revwire._budget.ways import Way
from revwire._plan.plan import Forecast, Point


def forecast(peak, seconds, budget=None):
    point = Point(peak, seconds)
    return Forecast(budget, point, point, point)


@pytest.mark.parametrize(
    ("budget", "peak", "seconds", "better"),
    [
        (1000, 2000, 97.9, True),  # within a budget, bytes do not count
        (1000, 500, 98.0, False),
        (1000, 500, 102.0, False),
        (None, 979, 200.0, True),
        (None, 980, 99.0, False),
        (None, 1000, 97.9, True),
        (None, 1000, 98.0, False),
        (None, 1001, 50.0, False),
    ],
)
def test_whole_hosts_are_units_where_that_is_clearly_faster_or_smaller(budget, peak, seconds, better):
    assert _serves_better(forecast(peak, seconds, budget), forecast(1000, 100.0, budget)) is better


@pytest.mark.parametrize(
    ("size", "peak", "seconds", "said"),
    [
        (None, 969, 500.0, "would need less"),
        (None, 970, 1.0, None),
        (1200, 1200, 96.9, "would fit as well"),
        (1200, 1200, 97.0, None),
        (1200, 1201, 1.0, None),
        (1200, 1, 500.0, None),
    ],
)
def test_checkpointing_is_named_where_it_is_clearly_smaller_or_faster(size, peak, seconds, said):
    lines = rival(size, Point(1000, 100.0), Point(peak, seconds))
    assert [said in line for line in lines] == ([] if said is None else [True])


class TwoChains:
    """Costs of two chains of one unit, of which the second gains ``gain`` bytes by being reversible."""

    def __init__(self, gain):
        self.units, self.gain = [SimpleNamespace(chain=0), SimpleNamespace(chain=1)], gain

    def uniform(self, mode):
        return [Form.REVERSIBLE if mode == "reversible" else Form.WHOLE_CHAIN] * 2

    def forecast(self, forms):
        return 1000 + 500 * forms[0].stored + self.gain * forms[1].stored, 10.0 - forms[1].stored


@pytest.mark.parametrize(("gain", "said"), [(20, 1), (21, 0)])
def test_a_chain_that_gains_up_to_two_percent_is_named(gain, said):
    plan = SimpleNamespace(chains=[SimpleNamespace(name="chain 0"), SimpleNamespace(name="chain 1")])
    lines = idle(plan, TwoChains(gain))
    assert len(lines) == said
    assert all(line.startswith("chain 1: reversible gains nothing here") and "in 90% of" in line for line in lines)


def test_a_chain_that_cannot_be_stored_is_not_named():
    costs = TwoChains(0)
    costs.uniform = lambda mode: [Form.REVERSIBLE if mode == "reversible" else Form.WHOLE_CHAIN, Form.REVERSIBLE]
    assert idle(SimpleNamespace(chains=[SimpleNamespace(name="chain 0"), SimpleNamespace(name="chain 1")]), costs) == ()


class Several(list):
    """Ways, none of which cuts units finer."""

    def finer(self, *_):
        return []


@pytest.mark.parametrize(("second", "undone", "smallest"), [(980, 0, 980), (981, 1, 1000)])
def test_another_way_is_kept_where_it_lowers_the_peak_by_two_percent_and_undone_elsewhere(
    second, undone, smallest, monkeypatch
):
    peaks = iter([1000, second])

    def costs(*, fresh):
        return SimpleNamespace(peak=next(peaks), measured=SimpleNamespace(places=()), units=[])

    monkeypatch.setattr("revwire._budget.fit.least_of", lambda by_way: (by_way[-1].peak, []))
    said = []
    ways = Several(
        [Way(lambda: said.append("first")), Way(lambda: said.append("other"), lambda: said.append("undone"))]
    )
    found = _tried(SimpleNamespace(costs=costs, progress=SimpleNamespace(left=100)), ways, None)
    assert said == ["first", "other", "undone"][: 2 + undone]
    assert found.smallest == smallest
    assert len(found.by_way) == 1
