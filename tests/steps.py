"""A training step of a network, what it leaves behind, and what must hold of that."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserList
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revwire
from toys import Plain, X, stored

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # float64: another order of summation, nothing else

SAMPLES = 4096
"""At least the bytes of the samples that are kept of what a checkpointed unit saved."""


def tensors(out: Any) -> list[Tensor]:
    """All tensors in a nest of containers and dataclasses, in order."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for v in out.values() for t in tensors(v)]
    if isinstance(out, (list, tuple)):
        return [t for v in out for t in tensors(v)]
    return [t for v in vars(out).values() for t in tensors(v)] if dataclasses.is_dataclass(out) else []


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients_of(loss, model, *inputs, **options):
    """Of a loss: the gradients of these inputs and of all parameters. Options are those of `torch.autograd.grad`."""
    return torch.autograd.grad(loss, [*inputs, *model.parameters()], **options)


def sum_of_squares(out):
    """A loss of all tensors in an output; at least in float32."""
    return sum(t.to(torch.promote_types(t.dtype, torch.float32)).square().sum() for t in tensors(out))


def gradients(model, x, *extras, seed=3, **options):
    """Of a step with the sum of squares as its loss: the gradients of ``x``, if it wants one, and of all parameters."""
    torch.manual_seed(seed)
    loss = sum_of_squares(model(x, *extras))
    return gradients_of(loss, model, *([x] if x.requires_grad else []), **options)


def output_and_gradients(model, x):
    """Of a step with the sum of squares as its loss: the output, a tensor, and the gradients of all parameters."""
    torch.manual_seed(3)
    out = model(x)
    return [out, *gradients_of(out.square().sum(), model)]


def training_step(model, *inputs):
    """A function that makes one step; gradients add up in the parameters."""
    return lambda: model(*inputs).square().mean().backward()


def weight_gradients(model, run):
    """What one step, made by ``run``, leaves in the parameters."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    run()
    return [p.grad.clone() for p in model.parameters()]


def same(a, b):
    """Whether tensors, or None in place of some, are equal to the bit."""
    return all(one is other is None or torch.equal(one, other) for one, other in zip(a, b, strict=True))


# -- of chains ---------------------------------------------------------------------------------------------------------


def is_right(model, x, *extras):
    """Whether gradients are those of stored activations, to the bit."""
    rebuilt = gradients(model, x, *extras)
    with stored(model):
        return same(rebuilt, gradients(model, x, *extras))


def leaves_no_other_trace(model, x):
    """Whether a step leaves the buffers and the random state of one with stored activations, and has its gradients."""
    twin = copy.deepcopy(model)
    rebuilt, state = gradients(model, x), torch.get_rng_state()
    with stored(twin):
        true = gradients(twin, x)
    return same(rebuilt, true) and torch.equal(state, torch.get_rng_state()) and same(model.buffers(), twin.buffers())


def can_be_repeated(model, x):
    """Whether a backward pass that retains its graph can be followed by others like it."""
    loss, leaves = model(x).square().sum(), [x, *model.parameters()]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    return same(first, second) and same(first, torch.autograd.grad(loss, leaves))


def tape_of(out):
    """The tape behind an output, or a loss."""
    node = out.grad_fn
    while not hasattr(node, "tape"):
        node = node.next_functions[0][0]
    return node.tape


def records_of(loss):
    """What the tape behind a loss keeps of its units."""
    return [r for r in tape_of(loss).records if r is not None]


def counted_runs(model, monkeypatch):
    """Which branches have run through their last layer, in order; the list grows with each."""
    runs = UserList()  # no recompute puts it back

    def run(x, number, forward):
        out = forward(x)
        runs.append(number)
        return out

    for i, branch in enumerate(model.branches):
        monkeypatch.setattr(branch.down, "forward", partial(run, number=i, forward=branch.down.forward))
    return runs


def faulty(match):
    """The error of a recompute that could not find what the forward pass had."""
    return pytest.raises(
        revwire.ReconstructionError,
        match=rf"branches\.\d \(chain 0\): between forward and backward, .*{match}.*exclude",
    )


# -- of converted models -----------------------------------------------------------------------------------------------


def step(model: nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One training step's outputs; and its gradients, those of the arguments included, and buffers, by name."""
    model.zero_grad(set_to_none=True)
    args, kwargs = copy.deepcopy((args, kwargs))
    torch.manual_seed(seed)
    out = tensors(model(*args, **kwargs))
    loss = sum(
        (t * torch.linspace(-1, 1, max(t.numel(), 1), dtype=t.dtype)[: t.numel()].reshape(t.shape)).sum()
        for t in out
        if t.requires_grad
    )
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found |= {n: b.clone() for n, b in model.named_buffers()}
    return [t.detach() for t in out], found | {
        f"argument {i}": t.grad for i, t in enumerate(tensors((args, kwargs))) if t.grad is not None
    }


def assert_same_step(model: nn.Module, reference: nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> None:
    """A step of a model that was converted with `Plain` equals one of the original."""
    with revwire.stored_activations(model):
        got = step(model, *args, seed=seed, **kwargs)
    want = step(reference, *args, seed=seed, **kwargs)
    torch.testing.assert_close(got, want, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(
            step(model, *args, seed=seed, **kwargs)[0], step(reference, *args, seed=seed, **kwargs)[0], **TOLERANCE
        )


def twin(model: nn.Module, example: Any = X, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(the model converted with `Plain`, a copy that is not)."""
    reference = copy.deepcopy(model)
    return revwire.convert(model, example, coupling=Plain(), exact=False, **options), reference


def twin_that_stays(model: nn.Module, example: Any = X, **options: Any) -> tuple[nn.Module, nn.Module]:
    """As `twin`, of a model in which nothing is rewired."""
    with pytest.warns(revwire.NothingToRewireWarning):
        return twin(model, example, **options)


def reasons(model: nn.Module) -> str:
    return " | ".join(sorted({s.reason for s in revwire.report(model).skipped}))
