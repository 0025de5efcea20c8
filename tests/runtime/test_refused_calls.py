"""What cannot be served is refused with a clear error: transforms, streams that cannot be held, parts of a chain in a
checkpoint.
"""

import pytest
import torch

from cases import each_exact_case, each_fast_case
from revwire import ConversionError, ReconstructionError, UnsupportedTransformError
from toys import SHAPE, WIDTH, Linear, PreNorm, Weightless, inputs_of, run_units, toy


@each_fast_case
@pytest.mark.parametrize("transform", [
    lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    lambda f, x: torch.func.vmap(f)(x[None]),
    lambda f, x: torch.func.jvp(f, (x,), (x,)),
    lambda f, x: torch.func.vjp(f, x),
])  # fmt: skip
def test_functional_transforms_are_refused(case, transform):
    model = toy(case, Linear)
    with pytest.raises(UnsupportedTransformError, match=r"chain 0: got a torch\.func transform"):
        transform(model, inputs_of(model, case, requires_grad=False))


@each_fast_case
@pytest.mark.parametrize("what", ["input", "weight"])
def test_forward_mode_is_refused(case, what):
    model = toy(case, Linear)
    x = inputs_of(model, case, requires_grad=False)
    with torch.autograd.forward_ad.dual_level():
        if what == "input":
            x = torch.autograd.forward_ad.make_dual(x, x)
        else:
            weight = model.branches[3].weight.detach()
            del model.branches[3].weight
            model.branches[3].weight = torch.autograd.forward_ad.make_dual(weight, weight)
        with pytest.raises(UnsupportedTransformError, match="forward-mode"):
            model(x)


@each_fast_case
@pytest.mark.parametrize(("x", "what"), [
    (torch.ones(SHAPE, dtype=torch.complex64), "torch.complex64"),
    (torch.ones(SHAPE, dtype=torch.int64), "torch.int64"),
    (torch.ones(SHAPE).to_sparse(), "sparse"),
    (torch.nested.nested_tensor([torch.ones(3, WIDTH), torch.ones(2, WIDTH)], layout=torch.jagged), "nested"),
], ids=["complex", "integer", "sparse", "nested"])  # fmt: skip
def test_a_stream_that_cannot_be_held_is_refused(case, x, what):
    model = toy(case, Weightless)
    with pytest.raises(ConversionError, match=rf"branches\.0 \(chain 0\): got a stream of .*{what}.*exclude"):
        model(x)


def test_a_part_of_a_chain_in_a_checkpoint_of_another_library_is_refused_in_forward():
    case = each_exact_case.args[1][0]
    model = toy(case, PreNorm)
    x = inputs_of(model, case)

    class Checkpoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return run_units(model, x, 0, 3)

    h = Checkpoint.apply(x)
    with pytest.raises(ReconstructionError, match=r"branches\.3 .*torch\.utils\.checkpoint"):
        run_units(model, h, 3)
