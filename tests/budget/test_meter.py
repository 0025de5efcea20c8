"""What is read off clocks and marks: what disturbs a machine only ever adds, and nothing counts twice."""

from types import SimpleNamespace

import pytest
import torch

from revwire import Bdia
from revwire._budget import meter
from revwire._budget.marker import Marker, Operands, Place
from revwire._budget.measured import Arithmetic
from revwire._streams.fixed import FixedStreams

CPU = torch.device("cpu")


class Seen:
    """What stands for a chain: it is looked at."""

    observer, modes = None, "as before"


@pytest.fixture
def clock(monkeypatch):
    """A function that sets what the clock shows, one time after the other."""

    def shows(*times):
        left = iter(times)
        monkeypatch.setattr(meter, "perf_counter", lambda: next(left))

    return shows


def test_a_stretch_lasts_from_its_mark_to_the_next(clock):
    chain = Seen()
    clock(0.0, 5.0, 7.0)
    stretches, marker = meter._stretches([chain], lambda: chain.observer.mark("turn"), CPU)
    assert [s.seconds for s in stretches] == [5.0, 2.0]
    assert [s.mark for s in stretches] == marker.marks
    assert [m.kind for m in marker.marks] == ["begin", "turn"]


def test_of_two_steps_bytes_are_those_of_the_second_and_seconds_the_lesser(clock):
    chain, made = Seen(), []

    def step():
        made.append(torch.zeros(1000 // len([*made, 1])))
        chain.observer.mark("turn")

    clock(0.0, 5.0, 7.0, 10.0, 13.0, 18.0)
    begin, turn = meter.measured([chain], step, CPU).stretches
    assert (begin.seconds, turn.seconds) == (3.0, 2.0)
    assert begin.peak == turn.level == 2000


def test_of_three_runs_of_an_operation_the_least_counts(clock):
    runs = []
    clock(0.0, 5.0, 10.0, 13.0, 20.0, 22.0)
    assert meter._best(lambda: runs.append(1), CPU) == 2.0
    assert len(runs) == 3


@pytest.mark.parametrize(("kept", "keep"), [(5.0, 3.0), (1.0, 0.0)])
def test_keeping_bits_takes_what_a_step_takes_longer_and_never_less_than_nothing(kept, keep, monkeypatch):
    times = iter([kept, 2.0, 0.5])
    monkeypatch.setattr(meter, "_best", lambda run, device: next(times))
    streams = FixedStreams.for_range(1.0, torch.float32)
    sample = Operands(streams, torch.Size([4]), torch.float32, Bdia(1 / 8))
    assert meter._timed(sample, CPU) == Arithmetic(keep, 0.5)


class Steps:
    """Steps of which each of the first ``unlike`` has marks like no other."""

    def __init__(self, unlike, chain):
        self.unlike, self.chain, self.runs = unlike, chain, 0

    def __call__(self):
        self.runs += 1
        for _ in range(1 + self.runs if self.runs <= self.unlike else 1):
            self.chain.observer.mark("turn")


@pytest.mark.parametrize(("unlike", "runs"), [(0, 2), (1, 3), (2, 4), (3, 4)])
def test_steps_that_are_not_alike_are_tried_again_three_times(unlike, runs):
    chain = Seen()
    steps = Steps(unlike, chain)
    if unlike == 3:
        with pytest.raises(meter.Unsteady):
            meter.measured([chain], steps, CPU, modes=[("stored",)])
    else:
        assert [s.mark.kind for s in meter.measured([chain], steps, CPU).stretches] == ["begin", "turn"]
    assert steps.runs == runs
    assert chain.modes == "as before"


def test_a_step_in_which_nothing_is_made_runs_once():
    chain = Seen()
    steps = Steps(0, chain)
    meter.measured([chain], steps, CPU, fresh=False)
    assert steps.runs == 1


def test_what_is_held_until_a_unit_is_rebuilt_is_held_until_the_forward_ends():
    marker = Marker([], lambda: None)
    marker.places.append(Place(0, 0))
    marker.seen[0] = [SimpleNamespace(size=100, alive=True), SimpleNamespace(size=50, alive=False)]
    marker.lasting[0], marker.early[0] = 70, 40
    run = meter._run(marker, 0, Arithmetic(0.0, 0.0))
    assert (run.saved, run.early, run.lasting) == (0, 70, 70)  # never rebuilt: it was stored already
    marker.rebuilt[0], marker.early[0] = 120, 90
    run = meter._run(marker, 0, Arithmetic(0.0, 0.0))
    assert (run.saved, run.rebuilt, run.early, run.lasting) == (150, 120, 90, 70)
    marker.grad(0)
    assert marker.lasting[0] == 100
