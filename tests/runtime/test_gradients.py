"""The engine's main law: gradients are those of stored activations (to the bit in exact mode) and of an independent
loop.
"""

import pytest
import torch
from torch import nn

from cases import CASES, each_case, each_fast_case, spread
from revwire.testing import Step, check_gradients, check_modes
from toys import (
    KINDS,
    WIDTH,
    Attention,
    Convolution,
    Dropped,
    Linear,
    Oracle,
    PreNorm,
    Toy,
    Weightless,
    attention_extras,
    inputs_of,
    stored,
    toy,
)

each_kind = pytest.mark.parametrize("branch", KINDS.values(), ids=KINDS.keys())


def check(model, case, inputs, loss=None, condition=1):
    """Against stored activations and the independent loop, by the table; ``condition`` is what the toy does to an
    error.
    """
    step = check_gradients(model, inputs, loss, tolerance=condition * case.stored, stored=stored)
    step.assert_like(Step.of(Oracle(model), inputs, loss), tolerance=condition * case.oracle)
    return step


@pytest.mark.parametrize(("case", "name", "kind"), spread(CASES, [*KINDS], ["residual", "block"]), ids=str)
def test_gradients_are_those_of_stored_activations_and_of_the_oracle(case, name, kind):
    model = toy(case, KINDS[name], kind=kind)
    # the float32 loop of the blocks (batch norm over few elements, then tanh) is itself 4e-6 away from float64
    check(model, case, inputs_of(model, case), condition=1 if kind == "residual" else 10)


@each_case
def test_extra_inputs_and_side_outputs_carry_gradients(case):
    model = toy(case, Attention)
    step = check(model, case, (inputs_of(model, case), *attention_extras(case.dtype)), condition=3)
    assert {"input 0", "input 1", "input 2"} <= step.gradients.keys()


@each_fast_case
@pytest.mark.parametrize("which", [0, 4, 7])
def test_a_loss_on_one_side_output_alone(case, which):
    model = toy(case, Attention)
    inputs = (inputs_of(model, case), *attention_extras(case.dtype))
    check(model, case, inputs, loss=lambda out: out[1 + 2 * which].square().sum(), condition=3)


@each_fast_case
def test_a_loss_without_the_side_outputs(case):
    model = toy(case, Attention)
    check(
        model,
        case,
        (inputs_of(model, case), *attention_extras(case.dtype)),
        loss=lambda out: out[0].square().sum(),
        condition=3,
    )


@each_fast_case
def test_a_loss_on_a_part_of_the_output(case):
    model = toy(case)
    check(model, case, inputs_of(model, case), loss=lambda out: out[1, 2, 3:5].sum())


@each_fast_case
@each_kind
def test_an_input_that_needs_no_gradient(case, branch):
    model = toy(case, branch)
    x = inputs_of(model, case, requires_grad=branch is Weightless)
    assert "input 0" not in check(model, case, x).gradients or branch is Weightless


@each_fast_case
@pytest.mark.parametrize("frozen", [{0, 1, 2}, {5, 6, 7}, {1, 4}, set(range(8))], ids=["first", "last", "some", "all"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_frozen_branches(case, frozen, requires_grad):
    model = toy(case, PreNorm)
    for i in frozen:
        model.branches[i].requires_grad_(False)
    if not requires_grad and len(frozen) == 8:
        assert not model(inputs_of(model, case, requires_grad=False)).requires_grad
    else:
        check(model, case, inputs_of(model, case, requires_grad=requires_grad))


@each_fast_case
def test_a_frozen_linear_branch_still_moves_the_state_back(case):
    torch.manual_seed(0)
    branches = [
        PreNorm(),
        Linear().requires_grad_(False),
        PreNorm(),
        Linear().requires_grad_(False),
        Linear(),
        Weightless(),
    ]
    model = Toy(branches, case)
    check(model, case, inputs_of(model, case))


@each_fast_case
def test_shared_weights(case):
    torch.manual_seed(0)
    branch, other = PreNorm(), PreNorm()
    other.up.weight = branch.up.weight
    model = Toy([branch, other, branch, branch, other], case)
    check(model, case, inputs_of(model, case))


@each_fast_case
def test_a_branch_that_ignores_its_input(case):
    class Constant(nn.Module):
        shape = PreNorm.shape

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH))

        def forward(self, x):
            return self.weight.sigmoid()  # smaller than the stream: it is expanded

    model = toy(case, Constant)
    check(model, case, inputs_of(model, case))


@each_fast_case
@each_kind
def test_evaluation_mode(case, branch):
    model = toy(case, branch).eval()
    check(model, case, inputs_of(model, case))


@each_case
@pytest.mark.parametrize("branch", [Dropped, Convolution], ids=["dropped", "convolution"])
def test_outputs_are_the_same_in_every_grad_mode(case, branch):
    model = toy(case, branch)
    check_modes(model, inputs_of(model, case, requires_grad=False))


@each_fast_case
def test_a_channels_last_input_keeps_its_layout(case):
    model = toy(case, Convolution)
    x = inputs_of(model, case).detach().to(memory_format=torch.channels_last).requires_grad_()
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    check(model, case, x)


@each_fast_case
def test_a_sliced_input(case):
    model = toy(case)
    check(model, case, inputs_of(model, case), loss=lambda out: out.sum())
    wide = torch.randn(*PreNorm.shape[:2], 2 * WIDTH, dtype=case.dtype, requires_grad=True)
    model(wide[..., 1::2]).sum().backward()
    assert wide.grad[..., 1::2].abs().sum() > 0
    assert wide.grad[..., ::2].abs().sum() == 0


@each_fast_case
@pytest.mark.parametrize("depth", [1, 2])
def test_the_shortest_chains(case, depth):
    model = toy(case, depth=depth)
    check(model, case, inputs_of(model, case))


@each_fast_case
def test_an_empty_batch(case):
    model = toy(case)
    x = torch.zeros(0, 5, WIDTH, dtype=case.dtype, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.shape == x.shape


def test_the_table_gives_a_reason_for_every_tolerance():
    assert all(case.reason for case in CASES)
    assert all(case.stored == 0 for case in CASES if case.exact)
