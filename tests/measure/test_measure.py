"""`revwire.measure`: bytes and seconds, against cases that can be counted by hand."""

import doctest
import gc
import os

import pytest
import torch

from revwire import Bdia, CouplingError, measure
from revwire.measure import (
    Quartiles,
    arithmetic,
    arithmetic_seconds,
    memory,
    paired_seconds,
    peak_bytes,
    saved_bytes,
    sizes,
    timing,
)

KILO = 1000 * 4  # bytes of a float32 tensor of 1000 elements


@pytest.mark.parametrize("module", [arithmetic, memory, sizes, timing])
def test_the_examples_in_its_documentation_run(module):
    assert doctest.testmod(module).failed == 0


def test_it_shows_what_its_files_hold():
    assert all(hasattr(measure, name) for name in measure.__all__)


def test_arithmetic_takes_an_exact_coupling_and_leaves_its_input_alone():
    x = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    before = x.detach().clone()
    assert all(seconds > 0 for seconds in arithmetic_seconds(Bdia(1 / 4), x, calls=2))
    assert torch.equal(x, before)
    with pytest.raises(CouplingError):
        arithmetic_seconds(Bdia(0.3), x, calls=2)


def test_peak_counts_what_lives_at_once():
    def step():
        first = torch.empty(1000)
        del first
        both = torch.empty(1000), torch.empty(2000)
        return both[0]

    assert peak_bytes(step) == 3 * KILO


def test_peak_is_above_rest_and_leaves_out_what_the_first_run_allocates():
    kept = []

    def step():
        if not kept:
            kept.append(torch.empty(5000))
        return torch.empty(1000)

    assert peak_bytes(step) == KILO


def test_garbage_is_not_collected_while_a_step_is_measured():
    """What the collector finds then may be of an earlier step, and its release would count against this one."""
    enabled = []
    peak_bytes(lambda: enabled.append(gc.isenabled()))
    assert enabled == [True, False]
    assert gc.isenabled()


def test_saved_is_what_the_graph_holds_without_weights_and_inputs():
    weight, x = torch.ones(1000, requires_grad=True), torch.ones(1000)
    assert saved_bytes(lambda: (weight * x).exp().exp()) == 2 * KILO


def test_peak_of_a_step_is_repeatable_to_the_byte():
    net = torch.nn.Sequential(*[torch.nn.Linear(32, 32) for _ in range(4)])

    def step():
        net(torch.ones(8, 32)).sum().backward()

    assert len({peak_bytes(step) for _ in range(3)}) == 1


def test_an_exception_in_the_step_leaves_the_profiler_ready():
    runs = iter([None, ValueError("second run")])

    def step():
        error = next(runs)
        if error:
            raise error

    with pytest.raises(ValueError, match="second run"):
        peak_bytes(step)
    assert peak_bytes(lambda: torch.empty(1000)) == KILO


def test_standard_error_is_quiet_and_open_again(capfd):
    peak_bytes(lambda: torch.empty(1000))
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"


def test_variants_take_turns_and_each_round_starts_with_another():
    order = []
    timings = paired_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"
    assert {len(sample) for sample in timings.samples.values()} == {3}


def test_ratios_are_taken_within_rounds():
    timings = paired_seconds({"a": lambda: None}, repeats=4)
    assert timings.ratio("a", "a") == Quartiles(1, 1, 1)


@pytest.mark.parametrize(("sample", "expected"), [([3.0], (3, 3, 3)), ([1.0, 2.0, 3.0], (1.5, 2, 2.5))])
def test_quartiles(sample, expected):
    assert Quartiles.of(sample) == Quartiles(*expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda():
    assert peak_bytes(lambda: torch.empty(2**20, device="cuda"), "cuda") == 4 * 2**20
