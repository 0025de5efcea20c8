"""`torch.compile` around a model with chains: it compiles what lies between them."""

import copy

import pytest
import torch
from torch import nn

import revwire
from cases import each_fast_case
from toys import WIDTH, Attention, attention_extras, inputs_of, stored, toy


class Model(nn.Module):
    """A chain between two layers that are not residual."""

    def __init__(self, chain):
        super().__init__()
        self.stem, self.chain, self.head = nn.Linear(WIDTH, WIDTH), chain, nn.Linear(WIDTH, 3)

    def forward(self, x, *extras):
        return self.head(self.chain(self.stem(x).relu(), *extras)[0]).sin()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dynamo's own, about itself
@each_fast_case
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_has_the_gradients_of_stored_activations(case, backend):
    model = Model(toy(case, Attention))
    x, extras = inputs_of(model.chain, case), attention_extras()
    got = torch.autograd.grad(torch.compile(model, backend=backend)(x, *extras).sum(), [x, *model.parameters()])
    with stored(model.chain):
        true = torch.autograd.grad(model(x, *extras).sum(), [x, *model.parameters()])
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=1e-6 * float(b.abs().amax()) + 10 * case.stored
        )  # the ends are compiled


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.f(self.norm(x))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # PyTorch looks at its own example
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_part_of_a_branch_that_is_compiled(when):
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Child() for _ in range(3))), torch.randn(2, WIDTH)
    reference = revwire.convert(copy.deepcopy(model), x)
    for change in (lambda: revwire.convert(model, x), lambda: compile_parts(model))[:: 1 if when == "after" else -1]:
        change()
    for m in (model, reference):
        m(x).square().sum().backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def compile_parts(model):
    for block in model:
        block.f = torch.compile(block.f, backend="eager")
