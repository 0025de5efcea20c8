"""Laws on random residual networks: chains driven directly, and models that `revwire.convert` rewires."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

import revwire
from cases import DEPTH
from revwire._runtime.observer import Observer
from revwire.measure import saved_bytes
from revwire.testing import Step, check_gradients, check_modes, check_revert
from strategies import Network, cases, chain_of, exact_cases, shapes
from toys import Oracle, stored

pytestmark = [
    pytest.mark.filterwarnings("ignore::revwire.NothingToRewireWarning"),  # some of these networks have no chain
    pytest.mark.filterwarnings(r"ignore:.*expected the streams to stay below.*:UserWarning"),  # some grow
]

slow = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
slower = settings(slow, max_examples=25)


class Witness(Observer):
    """Compares every rebuilt state with the one that was dropped."""

    def __init__(self):
        self.states, self.seen = {}, 0

    def on_drop(self, key, state):
        self.states[key] = state.clone()

    def on_rebuild(self, rebuilt):
        assert torch.equal(self.states[rebuilt.key], rebuilt.state)
        self.seen += 1


def inputs_for(shape, case):
    return (shape.input(case.dtype), *shape.extras(case.dtype))


@slow
@given(shape=shapes, case=exact_cases)
def test_states_are_rebuilt_to_the_bit(shape, case):
    model = chain_of(shape, case)
    model.chain.observer = witness = Witness()
    out = model(*inputs_for(shape, case))
    out.square().sum().backward()
    assert witness.seen == shape.depth


@slow
@given(shape=shapes, case=cases)
def test_a_step_is_that_of_stored_activations(shape, case):
    """Outputs, gradients, buffers and the random state: to the bit in exact mode."""
    model = chain_of(shape, case)
    assume(case.exact or not (shape.narrow or shape.norm == "batch"))  # they amplify the rounding of float mode
    assume(
        case.exact or shape.norm != "layer" or shape.width > 2
    )  # of two numbers, it gives their signs: ill-conditioned
    check_gradients(model, inputs_for(shape, case), tolerance=20 * case.stored, stored=stored)


@slow
@given(shape=shapes, case=cases)
def test_a_step_is_that_of_an_independent_loop(shape, case):
    """To 1e-9 in float64. In float32, random networks may be so ill-conditioned that the loop itself is 1e-5 away from
    float64.
    """
    model = chain_of(shape, case)
    assume(not shape.narrow)  # rounds to 16 bits, the other way for a difference in the last of 24
    assume(shape.norm != "layer" or shape.width > 2)  # of two numbers, it gives their signs
    assume(not (shape.norm == "batch" and shape.training))  # divides by the deviation of as few as four numbers
    step = Step.of(model, inputs_for(shape, case))
    step.assert_like(
        Step.of(Oracle(model), inputs_for(shape, case)), tolerance=1e-9 if case.dtype == torch.float64 else 1e-4
    )


@slow
@given(shape=shapes, case=cases)
def test_outputs_do_not_depend_on_the_grad_mode(shape, case):
    check_modes(chain_of(shape, case), tuple(t.detach() for t in inputs_for(shape, case)))


@slower
@given(shape=shapes, case=exact_cases)
def test_what_is_held_does_not_depend_on_what_branches_compute(shape, case):
    """Only on the stream: its two ends, the output, the kept bits; and a few kB a unit for fingerprints and random
    states.
    """
    model, inputs = chain_of(shape, case), inputs_for(shape, case)
    elements = inputs[0].numel()
    width = 8 if case.dtype == torch.float64 else 4
    with warnings.catch_warnings(record=True) as grown:
        warnings.simplefilter("always")
        held = saved_bytes(lambda: model(*inputs))
    assume(not grown)  # beyond the range of their scale, streams are stored twice more, and a warning says so
    assert held <= 6 * elements * width + shape.depth * (elements * case.coupling.kept_bits // 8 + 8192)
    assert shape.depth <= DEPTH


@slower
@given(shape=shapes, case=exact_cases)
def test_a_converted_network_takes_the_step_of_stored_activations(shape, case):
    model, inputs = Network(shape).to(case.dtype), inputs_for(shape, case)
    revwire.convert(model, inputs, coupling=case.coupling, exact=case.exact, calibrate=())
    check_gradients(model, inputs)
    check_modes(model, tuple(t.detach() for t in inputs))


@slower
@given(shape=shapes, case=cases)
def test_revert_is_the_inverse_of_convert(shape, case):
    model = Network(shape).to(case.dtype)
    assume(case.exact or case.coupling.error_growth == 1)
    check_revert(model, inputs_for(shape, case), coupling=case.coupling, exact=case.exact, calibrate=())
