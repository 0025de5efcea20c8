"""Options that make no sense are refused, each by the usual error: where, what was got, what was expected."""

import pytest

import revwire
from revwire import BudgetError, ConversionError, CouplingError
from toys import X, pre_norm, stack

NAN = float("nan")


@pytest.mark.parametrize(
    ("option", "values", "error", "message"),
    [
        (
            "coupling",
            ["bdia:1e400", "bdia:nan", "bdia:inf", "bdia:1/0", "bdia:0/0", "bdia:", "bdia:,", "bdia:x", "bdia:1/8/2"],
            CouplingError,
            r"coupling: got 'bdia:.*'; expected finite numbers after the colon, as in 'bdia:1/8'",
        ),
        ("coupling", ["dr2net:nan,1/8", "midpoint:1/8,1e999"], CouplingError, r"got '.*'; expected finite numbers"),
        (
            "coupling",
            ["bdia:1e-400", "bdia:1e-99999999999"],
            CouplingError,
            r"bdia: got gamma = 0\.0; expected a power",
        ),
        ("coupling", ["bdia:1e99999999999"], CouplingError, "expected finite numbers"),
        ("coupling", ["momentum:1e-400"], CouplingError, r"momentum: got gamma = 0\.0; expected 0 < gamma < 1"),
        ("coupling", ["", "BDIA", 5, None, True, ["bdia"]], CouplingError, r"coupling: got .*; expected 're2tal', "),
        ("coupling", [{"blocks.*": None}, {"blocks.*": 0.5}], CouplingError, r"coupling: got .*; expected 're2tal', "),
        ("coupling", [{1: "bdia"}, {None: "bdia"}], ConversionError, r"coupling: got the key .*; expected globs"),
        ("exact", ["no", "yes", 1, 0, 1.0, []], CouplingError, r"exact: got .*; expected True .*, False .*, or None"),
        ("anchors", [True, -1, 0, 1.5, "often", []], CouplingError, r"anchors: got .*; expected a number of units"),
        (
            "tolerance",
            ["x", "0.1", None, True, NAN, 0, 1, []],
            CouplingError,
            r"tolerance: got .*; expected a relative",
        ),
        (
            "chunks",
            [True, 0, -1, 2.0, "2", [2]],
            ConversionError,
            r"chunks: got .*; expected a number of chunks from 1",
        ),
        ("chunks", [{"blocks.*": True}, {"blocks.*": "2"}], ConversionError, r"chunks: got .*; expected a number of"),
        ("chunks", [{1: 2}], ConversionError, r"chunks: got the key 1; expected globs over the names"),
        ("strict", ["yes", 1, None], ConversionError, r"strict: got .*; expected True .* or False"),
        ("include", [0, False, 5, [5], b"blocks.*"], ConversionError, r"include: got .*; expected a glob"),
        ("exclude", [0, False, 5, [5], b"blocks.*"], ConversionError, r"exclude: got .*; expected a glob"),
        ("whole", [0, False, [None]], ConversionError, r"whole: got .*; expected a glob"),
        ("checkpoint", [0, False, [None]], ConversionError, r"checkpoint: got .*; expected a glob"),
        (
            "memory_budget",
            [True, 0, -1, 1e9, "much", NAN, f"{'9' * 400}GiB"],
            BudgetError,
            r"memory_budget: got .*; expected a positive number of bytes",
        ),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(option, values, error, message):
    model = stack(pre_norm)
    for value in values:
        with pytest.raises(error, match=message):
            revwire.convert(model, X, **{option: value})
    assert not hasattr(model, "_revwire")


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (revwire.Bdia, ["1/8", True, NAN, None, 10**400], r"bdia: got gamma = .*; expected a power of two"),
        (revwire.Momentum, ["1/8", True, NAN, None, 10**400], r"momentum: got gamma = .*; expected 0 < gamma < 1"),
        (revwire.RandomBdia, ["1/2", NAN, None], r"bdia-random: got gamma = .*; expected 1/2 or 1/4"),
        (lambda v: revwire.Dr2Net(1.0, v), ["1/8", True, NAN, None], r"dr2net: got beta = .*; expected 0 < beta <= 1"),
        (revwire.Dr2Net, ["1", True, NAN, None, float("inf")], r"dr2net: got alpha = .*; expected a finite number"),
        (revwire.Midpoint, ["1/8", True, NAN, None], r"midpoint: got a = .*; expected 0 < a <= 1"),
        (lambda v: revwire.Midpoint(1 / 2, v), ["1", True, NAN], r"midpoint: got h = .*; expected a finite number"),
    ],
)
def test_a_parameter_of_a_coupling_that_is_no_number_is_refused(make, values, message):
    for value in values:
        with pytest.raises(CouplingError, match=message):
            make(value)


def test_numbers_are_read_as_fractions_are():
    for text, value in (("1/8", 1 / 8), ("0.125", 1 / 8), ("125e-3", 1 / 8), ("1", 1.0)):
        assert revwire.Midpoint(value) == revwire.couplings.coupling_from(f"midpoint:{text}")


def test_steps_and_rounds_are_numbers():
    model = revwire.convert(stack(pre_norm), X, coupling="bdia:1/4")
    for total in ("x", NAN, True, 0):
        with pytest.raises(CouplingError, match=r"got total=.*; expected the number of steps"):
            revwire.CouplingSchedule(model, "bdia:1/2", total=total)
    with pytest.raises(CouplingError, match=r"got milestones \['2', '4'\]; expected ascending"):
        revwire.CouplingSchedule(model, "bdia:1/2", shape="step", milestones=["2", "4"])
    with pytest.raises(CouplingError, match=r"exact: got 'no'; expected True"):
        revwire.set_coupling(model, "bdia:1/2", exact="no")
    for repeats in (0, -1, True, "3"):
        with pytest.raises(ConversionError, match=r"profile: got repeats=.*; expected a number of rounds from 1"):
            revwire.profile(model, X, repeats=repeats)
