"""Laws of the couplings, each measured on the whole table."""

from itertools import pairwise

import pytest
import torch

from cases import CASES, Case, each_case
from revwire import Bdia, CouplingError, Dr2Net, Midpoint, Momentum, RandomBdia, Re2TAL
from revwire._plan.options import Choice
from revwire.couplings import coupling_from
from revwire.testing import check_consistent, check_error_growth, check_invertible, check_kept_bits
from toys import Leapfrog, inputs_of, toy

COUPLINGS = sorted({case.coupling for case in CASES}, key=lambda c: c.name)
each_coupling = pytest.mark.parametrize("coupling", COUPLINGS, ids=lambda c: c.name)


@each_case
def test_unstep_inverts_step(case):
    tolerance = 0.0 if case.exact else 1e-5 if case.dtype == torch.float32 else 1e-13
    check_invertible(case.coupling, exact=case.exact, units=12, dtype=case.dtype, tolerance=tolerance)


@pytest.mark.parametrize("gamma", [1 / 2, 1 / 4])
def test_random_signs_are_undone_with_the_signs_that_were_drawn(gamma):
    check_invertible(RandomBdia(gamma), exact=True, units=12)


@pytest.mark.parametrize(
    ("coupling", "neighbour"),
    [
        (Dr2Net(1, 0.3), Dr2Net(1, 1 / 4)),
        (Dr2Net(1 / 2, 0.9), Dr2Net(1 / 2, 1)),
        (Dr2Net(1, 1e-9), Dr2Net(1, 1 / 128)),
        (Momentum(0.9), Momentum(1 / 2)),
        (Momentum(0.1), Momentum(1 / 8)),
        (Midpoint(0.7, 2), Midpoint(1 / 2, 2)),
        (Bdia(1 / 8), Bdia(1 / 8)),
        (Re2TAL(), Re2TAL()),
    ],
    ids=str,
)
def test_the_nearest_exact_neighbour(coupling, neighbour):
    assert coupling.exact_neighbour() == neighbour
    assert neighbour.has_exact_form
    assert coupling.has_exact_form == (coupling == neighbour)
    check_invertible(neighbour, exact=True, units=12)


@each_coupling
def test_step_and_unstep_are_inverse_in_real_numbers(coupling):
    previous, current, f = torch.randn(3, 100, dtype=torch.float64)
    following = coupling.step(previous, current, f)
    torch.testing.assert_close(coupling.unstep(following, current, f), previous, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bits", range(8))
@pytest.mark.parametrize("sign", [1, -1])
def test_any_b_that_is_a_power_of_two_is_exact(bits, sign):
    coupling = Leapfrog(a=0.5, b=sign * 2.0**-bits, c=1.5)
    check_invertible(coupling, exact=True, units=12)
    check_kept_bits(coupling, elements=1001)


@each_coupling
def test_error_growth_is_what_is_declared(coupling):
    check_error_growth(coupling)


@each_coupling
def test_float_error_grows_as_declared(coupling):
    units = 10
    error = check_invertible(coupling, exact=False, units=units, tolerance=float("inf"))
    assert error < 100 * coupling.float_error(units) + 1e-6


@pytest.mark.parametrize("gamma", [1 / 2, 1 / 4, 1 / 8, 1 / 16])
@pytest.mark.parametrize("scheme", [Bdia, Momentum, Midpoint])
def test_consistent_schemes(scheme, gamma):
    check_consistent(scheme(gamma))


@pytest.mark.parametrize("gamma", [1 / 2, 1 / 4])
def test_random_signs_are_consistent_whichever_they_are(gamma):
    coupling, x = RandomBdia(gamma), torch.zeros(100, 3)
    rule = coupling.rule("residual", x)
    assert set(rule.back.flatten().tolist()) == {gamma, -gamma}
    torch.testing.assert_close(rule.a + rule.back, torch.ones(100, 1), rtol=0, atol=0)
    torch.testing.assert_close(rule.c - rule.back, torch.ones(100, 1), rtol=0, atol=0)


@pytest.mark.parametrize("coupling", [Re2TAL(), Dr2Net(1, 1 / 8), Midpoint(1 / 2, 1)], ids=lambda c: c.name)
def test_schemes_that_are_not_consistent(coupling):
    with pytest.raises(AssertionError, match="expected 1"):
        check_consistent(coupling)


@pytest.mark.parametrize("scheme", [Bdia, Momentum, Midpoint])
@pytest.mark.parametrize("kind", ["residual", "block"])
def test_a_consistent_scheme_comes_to_the_pretrained_function_as_gamma_falls(scheme, kind):
    """At least linearly: half of γ leaves about half of the difference."""
    case = Case(scheme(1 / 2), False, torch.float64, 0, 0, "")
    model = toy(case, kind=kind, depth=6)
    x = inputs_of(model, case, requires_grad=False)
    model.chain.original = True
    plain = model(x)
    model.chain.original = False
    differences = []
    for m in range(3, 8):
        model.chain.couplings = (scheme(2.0**-m),) * 6
        with torch.no_grad():
            differences.append(float((model(x) - plain).norm() / plain.norm()))
    assert differences[0] < 0.1
    assert all(0.4 < small / large < 0.6 for large, small in pairwise(differences))


@each_coupling
def test_kept_bits_are_packed(coupling):
    assert check_kept_bits(coupling, elements=800) == 100 * coupling.kept_bits


@each_coupling
def test_a_coupling_is_found_by_its_name(coupling):
    assert coupling_from(coupling.name) == coupling.bare


@each_coupling
def test_exact_is_the_default_where_it_exists(coupling):
    assert coupling.has_exact_form
    assert Choice.of(coupling).arithmetic("chain 0", [coupling] * 24) == (True, None)


def test_without_an_exact_form_float_streams_are_used_where_they_serve():
    steady = Momentum(0.9)
    assert Choice.of(steady).arithmetic("chain 0", [steady] * 24) == (False, None)
    with pytest.raises(CouplingError, match=r"got b = -0\.9.*choose momentum:1/2, or pass exact=False"):
        Choice.of(steady).arithmetic("chain 0", [steady] * 240)


def test_block_units_have_the_rule_of_their_branch():
    x, before, f = torch.randn(3, 10, dtype=torch.float64)
    for coupling in COUPLINGS:
        a, b, c = coupling.coefficients.for_block
        torch.testing.assert_close(a * x + b * before + c * (x + f), coupling.step(before, x, f))


@pytest.mark.parametrize("spec", ["re2", "bdia:1/3", "bdia:0", "bdia:x", "bdia:1/0", "re2tal:1", 3])
def test_unknown_couplings_are_refused(spec):
    with pytest.raises(CouplingError, match=r"got .*; expected"):
        coupling_from(spec)


def test_coefficients_without_a_fixed_point_form_are_refused():
    with pytest.raises(CouplingError, match=r"leapfrog.*got b = 0\.3.*pass exact=False"):
        _ = Leapfrog(b=0.3).kept_bits
