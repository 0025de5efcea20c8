"""A few steps of fine-tuning: plain PyTorch, and nothing in it knows that the model is reversible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[tuple[Tensor, Tensor], Tensor]
"""Token numbers and mask, and labels."""


def fine_tune(model: nn.Module, batches: Iterable[Batch], learning_rate: float) -> Iterator[float]:
    """Train on each batch in turn, with AdamW; yields the loss before each step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for inputs, labels in batches:
        loss = cross_entropy(model(*inputs), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> float:
    """The share of a batch that is classified right."""
    inputs, labels = batch
    right: Tensor = model.eval()(*inputs).argmax(1) == labels
    return right.float().mean().item()
