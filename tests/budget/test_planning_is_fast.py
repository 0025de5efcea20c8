"""A plan measures few steps, none where the budget is hopeless, and says how far it is to a terminal alone."""

import itertools
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

import revwire
from revwire._budget.by_kind import survey
from revwire._budget.fit import MOST_STEPS
from revwire._budget.progress import Progress
from revwire._splitting.separable import separable
from toys import encoder

FORWARDS = itertools.count()
"""Of the model. (A list of them would be as before when it has been planned.)"""


def forwards_of(run):
    """How often the model runs meanwhile."""
    before = next(FORWARDS)
    with suppress(revwire.BudgetError):
        run()
    return next(FORWARDS) - before - 1


class Counted(nn.Module):
    """A transformer that counts its forwards."""

    def __init__(self, depth=6, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = encoder(depth, 32, 4, 128, dropout=dropout), nn.Linear(32, 2)

    def forward(self, x):
        next(FORWARDS)
        return self.head(self.body(x))


class Perceptron(nn.Module):
    """A block of two layers."""

    def __init__(self, width=128):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, width), nn.Linear(width, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


X = torch.randn(16, 64, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def steps(monkeypatch):
    """How many steps were measured, as a list of ones."""
    seen = []

    def counted(progress):
        seen.append(1)
        advance(progress)

    advance = Progress.advance
    monkeypatch.setattr(Progress, "advance", counted)
    return seen


@pytest.mark.parametrize("budget", ["least", 2_400_000, 3_700_000, 8_000_000])
def test_a_budget_takes_five_steps_and_a_dozen_forwards_at_most(budget, steps):
    """Units whole twice, as something is made in the first step; each kind of unit in finer cuts; selective ones."""
    runs = forwards_of(lambda: revwire.convert(Counted().train(), X, memory_budget=budget))
    assert 2 <= len(steps) <= 5 < MOST_STEPS
    assert len(steps) < runs <= 12


@pytest.mark.parametrize("depth", [4, 12])
def test_the_least_budget_takes_the_work_of_nine_steps_at_most(depth, steps, monkeypatch):
    """A step: one forward, and a backward of two. What units are looked at for counts by its share in a forward."""
    work = [0]

    def counted(linear, x):
        work[0] += x.numel() * linear.out_features
        return forward(linear, x)

    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", counted)
    model = nn.Sequential(*(Perceptron() for _ in range(depth)))
    model(X)
    once, work[0] = work[0], 0
    revwire.convert(model, X, memory_budget="least")
    assert len(steps) >= 3
    assert (work[0] / once + 2 * len(steps)) / 3 <= 9


def test_units_that_fit_whole_are_not_looked_at(monkeypatch):
    looked = []

    def noted(unit, *rest):
        looked.append(unit.path)
        return separable(unit, *rest)

    monkeypatch.setattr("revwire._splitting.probe.separable", noted)
    model = nn.Sequential(*(Perceptron(width) for width in (2048, 2048, 8, 8)))
    revwire.convert(model, X, memory_budget="least")
    assert looked
    assert all(path.startswith(("0", "1")) for path in looked)
    assert [u.chunks > 1 for u in revwire.report(model).units] == [True, True, False, False]


def test_a_deeper_model_takes_no_more_steps(steps):
    for depth in (6, 12):
        revwire.convert(Counted(depth).train(), X, memory_budget="least")
    assert sum(steps) % 2 == 0
    assert len(steps) <= 8


@pytest.mark.parametrize(("dropout", "runs"), [(0.0, 2), (0.1, 3)])
def test_a_model_that_draws_nothing_is_not_run_again_to_see_what_it_draws(dropout, runs):
    model = Counted(dropout=dropout).train()
    assert forwards_of(lambda: revwire.convert(model, X, chunks=2, rewire="everywhere")) == runs
    assert {u.chunks for u in revwire.report(model).units} == {2}


def cut(way, place):
    """Units at even places may be cut, and those of the second chain into two chunks at most."""
    return (1,) if place[1] % 2 else (min(way + 1, 2) if place[0] else way + 1,)


def test_each_kind_is_seen_in_each_of_its_cuts_in_as_few_steps_as_there_can_be():
    places = [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)]
    found = survey(places, [[0, 1, 0, 1, 0]], [1, 2], cut, 8)
    assert found.steps == [{(0, 0): 2, (0, 2): 1}]  # the finest first
    assert found.seen == {(0, (3,)): (0, (0, 0)), (0, (2,)): (0, (0, 2))}
    assert found.ways == [1, 2]


def test_a_kind_with_fewer_units_than_cuts_takes_more_steps_and_the_coarsest_cut_goes_first_where_they_run_out():
    kinds = [[0, 1]]
    assert survey([(0, 0), (0, 1)], kinds, [1, 2], cut, 8).steps == [{(0, 0): 2}, {(0, 0): 1}]
    found = survey([(0, 0), (0, 1)], kinds, [1, 2], cut, 1)
    assert (found.steps, found.ways) == ([{(0, 0): 2}], [2])


def test_ways_that_cut_a_kind_alike_are_seen_once():
    found = survey([(1, 0)], [[], [0]], [1, 2], cut, 8)
    assert (found.steps, found.ways) == ([{(1, 0): 2}], [1, 2])


def test_a_hopeless_budget_is_refused_before_a_step_is_measured():
    model = Counted().train()
    assert forwards_of(lambda: revwire.convert(model, X, memory_budget="1kB")) == 1
    with pytest.raises(revwire.BudgetError, match=r"budget of 1000 bytes .* on paper.*expected at least") as error:
        revwire.plan(model, X, memory_budget="1kB")
    enough = int(str(error.value).split("pass memory_budget=")[1].split()[0])
    assert revwire.plan(model, X, memory_budget=enough * 11 // 10).forecast.peak_bytes <= enough * 11 // 10
    assert revwire.plan(model, X, memory_budget="least").forecast.peak_bytes <= enough


def test_how_units_may_be_cut_is_looked_at_once_for_each_kind(monkeypatch):
    looked = []

    def noted(unit, *rest):
        looked.append(unit.path)
        return separable(unit, *rest)

    monkeypatch.setattr("revwire._splitting.probe.separable", noted)
    plan = revwire.plan(Counted(), X, chunks=2, rewire="everywhere")
    assert len(looked) <= 3  # the first has an input that needs no gradient
    assert {u.chunks for u in plan.units} == {2}


def test_units_that_differ_in_what_they_do_are_looked_at_each(monkeypatch):
    """One mixes samples, by the same modules."""

    class Block(nn.Module):
        def __init__(self, mixes):
            super().__init__()
            self.norm, self.linear, self.mixes = nn.LayerNorm(32), nn.Linear(32, 32), mixes

        def forward(self, x):
            y = self.linear(self.norm(x))
            return x + torch.relu(y + y.mean((0, 1), keepdim=True) if self.mixes else y)

    model = nn.Sequential(*(Block(mixes) for mixes in (False, True, False, True)))
    plan = revwire.plan(model, X, chunks=2, rewire="everywhere")
    assert [u.chunks for u in plan.units] == [2, 1, 2, 1]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_how_far_a_plan_is(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with Progress(3, after=0) as progress:
        progress.advance()
        progress.advance()
    written = capsys.readouterr().err
    line = "revwire: measuring step 2 of at most 3"
    assert written.endswith("\r" + " " * len(line) + "\r") if terminal else written == ""
    assert (line in written) == terminal
    assert progress.left == 1


def test_work_of_less_than_two_seconds_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    now = [0.0]
    monkeypatch.setattr("revwire._budget.progress.time.monotonic", lambda: now[0])
    with Progress(4) as progress:
        for now[0] in (0.0, 1.9, 2.1):
            progress.advance()
            assert ("step" in capsys.readouterr().err) == (now[0] > 2)


def test_long_work_reports_itself(monkeypatch, capsys):
    model = encoder(2, 8, 2, 16, dropout=0.0)
    x = torch.sin(torch.linspace(0, 9, 64).view(1, -1, 1) * torch.arange(1, 9)).repeat(4, 1, 1)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(Progress.__init__, "__defaults__", ("measuring step", 0.0))
    revwire.convert(model, x, chunks=2, rewire="everywhere", coupling="innovation:1/2")
    revwire.verify(model, x, further_inputs=[x])
    revwire.profile(model, x, repeats=1)
    told = capsys.readouterr().err
    for line in (
        "looking for what may be cut, run 1 of",
        "verifying, run 5 of at most 5",
        "measuring run 12 of at most",
    ):
        assert line in told
    assert "calibrating, example 1 of at most 1" in told
