"""What is refused: each with an error that names the way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Transformer
from table import refused, works
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DataParallel
from training import batches, converted, train

import revwire

AUTOGRAD, CONVERSION = "Transforms of autograd", "Conversion itself"
X = Transformer.example()


@refused(
    AUTOGRAD, "double backward (`create_graph=True`)", "`revwire.stored_activations(model)`, or `revwire.revert(model)`"
)
def test_double_backward() -> None:
    model = converted(Transformer)
    x = X.clone().requires_grad_()
    with pytest.raises(
        revwire.UnsupportedTransformError, match=r"create_graph=True .*stored_activations\(model\).*revwire\.revert"
    ):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@works(AUTOGRAD, "double backward with stored activations: right by `gradgradcheck`")
def test_double_backward_with_stored_activations() -> None:
    """In float64 and float streams, since finite differences see the grid of fixed-point ones."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual() for _ in range(3))).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    revwire.convert(model, x, coupling="re2tal", exact=False)
    with revwire.stored_activations(model):
        assert torch.autograd.gradgradcheck(lambda x: model(x), x)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


@refused(AUTOGRAD, "forward-mode AD", "`revwire.revert(model)`")
def test_forward_mode() -> None:
    model = converted(Transformer).eval()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(revwire.UnsupportedTransformError, match=r"forward-mode .*revwire\.revert\(model\)"):
            model(x)


@pytest.mark.parametrize("transform", [
    lambda f: torch.func.vmap(f)(X[None]),
    lambda f: torch.func.grad(lambda x: f(x).sum())(X),
    lambda f: torch.func.jacrev(f)(X),
    lambda f: torch.func.jvp(f, (X,), (X,)),
], ids=["vmap", "grad", "jacrev", "jvp"])  # fmt: skip
@refused(AUTOGRAD, "`vmap` and other `torch.func` transforms", "`revwire.revert(model)`")
def test_functional_transforms(transform: Callable[[Any], Any]) -> None:
    model = converted(Transformer).eval()
    model(X)
    with pytest.raises(revwire.RevwireError, match=r"torch\.func transform.*revwire\.revert\(model\)"):
        transform(model)


class ConvertsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Transformer().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return revwire.convert(self.inner, X, rewire="everywhere")(x)


@pytest.mark.parametrize(("trace", "name"), [
    (torch.fx.symbolic_trace, "a torch.fx trace"),
    (lambda m: torch.jit.trace(m, (X,)), "torch.jit.trace"),
    (lambda m: torch.export.export(m, (X,)), "torch.export"),
    (lambda m: make_fx(m)(X), "a torch.fx trace"),
    (lambda m: torch.compile(m, backend="eager")(X), "torch.compile"),
    (lambda m: torch.func.vmap(m)(X), "a torch.func transform"),
    (lambda m: revwire.plan(m, X, rewire="everywhere"), "another conversion"),
], ids=["fx", "jit", "export", "make_fx", "compile", "vmap", "convert"])  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # of the tracers
@refused(
    CONVERSION,
    "inside of a trace (fx, `torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func`)",
    "convert first, outside",
)
def test_inside_of_a_trace(trace: Callable[[nn.Module], Any], name: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(
        revwire.ConversionError, match=rf"Transformer: .*inside of {name}; .*convert the model first, outside"
    ):
        trace(ConvertsInside())


@refused(CONVERSION, "twice", "`revwire.revert(model)` first")
def test_twice() -> None:
    model = converted(Transformer)
    with pytest.raises(revwire.ConversionError, match=r"converted already .*revwire\.revert\(model\)"):
        revwire.convert(model, X, rewire="everywhere")
    holder = nn.Sequential(model)
    with pytest.raises(revwire.ConversionError, match=r"converted already \(at '0\.blocks\.0'"):
        revwire.convert(holder, X, rewire="everywhere")


@refused(CONVERSION, "a model that is wrapped in `DataParallel`", "convert first, then wrap")
def test_a_wrapped_model() -> None:
    with pytest.raises(revwire.ConversionError, match=r"wrapped in DataParallel already .*convert it first"):
        revwire.convert(DataParallel(Transformer()), X, rewire="everywhere")


@works(CONVERSION, "and back (`revert`), in the middle of training")
def test_back_in_the_middle_of_training() -> None:
    model = converted(Transformer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, batches(Transformer), optimizer=optimizer)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    revwire.revert(model)
    original = Transformer()
    original.load_state_dict(state)
    other = torch.optim.AdamW(original.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    data = batches(Transformer, seed=2)
    train(model, data, optimizer=optimizer).assert_like(
        train(original.train(), data, optimizer=other), recomputes=False
    )
