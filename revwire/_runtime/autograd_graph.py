"""What autograd's graph tells: which pass runs, what a tensor comes from, whether it will run modules again. Whoever
walks it does so by what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from revwire._surroundings.modes import NOTHING
from revwire._torch import current_graph_task_id, identity_nodes

NO_PASS = -1
"""What `running_pass` gives where none runs."""


Edge = tuple[Any, int]
"""A place in the graph: a node (None: there is none), and the number of its output."""


def running_pass() -> int:
    """The id of the backward pass that runs on this thread, or -1."""
    return int(current_graph_task_id())


def nodes_behind(t: Tensor, *, past: Callable[[Any], bool] | None = None, most: int | None = None) -> Iterator[Any]:
    """The nodes of the graph behind ``t``, each once, the nearest first.

    Args:
        past: whether to go on behind a node; None: behind all.
        most: ends where more than so many nodes have been met.
    """
    nodes = [t.grad_fn] if t.grad_fn is not None else []
    seen = set[Any](nodes)
    for node in nodes:  # grows
        if most is not None and len(nodes) > most:
            return
        yield node
        if past is None or past(node):
            new = [n for n in dict.fromkeys(n for n, _ in node.next_functions) if n is not None and n not in seen]
            seen.update(new)
            nodes += new


def is_checkpointed(f: Tensor) -> bool:
    """Whether the graph behind ``f`` has a node that will run modules again: that of reentrant checkpointing, of
    whichever library.
    """
    return any("checkpoint" in node.name().lower() for node in nodes_behind(f))


def comes_from(t: Tensor, sources: Sequence[Tensor]) -> bool:
    """Whether a gradient flows from ``t`` to one of these leaves."""
    wanted = {id(s) for s in sources}
    if any(id(getattr(node, "variable", None)) in wanted for node in nodes_behind(t)):
        return True
    return any(t is s for s in sources) and t.requires_grad


def edge_of(x: Tensor) -> Edge:
    """The place of ``x`` in the graph; a leaf has none."""
    return x.grad_fn, x.output_nr


def identities_behind(x: Tensor) -> Iterator[Edge]:
    """The places of the identity functions that ``x`` came through, latest first; see Note [Identities] in `links`."""
    node, number = edge_of(x)
    while isinstance(node, identity_nodes()):
        yield node, number
        node, number = node.next_functions[number]


def edge_behind(x: Tensor) -> Edge:
    """The place of the tensor that went through identity functions and came out as ``x``."""
    edge = edge_of(x)
    for node, number in identities_behind(x):
        edge = node.next_functions[number]
    only_accumulates = edge[0] is None or hasattr(edge[0], "variable")  # such a node stands for a leaf
    return (None, 0) if only_accumulates else edge


@contextmanager
def _plain_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def recording_nothing() -> AbstractContextManager[None]:
    """``no_grad``, but never inference mode (in which a backward pass may run): a recompute needs a graph."""
    if torch.is_inference_mode_enabled():
        return _plain_mode()
    return torch.no_grad() if torch.is_grad_enabled() else NOTHING
