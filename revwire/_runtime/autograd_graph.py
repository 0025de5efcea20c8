"""What autograd's graph tells: which pass runs, what a tensor comes from, whether it will run modules again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from revwire._surroundings.modes import NOTHING
from revwire._torch import current_graph_task_id

_NO_PASS = -1


def running_pass() -> int:
    """The id of the backward pass that runs on this thread, or -1."""
    return int(current_graph_task_id())


def _is_checkpointed(f: Tensor) -> bool:
    """Whether the graph behind ``f`` has a node that will run modules again: that of reentrant checkpointing, of
    whichever library.
    """
    seen, todo = set[Any](), [f.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "checkpoint" in node.name().lower():
            return True
        todo += [below for below, _ in node.next_functions]
    return False


@contextmanager
def _plain_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def recording_nothing() -> AbstractContextManager[None]:
    """``no_grad``, but never inference mode (in which a backward pass may run): a recompute needs a graph."""
    if torch.is_inference_mode_enabled():
        return _plain_mode()
    return torch.no_grad() if torch.is_grad_enabled() else NOTHING


def _comes_from(t: torch.Tensor, sources: list[torch.Tensor]) -> bool:
    """Whether a gradient flows from ``t`` to one of these leaves."""
    wanted, seen = {id(s) for s in sources}, set[Any]()
    todo = [t.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        todo += [below for below, _ in node.next_functions]
    return any(t is s for s in sources) and t.requires_grad
