"""No combination is silently inaccurate: float streams give the gradients of stored activations within bounds, or an
error.
"""

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from cases import Case
from revwire import CouplingError, Dr2Net, Midpoint, Momentum, Re2TAL, ReconstructionError
from revwire._plan.options import Choice
from steps import gradients
from toys import inputs_of, stored, toy

TOLERANCE = 1e-4  # of a rebuilt state, the default
GRADIENTS = (
    1e-2  # of the norm of each gradient: what a state within the tolerance makes of it, summed over two dozen units
)

shares = st.floats(0.05, 0.99)
couplings = st.one_of(
    st.just(Re2TAL()),
    st.builds(Momentum, shares),
    st.builds(Dr2Net, shares, shares),
    st.builds(Midpoint, shares, st.floats(0.1, 2)),
)
anchors = st.one_of(st.none(), st.integers(1, 6))
settled = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@settled
@given(coupling=couplings, depth=st.integers(2, 24), spacing=anchors, kind=st.sampled_from(["residual", "block"]))
def test_float_streams_are_accurate_or_refused(coupling, depth, spacing, kind):
    """Driven past the check at conversion, which would refuse most of these."""
    case = Case(coupling, False, torch.float32, 0, 0, "")
    model = toy(case, depth=depth, kind=kind)
    model.chain.set_anchors(spacing, tolerance=TOLERANCE)
    x = inputs_of(model, case)
    try:
        got = gradients(model, x)
    except ReconstructionError:
        event("refused")
        return
    event("accurate")
    with stored(model):
        for a, b in zip(got, gradients(model, x), strict=True):
            assert float((a - b).norm()) <= GRADIENTS * float(b.norm()) + 1e-6


@settled
@given(coupling=couplings, depth=st.integers(1, 100), spacing=st.one_of(anchors, st.just("auto")))
def test_conversion_refuses_float_streams_that_are_expected_to_drift(coupling, depth, spacing):
    run = depth if spacing is None else 1 if spacing == "auto" else min(spacing, depth)
    wanted = Choice.of(coupling, False, spacing)
    if coupling.float_error(run) > TOLERANCE:
        with pytest.raises(CouplingError, match="anchors='auto', or another coupling"):
            wanted.arithmetic("chain 0", [coupling] * depth)
        return
    exact, distance = wanted.arithmetic("chain 0", [coupling] * depth)
    assert not exact
    assert coupling.float_error(min(distance or depth, depth)) <= TOLERANCE


@pytest.mark.parametrize("coupling", [Momentum(0.9), Dr2Net(1, 0.3), Midpoint(0.7)], ids=lambda c: c.name)
def test_a_coupling_without_an_exact_form_is_never_held_in_integers(coupling):
    with pytest.raises(CouplingError, match=r"exact arithmetic needs \|b\| = 2\^-m"):
        Choice.of(coupling, True).arithmetic("chain 0", [coupling] * 3)
