"""One training step on an example, run for measuring: the model is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revwire._replay import accelerators_of, preserved_random_state

Loss = Callable[[Any], Tensor]


def mean_square(output: Any) -> Tensor:
    """The mean square over all floating-point tensors of a model's output, of any nesting."""
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.float().square().mean() for t in leaves]).mean()


def run_model(model: nn.Module, leaves: tuple[Any, Any]) -> Any:
    """Call on containers made anew: some models write to the list that they are given."""
    args, kwargs = tree_map(lambda leaf: leaf, leaves)
    return model(*args, **kwargs)


def own_leaves(inputs: Any) -> Any:
    """The inputs on the same storage, with a ``.grad`` of their own: the caller's stays as it is."""
    return tree_map(lambda t: t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t, inputs)


def device_of(model: nn.Module, inputs: Any) -> torch.device:
    """The CUDA device that a step runs on, if any; else the CPU."""
    tensors = [*model.parameters(), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
    return next((t.device for t in tensors if t.device.type == "cuda"), torch.device("cpu"))


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers and random state at the end; inside, each ``.grad`` is allocated and zero."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    with preserved_random_state(accelerators_of(model.parameters())):
        try:
            for p, _ in grads:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            yield
        finally:
            with torch.no_grad():
                for p, grad in grads:
                    p.grad = grad
                for buffer, value in buffers:
                    buffer.copy_(value)
