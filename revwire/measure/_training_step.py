"""One training step on an example, run for measuring: the model is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revwire._torch import tree_leaves, tree_map

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


def allocate_gradients(model: nn.Module) -> None:
    """Give each parameter a zero ``.grad``, as in every step of a training but the first."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None


@contextmanager
def autocast_left(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Leave the autocast around this call for a while. Yields what enters it again, as a training step does for its
    forward alone.

    While it is on, autocast keeps its casts of weights; they go when the outermost context ends, which is before a
    backward pass begins.
    """
    kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.is_autocast_enabled(kind)]
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds]
    kept = torch.is_autocast_cache_enabled()
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=kept))
            yield

    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, False)
        for _ in range(depth):
            torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()
        yield entered
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)


def device_of(model: nn.Module, inputs: Any) -> torch.device:
    """The accelerator that a step runs on, if any; else the CPU."""
    tensors = [*model.parameters(), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
    return next((t.device for t in tensors if t.device.type not in ("cpu", "meta")), torch.device("cpu"))
