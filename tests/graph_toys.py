"""Small networks of one peculiarity each, and the oracle that the graph tests use.

`Plain` has the coefficients (1, 0, 1): the original network. It cannot be inverted, but with stored activations a model
converted with it must give the outputs and gradients of the original, whatever the graph side did to it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import revwire
from revwire import Coupling
from revwire.couplings.base import Coefficients

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # float64: another order of summation, nothing else


@dataclass(frozen=True)
class Plain(Coupling):
    """x_{k+1} = x_k + F(x_k)."""

    name = "plain"
    coefficients = Coefficients(1.0, 0.0, 1.0)
    error_growth = 1.0

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current


def x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = x(2, 5, 8)


def block(forward: Callable[..., Any], init: Callable[[nn.Module], Any] = lambda _: None) -> type[nn.Module]:
    """A module class with two linear layers, a dropout and this forward."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.3)
            init(self)

    Block.forward = forward
    return Block


class Loop(nn.Module):
    """A loop over blocks that hands each of them the other arguments; what they return besides the stream is
    collected.
    """

    def __init__(self, kind: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sides = []
        for b in self.blocks:
            out = b(x, *args, **kwargs)
            x, *side = out if isinstance(out, tuple) else (out,)
            sides.append(side)
        return x, sides


def stack(forward: Callable[..., Any], init: Callable[[nn.Module], Any] = lambda _: None, depth: int = 3) -> Loop:
    torch.manual_seed(0)
    return Loop(block(forward, init), depth).double()


def pre_norm(self: nn.Module, x: Tensor) -> Tensor:
    return x + self.drop(self.g(self.f(x).tanh()))


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, dict):
        return [t for v in out.values() for t in tensors(v)]
    if isinstance(out, (list, tuple)):
        return [t for v in out for t in tensors(v)]
    return [t for v in vars(out).values() for t in tensors(v)] if dataclasses.is_dataclass(out) else []


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


def reasons(model: nn.Module) -> str:
    return " | ".join(sorted({s.reason for s in revwire.report(model).skipped}))
