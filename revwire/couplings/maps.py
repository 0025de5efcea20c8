"""What a scheme on a pair of states does between two of its units: it moves the point at which branches are evaluated.

    y_{k+1} = y_k + F_k(z_k)                                            (the unit: (a, b, c) = (0, 1, 1))
    z_{k+1} = (1−ε)·y_{k+1} + ε·(z_k + p_{k+1}(y_{k+1})),  |ε| = 2^-m    (between)

On two streams both are one two-step rule each, one after the other: (y_k, z_k) → (z_k, y_{k+1}) → (y_{k+1}, z_{k+1}).
So what holds for steps holds for both: an exact inverse, m kept bits, the same kernels. p is any function of
y_{k+1} alone, which is there again when z_k is wanted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import Coefficients, Rule


class StateMap(ABC):
    """p: a function of a state, by which `Coupling.move` moves the point of the next branch.

    It must give the same bits whenever it is given the same. It runs without gradients, and outside of autocast.
    """

    is_affine: ClassVar[bool] = False
    """Whether its gradient is the same for every y, so that y is not needed for it."""

    @abstractmethod
    def value(self, y: Tensor) -> Tensor:
        """p(y), in the shape of ``y`` (a float state, in the stream dtype)."""

    def pulled(self, g: Tensor, y: Callable[[], Tensor]) -> Tensor:
        """The gradient of ⟨g, p(y)⟩ by y, in the shape of ``g``; ``y()`` gives the state. By autograd, unless a map
        knows better.
        """
        at = y().detach().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(self.value(at), at, g)[0]

    def to_plain(self) -> dict[str, Any]:
        """It as plain data (JSON-ready), where it can be saved within a plan.

        Raises:
            CouplingError: it cannot.
        """
        raise CouplingError(f"{type(self).__name__}: got a map that cannot be saved; expected one with to_plain()")

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds."""
        return 0


@dataclass(frozen=True, eq=False)
class Affine(StateMap):
    """p(y) = μ + (y − c)·A·B over one dimension, of rank r: ``bias`` = μ − c·A·B.

    Attributes:
        dim: the dimension of the state that holds its D channels; negative numbers count from the end.
        down: A, of shape (D, r).
        up: B, of shape (r, D).
        bias: of shape (D,).
        predicted: the share of the squares of what it is to predict that it did predict where it was held out.
    """

    dim: int
    down: Tensor
    up: Tensor
    bias: Tensor
    predicted: float = 1.0
    is_affine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_copies", {})

    def value(self, y: Tensor) -> Tensor:
        down, up, bias = self._on(y)
        self._check(y)
        if y.stride(self.dim) == 1 or y.dim() == 1:
            last = y.movedim(self.dim, -1)
            return torch.addmm(bias, last.reshape(-1, last.shape[-1]) @ down, up).view(last.shape).movedim(-1, self.dim)
        rows, shape = self._rows(y)
        return torch.baddbmm(bias.view(-1, 1), up.t().expand(len(rows), -1, -1), down.t() @ rows).view(shape)

    def pulled(self, g: Tensor, y: Callable[[], Tensor]) -> Tensor:
        down, up, _ = self._on(g)
        if g.stride(self.dim) == 1 or g.dim() == 1:
            last = g.movedim(self.dim, -1)
            return ((last.reshape(-1, last.shape[-1]) @ up.t()) @ down.t()).view(last.shape).movedim(-1, self.dim)
        rows, shape = self._rows(g)
        return (down @ (up @ rows)).view(shape)

    def _rows(self, y: Tensor) -> tuple[Tensor, torch.Size]:
        """``y`` as (samples, channels, places)."""
        dim = self.dim % y.dim()
        return y.reshape(prod(y.shape[:dim]), y.shape[dim], -1), y.shape

    def _check(self, y: Tensor) -> None:
        wide = self.bias.numel()
        if not -y.dim() <= self.dim < y.dim() or y.shape[self.dim] != wide:
            raise CouplingError(
                f"innovation: got a state of shape {tuple(y.shape)}; expected {wide} channels in dimension {self.dim}, "
                "as in the examples; calibrate again: revwire.calibrate(model, examples)"
            )

    def _on(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its tensors on the device and in the dtype of a state; copies are made once."""
        where = y.device, y.dtype
        copies: dict[Any, tuple[Tensor, Tensor, Tensor]] = vars(self)["_copies"]
        if where not in copies:
            down, up, bias = (t.to(*where) for t in (self.down, self.up, self.bias))
            copies[where] = down, up, bias
        return copies[where]

    def to_plain(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name) for name in ("down", "up", "bias")}
        written = {name: b64encode(t.float().numpy().tobytes()).decode() for name, t in tensors.items()}
        return {"dim": self.dim, "channels": self.bias.numel(), "predicted": self.predicted, **written}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Affine:
        """What `to_plain` gave."""
        read = {n: torch.frombuffer(bytearray(b64decode(data[n])), dtype=torch.float32) for n in ("down", "up", "bias")}
        wide = int(data["channels"])
        down, up = read["down"].view(wide, -1), read["up"].view(-1, wide)
        return cls(int(data["dim"]), down, up, read["bias"], float(data["predicted"]))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_copies": {}}

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes + self.bias.nbytes


@dataclass(frozen=True, eq=False)
class Move:
    """The step between two units: z_{k+1} = a·y_{k+1} + b·z_k + c·p(y_{k+1}).

    Attributes:
        rule: (a, b, c), with |b| = 2^-m where it is to be exact.
        map: p; None: there is none, and c counts for nothing.
    """

    rule: Rule
    map: StateMap | None

    @classmethod
    def innovation(cls, epsilon: float, p: StateMap | None) -> Move:
        """z_{k+1} = (1−ε)·y_{k+1} + ε·(z_k + p(y_{k+1}))."""
        return cls(Rule.of(Coefficients(1 - epsilon, epsilon, epsilon if p is not None else 0.0)), p)

    def value(self, y: Tensor) -> Tensor:
        """p(y), in the shape of ``y``; ``y`` where there is no map."""
        if self.map is None:
            return y
        with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
            return self.map.value(y)

    def pulled(self, g: Tensor, y: Callable[[], Tensor]) -> Tensor:
        """The gradient by y_{k+1} where that by z_{k+1} is ``g``: a·g + c·pᵀ(g)."""
        own = g * float(self.rule.a)
        if self.map is None:
            return own
        with torch.autocast(g.device.type, enabled=False):
            return own.add_(self.map.pulled(g, y), alpha=float(self.rule.c))
