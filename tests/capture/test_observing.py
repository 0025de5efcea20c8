"""Observing leaves everything as it was, sees what it must, and works from several threads."""

import random
import threading

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import revwire
from revwire._capture.arguments import fresh_arguments
from revwire._capture.run import record
from revwire._structures import refs
from steps import assert_same_step, twin
from toys import X, block, pre_norm, stack


def patchable():
    return nn.Module.__call__, torch.jit.ScriptFunction.__call__, torch.autograd.Function.apply.__qualname__


@pytest.fixture
def nothing_patched():
    before = patchable()
    yield
    assert patchable() == before


class Failing(nn.Module):
    def forward(self, x):
        random.random()
        torch.rand(3)
        raise KeyError("boom")


@pytest.mark.usefixtures("nothing_patched")
def test_a_failing_example_is_a_clear_error_and_leaves_no_trace():
    model = nn.Sequential(stack(pre_norm).blocks[0], Failing())
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(
        revwire.ConversionError, match=r"failed on the example inputs .*boom.*; pass what its forward takes"
    ):
        revwire.convert(model, X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_run_is_written_down_as_calls_and_values():
    recording = record(stack(pre_norm, depth=1).eval(), (X,), {})
    add = next(e for e in recording.events if e.is_addition)
    around = [type(recording.events[n].target).__name__ for n in recording.calls_around(add.number)]
    assert around == ["Loop", "Block"]
    assert {recording.values[r.value].shape for r in refs((add.args, add.out))} == {(2, 5, 8)}


def test_a_cut_is_the_recording_of_one_call():
    model = stack(pre_norm).eval()
    whole, alone = record(model, (X,), {}), record(model.blocks[1], (X,), {})
    call = next(e.number for e in whole.events if e.target is model.blocks[1])
    cut = whole.of_call(call)
    assert [e.target for e in cut.events] == [e.target for e in alone.events]
    assert [e.parent for e in cut.events] == [e.parent for e in alone.events]


@pytest.mark.usefixtures("nothing_patched")
def test_threads_may_observe_at_once():
    models, errors = [stack(pre_norm) for _ in range(6)], []

    def convert(model):
        try:
            revwire.convert(model, X)
        except BaseException as error:  # noqa: BLE001 - a thread's error would be lost
            errors.append(error)

    threads = [threading.Thread(target=convert, args=(m,)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert all(len(revwire.report(m).units) == 3 for m in models)


class Passing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [Passing, lambda: torch.device("cpu"), torch.no_grad, torch.inference_mode],
    ids=["mode", "device", "no_grad", "inference"],
)
def test_contexts_around_the_conversion(context):
    model = stack(pre_norm)
    with context():
        revwire.convert(model, X)
    assert revwire.verify(model, X).bit_exact


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 3 * g * ctx.saved_tensors[0]  # wrong on purpose: it must be this that runs


def gate(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    "make",
    [lambda: lambda x: Square.apply(x), lambda: torch.jit.script(gate)],
    ids=["apply", "script"],
)
def test_calls_that_show_nothing_of_what_they_do(make):
    function = make()
    model, reference = twin(stack(lambda self, x: x + function(self.f(x))))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)


def test_a_custom_function_that_was_bound_early():
    square = Square.apply  # no patch can see it called, and the graph would have the gradient of x * x
    for forward in (lambda self, x: x + self.f(square(self.g(x))), lambda self, x: x + square(self.f(x))):
        whole, reference = twin(stack(forward))
        assert [u.pattern for u in revwire.report(whole).units] == ["block"] * 3
        assert_same_step(whole, reference, X)
    module = block(lambda self, x: square(self.f(x)))
    leaf, reference = twin(stack(lambda self, x: x + self.inner(x), lambda self: setattr(self, "inner", module())))
    assert len(revwire.report(leaf).units) == 3
    assert_same_step(leaf, reference, X)


def test_tensors_and_constants_made_in_opened_code():
    numpy = pytest.importorskip("numpy")

    def forward(self, x):
        return (
            x
            + self.f(x) * torch.zeros(x.shape[1], 1, dtype=x.dtype).add(2) / numpy.sqrt(8.0) * numpy.float32(0.5)
            + torch.arange(8)
        )

    model, reference = twin(stack(forward))
    assert_same_step(model, reference, X)
    assert_same_step(model, reference, X[:, :3])


def test_weights_that_do_not_exist_yet():
    model = nn.Sequential(nn.LazyLinear(8), *stack(pre_norm).float().blocks)
    with pytest.raises(revwire.CaptureError, match=r"lazy parameter .* call the model once first"):
        revwire.convert(model, X.float())


def test_a_module_outside_of_the_tree_is_a_part_of_its_branch():
    hidden = [nn.Linear(8, 8).double()]
    model, reference = twin(stack(lambda self, x: x + hidden[0](x)))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
    assert revwire.verify(revwire.convert(revwire.revert(model), X, coupling="bdia:1/2"), X).bit_exact


def test_copies_of_arguments_are_leaves_where_these_are():
    x = torch.randn(2, 3, requires_grad=True)
    y = x * 2
    leaf, given = fresh_arguments((x, y))
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert not given.is_leaf
    given.mul_(2)  # as code may that is given what a layer gave
    assert torch.equal(given, 2 * y)
    (given.sum() + leaf.sum()).backward()
    assert torch.equal(leaf.grad, torch.ones(2, 3))
    assert x.grad is None
