"""One way to leave a model as found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from revwire._surroundings.attributes import attributes_kept
from revwire._surroundings.buffers import buffers_kept, counters_kept
from revwire._surroundings.modes import nothing_compiled
from revwire._surroundings.randomness import accelerators_of, preserved_random_state, python_random_kept
from revwire._surroundings.weights import shards_kept


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


@contextmanager
def left_alone(module: nn.Module, devices: tuple[torch.device, ...]) -> Iterator[None]:
    """A run of a module inside of this leaves nothing behind: no random state, attribute, shard or buffer is another
    one.
    """
    with (
        preserved_random_state(devices),
        python_random_kept(),
        attributes_kept(module),
        shards_kept(module),
        nothing_compiled(),
        buffers_kept([module]),
        counters_kept(module),
    ):
        yield


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
