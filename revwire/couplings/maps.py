"""A map that is fitted to examples: affine, over the channels; for schemes on a pair of states (`Move`)."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from revwire._errors import CouplingError
from revwire.couplings.base import StateMap


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
