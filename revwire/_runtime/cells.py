"""What autograd saves while it is not known yet whether it will be rebuilt."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Cell:
    """One saved tensor: held, until a unit that rebuilds it takes it over.

    Attributes:
        tensor, version: what was saved; None once it can be rebuilt.
        source, number: gives it back, by its number, then.
    """

    __slots__ = ("number", "source", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.source: Callable[[int], Tensor] | None = None
        self.number = -1

    def held(self) -> Tensor:
        """What it holds."""
        assert self.tensor is not None
        return self.tensor

    def give_up(self, number: int, source: Callable[[int], Tensor]) -> None:
        """From now on ``source`` rebuilds it."""
        self.tensor, self.number, self.source = None, number, source

    def keep(self) -> None:
        """It stays, without the graph that it came from: that owns the cell."""
        if self.tensor is not None:
            self.tensor = self.tensor.detach()


def kept_cell(tensor: Tensor) -> Cell:
    """The hook that saves a tensor in a cell for good."""
    return Cell(tensor.detach())


def opened_cell(cell: Cell) -> Tensor:
    """The hook that gives back what was saved.

    Raises:
        RuntimeError: it was written to since, as autograd says it.
    """
    if cell.source is not None:
        return cell.source(cell.number)
    assert cell.tensor is not None
    if cell.tensor._version != cell.version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{cell.tensor.type()} {list(cell.tensor.shape)}] is at version {cell.tensor._version}; expected version "
            f"{cell.version} instead"
        )
    return cell.tensor
