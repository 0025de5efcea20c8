"""How the output of a unit is known again as the input of the next.

Note [Links]
    Hosts need not know each other. The tensor that a unit returns carries a `Link` to the tape of its chain; the next
    unit that is given that very tensor, unchanged, continues the tape. Whatever Python runs between two blocks (loops,
    hidden-state lists, caches, flags) stays as it was written. A tensor without a valid link begins a new tape, which
    is the rule for the first unit, and for a tensor that something else than the chain made.

Note [Identities]
    FSDP2, and PyTorch where a module has backward hooks, hand a module its inputs (and PyTorch its caller the outputs)
    through an identity function, in whose backward pass they act. That makes another tensor, behind which the chain
    goes on. A backward hook sees, and may exchange, the whole gradient of a state, so no path may lead past its tensor:
    where a state has a carrier beside the tensor, it is entered anew through it. FSDP2 is content to hear that the
    gradient is there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revwire._runtime.autograd_graph import Edge, edge_behind, edge_of, identities_behind
from revwire._runtime.chain import Chain
from revwire._runtime.functions import enter
from revwire._runtime.regions import HERE
from revwire._runtime.tape import Tape
from revwire._runtime.unit import Unit
from revwire._surroundings.inventory import version_of
from revwire._torch import HOOKED_NODE

LINK = "_revwire_link"  # these names are `OURS`


_VIEW = "_revwire_link_of_view"


@dataclass(slots=True)
class Link:
    """What the output of a unit knows of its chain: the tape, how far it had come, and the gradient carriers.

    Through ``previous`` and ``current`` the gradients of x_{k-1} and x_k flow. ``current`` is None where the linked
    tensor itself carries x_k (a tensor must not refer to itself).
    """

    tape: Tape
    position: int
    version: int
    previous: Tensor | None
    current: Tensor | None
    seen_as: tuple[Edge, Any] | None = (
        None  # of a linked tensor that is a view: the edge and the layout that tell which
    )
    behind: Link | None = None  # the link of the tensor that the linked one stands for; see Note [Identities]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied or pickled tensor is like any other tensor (an empty dict is what every unpickler accepts)."""
        return OrderedDict, ()

    def carriers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensors through which the gradients of x_{k-1} and x_k flow; ``x`` is the linked tensor."""
        current = x if self.current is None else self.current
        assert self.previous is not None
        previous = self.previous
        if torch.is_grad_enabled():
            if previous.requires_grad and not x.requires_grad:  # x.detach_() cuts the whole graph
                return previous.detach(), current.detach()
            if x.requires_grad and not current.requires_grad:  # x.requires_grad_() wants the whole gradient
                state = self.tape.intact_state()[1]
                return previous, enter(x.to(current.dtype), self.tape.streams, state)
        return previous, current

    def spend(self) -> None:
        """The tape went on: what only this link holds can go."""
        self.previous = self.current = None
        if self.behind is not None:
            self.behind.spend()


def linked(outward: Tensor, tape: Tape, previous: Tensor | None, current: Tensor) -> Tensor:
    """``outward``, which a unit hands on, with its link."""
    link = Link(tape, tape.progress, version_of(outward), previous, None if outward is current else current)
    setattr(outward, LINK, link)
    return outward


def linked_view(y: Tensor, link: Link, view: Callable[[Tensor], Tensor]) -> Tensor:
    """``y``, a view of a linked tensor, as the chain's newest: with the link that comes after this one."""
    previous, current = (None if t is None else view(t) for t in (link.previous, link.current))
    link.spend()
    linked(y, link.tape, previous, y if current is None else current)
    if y._base is not None:  # what stands for a view knows the tensor below the view only
        following: Link = getattr(y, LINK)
        following.seen_as = edge_of(y), _layout_of(y)
        setattr(y._base, _VIEW, following)
    return y


def link_of(x: Tensor, chain: Chain, unit: Unit | None = None) -> Link | None:
    """The link of ``x``, if that is what ``chain`` handed on last, and ``unit`` may go on from there."""
    link, stands_for = getattr(x, LINK, None), False
    if link is None and x._base is not None:
        link, stands_for = _link_behind(x), True
    if not isinstance(link, Link) or link.tape.chain is not chain or link.tape.region is not HERE.region:
        return None
    newest = (link.tape.progress, version_of(x)) == (link.position, link.version)
    if not newest or (unit is not None and unit.place(link.tape.position) is None):
        return None
    return _through(x, link) if stands_for else link


def crosses_region(x: Tensor) -> bool:
    """Whether a link of ``x`` does not hold here; see Note [Regions] in `regions`."""
    link = getattr(x, LINK, None)
    return isinstance(link, Link) and link.tape.region is not HERE.region


def _link_behind(x: Tensor) -> Any:
    """The link of the tensor that ``x``, which has a base and no link, stands for; see Note [Identities]."""
    base = x._base
    if base is None or (x.grad_fn is None and not torch.is_grad_enabled()):
        return None
    found = edge_behind(x), _layout_of(x)
    view = getattr(base, _VIEW, None)
    if view is not None and view.seen_as == found:
        return view
    return getattr(base, LINK, None) if (edge_of(base), _layout_of(base)) == found else None


def _through(x: Tensor, link: Link) -> Link:
    """The link behind ``x`` as that of ``x``: see Note [Identities]."""
    current = link.current
    if current is not None and any(isinstance(node, HOOKED_NODE) for node, _ in identities_behind(x)):
        current = enter(x.to(current.dtype), link.tape.streams, link.tape.intact_state()[1])
    return Link(link.tape, link.position, link.version, link.previous, current, behind=link)


def _layout_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset()
