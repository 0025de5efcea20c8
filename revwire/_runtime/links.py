"""How the output of a unit is known again as the input of the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revwire._runtime import functions as _engine
from revwire._runtime.tape import Tape
from revwire._surroundings.inventory import version_of
from revwire._torch import HOOKED_NODE, identity_nodes

_LINK = "_revwire_link"


_VIEW = "_revwire_link_of_view"


@dataclass(slots=True)
class Link:
    """What the output of a unit knows of its chain: the tape, how far it had come, and the gradient carriers.

    ``previous`` and ``current`` are float tensors of the stream dtype, through which the gradients of x_{k-1} and x_k
    flow. ``current`` is None where the linked tensor itself carries x_k (a tensor must not refer to itself).
    """

    tape: Tape
    position: int
    version: int
    previous: Tensor | None
    current: Tensor | None
    seen_as: tuple[Any, Any] | None = (
        None  # where the linked tensor is a view: the place in the graph and the layout that tell which
    )
    behind: Link | None = None  # the link of the tensor that the linked one stands for; see Note [Identities]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied or pickled tensor is like any other tensor (an empty dict is what every unpickler accepts)."""
        return OrderedDict, ()

    def carriers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The float tensors of x_{k-1} and x_k, through which gradients flow; ``x`` is the linked tensor."""
        current = x if self.current is None else self.current
        assert self.previous is not None
        previous = self.previous
        if torch.is_grad_enabled():
            if previous.requires_grad and not x.requires_grad:  # x.detach_() cuts the whole graph
                return previous.detach(), current.detach()
            if x.requires_grad and not current.requires_grad:  # x.requires_grad_() wants the whole gradient
                state = self.tape.intact_state()[1]
                return previous, _engine.enter(x.to(current.dtype), self.tape.streams, state)
        return previous, current

    def spend(self) -> None:
        """The tape went on: what only this link holds can go."""
        self.previous = self.current = None
        if self.behind is not None:
            self.behind.spend()


def _linked(outward: Tensor, tape: Tape, previous: Tensor | None, current: Tensor) -> Tensor:
    link = Link(tape, tape.progress, version_of(outward), previous, None if outward is current else current)
    setattr(outward, _LINK, link)
    return outward


def _link_behind(x: Tensor) -> Any:
    """The link of the tensor that ``x``, which has a base and no link, stands for; see Note [Identities]."""
    base = x._base
    if base is None or (x.grad_fn is None and not torch.is_grad_enabled()):
        return None
    found = _edge_behind(x), _layout_of(x)
    view = getattr(base, _VIEW, None)
    if view is not None and view.seen_as == found:
        return view
    return getattr(base, _LINK, None) if (_edge_of(base), _layout_of(base)) == found else None


def _through(x: Tensor, link: Link) -> Link:
    """The link behind ``x`` as that of ``x``: see Note [Identities]."""
    current = link.current
    if current is not None and any(isinstance(node, HOOKED_NODE) for node, _ in _identities(x)):
        current = _engine.enter(x.to(current.dtype), link.tape.streams, link.tape.intact_state()[1])
    return Link(link.tape, link.position, link.version, link.previous, current, behind=link)


def _edge_behind(x: Tensor) -> tuple[Any, int]:
    """The place in the graph of the tensor that went through identities and came out as ``x``."""
    edge = _edge_of(x)
    for node, number in _identities(x):
        edge = node.next_functions[number]
    return (
        (None, 0) if edge[0] is None or hasattr(edge[0], "variable") else edge
    )  # a node that only accumulates stands for a leaf


def _identities(x: Tensor) -> Iterator[tuple[Any, int]]:
    """The identity functions that ``x`` came through, latest first: (graph node, number of its output)."""
    node, number = _edge_of(x)
    while isinstance(node, identity_nodes()):
        yield node, number
        node, number = node.next_functions[number]


def _edge_of(x: Tensor) -> tuple[Any, int]:
    """The place of ``x`` in the graph: (node, number of its output); a leaf has none."""
    return x.grad_fn, x.output_nr


def _layout_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset()
