"""A plan measures few steps, none where the budget is hopeless, and says how far it is to a terminal alone."""

import itertools
import sys
from contextlib import suppress

import pytest
import torch
from torch import nn

import revwire
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

    def __init__(self, depth=6):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = encoder(depth, 32, 4, 128), nn.Linear(32, 2)

    def forward(self, x):
        next(FORWARDS)
        return self.head(self.body(x))


X = torch.randn(16, 64, 32, generator=torch.Generator().manual_seed(0))


def test_a_plan_runs_a_dozen_forwards_at_most():
    """One is observed, and how units may be cut is looked at in up to three, without a backward pass."""
    model = Counted().train()
    least = revwire.plan(model, X, memory_budget="least").forecast.peak_bytes
    budgets = ["least", *(int(share * least) for share in (0.9, 1.02, 1.5))]
    runs = [forwards_of(lambda b=b: revwire.plan(model, X, memory_budget=b)) for b in budgets]
    assert min(runs) >= 4
    assert max(runs) <= MOST_STEPS + 4


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
    with Progress(3) as progress:
        progress.advance()
        progress.advance()
    written = capsys.readouterr().err
    line = "revwire: measuring step 2 of at most 3"
    assert written.endswith("\r" + " " * len(line) + "\r") if terminal else written == ""
    assert (line in written) == terminal
    assert progress.left == 1
