"""The plan: immutable data, and a table to read."""

import dataclasses
import json
import re

import pytest
import torch
from torch import nn

import revwire
from revwire._plan.plan import Peaks
from toys import X, pre_norm, stack


@pytest.fixture(scope="module")
def plan():
    model = nn.Sequential(*stack(pre_norm, depth=3).blocks, nn.Linear(8, 8), stack(pre_norm, depth=1)).double()
    return revwire.plan(model, X, coupling="bdia:1/8")


def test_the_table(plan):
    lines = str(plan).splitlines()
    assert lines[0] == "Sequential: 3 units in 1 chain, 75% of the residual adds"
    assert lines[1].split() == ["chain", "host", "units", "pattern", "shape", "coupling", "bits", "saves"]
    assert lines[3].split()[:10] == ["chain", "0", "0", "..", "2", "3", "residual", "2x5x8", "bdia:1/8", "exact"]
    assert lines[4] == "stays: 1 residual adds"
    alone = (
        r"  4\.blocks\.0\.f, at toys\.py:\d+: stands alone: .* unchanged \(before it, the stream is made anew by 3; "
    )
    assert re.match(alone + r"no other add comes after it\)", lines[5])
    assert lines[6].startswith("peak of a step: ")


def test_the_table_of_a_model_without_chains():
    text, _ = str(revwire.plan(nn.Sequential(nn.Linear(8, 8)).double(), X)).splitlines()
    assert text == (
        "Sequential: nothing is rewired: the run on the example made no residual add (a tensor, and what was computed "
        "from it, added up), or made it where it cannot be seen; expected a network of residual blocks, converted "
        "before it is compiled or scripted"
    )


def test_a_hundred_adds_that_stay_for_one_reason_are_one_line():
    apart = [m for block in stack(pre_norm, depth=100).blocks for m in (block, nn.Linear(8, 8))]
    lines = str(revwire.plan(nn.Sequential(*apart).double(), X)).splitlines()
    assert re.search(r"of 100 residual adds, 100 stay, at toys\.py:\d+, because: stands alone", lines[0])
    assert lines[1] == "stays: 100 residual adds"
    assert lines[2].startswith("  0.f, 2.f, 4.f, ")
    assert re.search(
        r" and 92 more, at toys\.py:\d+: stands alone: .* \(0.f: .*after it, the stream is made anew by 1\)$", lines[2]
    )
    assert len(lines) == 4  # with that of the peaks


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("globs", ["blokcs.*", ["blocks.1*", "blokcs.*"], ("blokcs.2.f",), "Blocks.*"])
def test_a_glob_that_matches_nothing_is_an_error_with_the_nearest_names(option, globs):
    idle = globs if isinstance(globs, str) else globs[-1]
    message = rf"{option}: got the glob '{idle.replace('*', '.')}', which matches no unit, host or module; .* blocks"
    with pytest.raises(revwire.ConversionError, match=message.replace("'blokcs..'", r"'blokcs\.\*'")):
        revwire.plan(stack(pre_norm, depth=4), X, **{option: globs})


def test_the_names_of_adds_that_stay_and_of_other_modules_are_names_too():
    model = nn.Sequential(*stack(pre_norm, depth=3).blocks, nn.Linear(8, 8)).double()
    assert len(revwire.plan(model, X, exclude=["3", "0"]).units) == 2
    assert not revwire.plan(model, X, exclude="*").chains


class Loop(nn.Module):
    """Two adds in one forward, without a module around either."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(8, dtype=torch.float64))

    def forward(self, x):
        for _ in range(4):
            x = x + x @ self.w
        return x


def test_a_unit_is_excluded_by_the_name_that_the_plan_shows():
    model = nn.Sequential(Loop())
    assert [u.path for u in revwire.plan(model, X).units] == ["0#0", "0#1", "0#2", "0#3"]
    assert [u.path for u in revwire.plan(model, X, exclude="0#0").units] == ["0#1", "0#2", "0#3"]
    assert [u.path for u in revwire.plan(model, X, include=["0#2", "0#3"]).units] == ["0#2", "0#3"]


def test_it_is_plain_data(plan):
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["coverage"] == plan.coverage == 0.75
    assert [u["path"] for u in data["chains"][0]["units"]] == [u.path for u in plan.units]
    assert data["bytes_saved"] == sum(c.bytes_saved for c in plan.chains)


@pytest.mark.parametrize("of", [lambda p: p, lambda p: p.chains[0], lambda p: p.units[0], lambda p: p.skipped[0]])
def test_it_is_immutable(plan, of):
    part = of(plan)
    name = dataclasses.fields(part)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part, name, None)


def test_bytes(plan):
    chain = plan.chains[0]
    elements = X.numel()
    assert chain.stream_bytes == 2 * 8 * elements
    assert {u.kept_bytes for u in chain.units} == {3 * elements // 8}
    assert all(u.saved_bytes >= 8 * 2 * elements for u in chain.units)  # the inputs of two linear layers, at least
    assert chain.largest >= X.abs().max() or chain.largest > 1


def test_planning_changes_nothing():
    model = stack(pre_norm)
    before, state = [dict(vars(m)) for m in model.modules()], torch.get_rng_state()
    first, second = revwire.plan(model, X), revwire.plan(model, X)
    assert first == second
    assert [dict(vars(m)) for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_report_is_the_plan():
    planned = revwire.plan(stack(pre_norm), X)
    assert revwire.report(revwire.convert(stack(pre_norm), X)) == planned


@pytest.mark.parametrize(
    ("planned", "seconds", "said"),
    [
        (96, None, " (0.96 of checkpointing)"),
        (97, None, ": revwire gains nothing here, use checkpointing"),
        (96, 1.2, " (0.96 of checkpointing, in 1.20 of its seconds)"),
        (300, 0.96, " (3.00 of checkpointing, in 0.96 of its seconds)"),
        (300, 0.97, ": revwire gains nothing here, use checkpointing"),
    ],
)
def test_a_plan_gains_bytes_or_where_they_were_measured_seconds(planned, seconds, said):
    peaks = Peaks(stored=1000, checkpointing=100, planned=planned)
    assert peaks.told(seconds).endswith("with this plan" + said)
