"""`torch.compile`: of the whole model, and of branches (regional compilation). Gradients stay right, and graph breaks
are counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from networks import ConvolutionNet, Transformer
from table import refused, works
from torch import nn
from torch._dynamo.utils import counters
from training import Run, assert_trains_as_stored, batches, converted, train

import revwire

STACK = "torch.compile"
pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's own, about itself


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def compile_branches(model: nn.Module, backend: str) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        block.attention.compile(backend=backend)
        block.mlp.compile(backend=backend)
    return model


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("network", [Transformer, ConvolutionNet], ids=["loop", "sequential"])
@works(
    STACK,
    "`torch.compile(model)`",
    "each rewired block runs outside of the compiled graphs; compile the branches, too or instead",
)
def test_the_whole_model(network: type[nn.Module], backend: str, figure: Callable[[str], None]) -> None:
    def run(model: nn.Module) -> Run:
        return train(model, batches(network), call=torch.compile(model, backend=backend))

    assert_trains_as_stored(network, run)
    graphs, breaks = graphs_and_breaks()
    assert breaks <= 4 + 1  # blocks
    if network is ConvolutionNet:
        figure(f"{graphs} graphs, {breaks} breaks (4 blocks in a `Sequential`)")
        assert graphs > 0
    else:
        figure("a Python loop over blocks is not compiled at all")
        assert graphs == 0


@works(STACK, "branches: `block.mlp.compile()` (regional compilation)")
@pytest.mark.parametrize("when", ["before", "after"])
def test_branches(when: str, figure: Callable[[str], None]) -> None:
    def make() -> nn.Module:
        return compile_branches(Transformer(), "aot_eager") if when == "before" else Transformer()

    make.example = Transformer.example  # type: ignore[attr-defined]

    def run(model: nn.Module) -> Run:
        return train(model if when == "before" else compile_branches(model, "aot_eager"), batches(Transformer))

    counters.clear()
    assert_trains_as_stored(make, run, recomputes=False)  # compiled code has no hooks to count with
    graphs, breaks = graphs_and_breaks()
    assert graphs > 0
    assert breaks == 0
    figure(f"{breaks} graph breaks")


@works(STACK, "branches compiled: exact to the bit (`revwire.verify`)")
def test_branches_are_exact() -> None:
    check = revwire.verify(compile_branches(converted(Transformer), "aot_eager"), Transformer.example())
    assert check.bit_exact, str(check)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@works(
    STACK, "branches compiled by Inductor", "dropout draws other numbers than in eager mode, as always with Inductor"
)
def test_inductor() -> None:
    make = partial(Transformer, 2, dropout=0.0)
    make.example = Transformer.example  # type: ignore[attr-defined]
    compiled = assert_trains_as_stored(
        make, lambda m: train(compile_branches(m, "inductor"), batches(Transformer)), recomputes=False
    )
    compiled.assert_like(
        train(converted(make), batches(Transformer)), tolerance=1e-5, recomputes=False
    )  # fused kernels round otherwise
    assert revwire.verify(compile_branches(converted(make), "inductor"), Transformer.example()).bit_exact


@works(STACK, "`model.compile()`, converted afterwards, or by its first call")
@pytest.mark.parametrize("how", ["compiled first", "first call", "wrapper"])
def test_the_order_does_not_matter(how: str) -> None:
    torch.manual_seed(0)
    model = Transformer()
    example = Transformer.example()
    if how == "compiled first":
        model.compile(backend="eager")
        model(example)
        revwire.convert(model, example, rewire="everywhere")
    elif how == "first call":
        revwire.convert(model, rewire="everywhere")
        model.compile(backend="eager")
        model(example)
    else:
        revwire.convert(torch.compile(model, backend="eager"), example, rewire="everywhere")
    twin = converted(Transformer)
    train(model, batches(Transformer)).assert_like(train(twin, batches(Transformer)), recomputes=False)


@refused(STACK, "`fullgraph=True` around a converted model", "compile the branches with `fullgraph=True` instead")
def test_full_graph() -> None:
    model = converted(Transformer)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"LiveForward\.__call__"):
        torch.compile(model, backend="eager", fullgraph=True)(Transformer.example())
    for block in model.blocks:
        block.mlp.compile(backend="aot_eager", fullgraph=True)
    assert revwire.verify(model, Transformer.example()).bit_exact
