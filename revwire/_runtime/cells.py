"""What autograd saves while it is not known yet whether it will be rebuilt.

A cell holds one saved tensor, until a unit that rebuilds it takes it over: ``[tensor, version, None]``, then ``[None,
number, source]``, where a `Source` gives it back. (A list, as there is one for each saved tensor of each branch, and a
class of its own would be felt.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revwire._surroundings.modes import NOTHING
from revwire._torch import current_graph_task_id, inside_checkpoint

Cell = list[Any]


class Source:
    """The branch of a unit, which gives what it saved.

    Attributes:
        position: of its record on a tape.
        passes: backward passes through that, by number: each stands somewhere, with a cache of what is there again.
        saved: gives a tensor by its number, recomputed if need be.
    """

    __slots__ = ("passes", "position", "saved")

    def __init__(self, passes: dict[int, Any], position: int, saved: Callable[[int], Tensor]) -> None:
        self.passes, self.position, self.saved = passes, position, saved


def keep(cells: Iterable[Cell]) -> None:
    """What they still hold stays, without the graph that it came from: that owns the cells."""
    for cell in cells:
        if cell[0] is not None:
            cell[0] = cell[0].detach()


def packed_into(cells: list[Cell]) -> Callable[[Tensor], Cell]:
    """The hook that saves a tensor in a cell, and puts that down. Autograd keeps the hook with every tensor: it owns
    the cells alone.
    """

    def pack(t: Tensor) -> Cell:
        cell: Cell = [t, t._version, None]
        cells.append(cell)
        return cell

    return pack


def kept_cell(tensor: Tensor) -> Cell:
    """The hook that saves a tensor in a cell for good."""
    return [tensor.detach(), tensor._version, None]


def kept_from_checkpoint() -> AbstractContextManager[Any]:
    """Inside of `torch.utils.checkpoint`, a context in which it does not see what is saved. It would run a part of a
    chain again as it was written: without the steps, and on a state that is not the streams'.
    """
    return saved_tensors_hooks(kept_cell, opened_cell) if inside_checkpoint() else NOTHING


def opened_cell(cell: Cell) -> Tensor:
    """The hook that gives back what was saved.

    Raises:
        RuntimeError: it was written to since, as autograd says it.
    """
    tensor, number, source = cell
    if source is not None:
        here = source.passes.get(current_graph_task_id())
        if here is not None and here.position == source.position:  # as `Rewind.saved` does it, in the common case
            found = here.cache.get(number)
            if found is not None and found[0]._version == found[1]:
                del here.cache[number]
                return found[0]  # type: ignore[no-any-return]
        return source.saved(number)  # type: ignore[no-any-return]
    if tensor._version != number:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {number} instead"
        )
    return tensor  # type: ignore[no-any-return]
