"""How the two streams of a chain are held: as floats, or as fixed-point integers with kept bits. Arithmetic only.

Fixed point, for a unit with coefficients (a, b, c), |b| = 2^-m, and streams X = round(x·2^K):

    R       = round(2^K·(a·x_k + c·f)),   x_k = X_k·2^-K
    Y       = X_{k-1} + h,  h = 2^(m-1)   (0 for m = 0), so that the shift below rounds to the nearest
    X_{k+1} = R ± (Y >> m),               the m low bits of Y are kept, packed
    X_{k-1} = ((±(X_{k+1} − R) << m) | bits) − h

Both directions compute R from the same X_k and the same f, so the inverse is exact to the bit.
Source: the fixed-point form of BDIA (arXiv 2407.09093), written for any |b| = 2^-m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from revwire._streams.samples import Fingerprint, Sample
from revwire.couplings.base import Factor, Rule

VALUE_BYTES = 4
"""What the value of an element of a stream takes at least: what is narrower only carries it."""


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The float dtype in which streams of this dtype are held: never narrower than float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def canonical(x: Tensor) -> Tensor:
    """``x`` in a layout that `torch.empty_like` reproduces: itself if dense, else a contiguous copy.

    A branch may compute other bits on another memory layout, so a rebuilt state must lie as the first one did.
    """
    return x if torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()


def is_dense(x: Tensor) -> bool:
    """Whether the elements of ``x`` lie side by side in memory, in any order, each once."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != extent:
                return False
            extent *= size
    return True


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x``, of which each element is stored once, in the order of other strides."""
    order = sorted(range(x.dim()), key=lambda d: (-strides[d], d))
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


class Stepped(NamedTuple):
    """The state of x_{k+1}, its float value, the bits that are kept to come back.

    Besides, where they are known: the `Streams.summary` of the state of x_{k-1}; that all values are in range, and the
    largest magnitude, to a factor of 2; or, on their device, magnitudes of which the largest is that of all values, and
    not finite where one of them is not. Values out of range are NaN then.
    """

    state: Tensor
    value: Tensor
    bits: Tensor | None
    summary: Tensor | None = None
    in_range: bool = False
    largest: float = 0.0
    reached: Tensor | None = None


class Undone(NamedTuple):
    """The state of x_{k-1}, and its `Streams.summary` where that is known."""

    state: Tensor
    summary: Tensor | None = None


Scaled = tuple[float, float, float, int, bool]
"""A rule for integers: a·2^K, c·2^K, 2^-K, m, and whether b is negative. (There are two for each unit and step, and a
class of its own would be felt.)
"""


class Form(Protocol):
    """A module that does the arithmetic of fixed-point streams in one pass over memory; see `kernels`."""

    def suits(self, *tensors: Tensor) -> bool: ...
    def advance(
        self, previous: Tensor, x: Tensor, f: Tensor, rule: Scaled, *, keep: bool, dtype: torch.dtype
    ) -> Stepped: ...
    def retreat(self, following: Tensor, x: Tensor, f: Tensor, rule: Scaled, bits: Tensor | None) -> Undone: ...
    def read(self, state: Tensor, scale: int) -> Tensor: ...
    def summed(self, state: Tensor) -> Tensor: ...
    def sampled(self, f: Tensor, saved: Sequence[Tensor], elements: int, fewer: int) -> Tensor | None: ...


class Streams(ABC):
    """Arithmetic of one chain's two streams during one forward pass; states are detached tensors."""

    witnesses: ClassVar[int] = 0
    """How many of the tensors that a branch saved last `sample` wants to see."""

    rebuilds: bool = True
    """Whether a state can come back from those after it; else each unit keeps it."""

    @property
    def bound(self) -> float | None:
        """The magnitude below which every value must stay, if there is one."""
        return None

    @abstractmethod
    def enter(self, x: Tensor) -> Tensor:
        """The state of a float tensor ``x`` (dense, in the stream dtype)."""

    @abstractmethod
    def read(self, state: Tensor) -> Tensor:
        """The float value of a state, in the stream dtype and the layout of the state."""

    @abstractmethod
    def step(
        self,
        previous: Tensor,
        x: Tensor,
        f: Tensor,
        rule: Rule,
        *,
        undone: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Stepped:
        """x_{k+1} from the state of x_{k-1}; ``x`` is the float value of x_k, or its state. A step that is never
        ``undone`` keeps no bits. The value of x_{k+1} may have this ``dtype`` at once, if that is narrower.
        """

    @abstractmethod
    def unstep(self, following: Tensor, x: Tensor, f: Tensor, rule: Rule, bits: Tensor | None) -> Undone:
        """The state of x_{k-1} from that of x_{k+1}; ``x`` is the float value of x_k, or its state."""

    @abstractmethod
    def summary(self, state: Tensor) -> Tensor:
        """A few numbers, on its device, that tell a state from another."""

    @abstractmethod
    def sample(self, f: Tensor, saved: Sequence[Tensor]) -> Sample:
        """Elements of a branch's result, and of `witnesses` of the tensors it saved for its gradient."""

    def fingerprint(self, state: Tensor, f: Tensor, saved: Sequence[Tensor]) -> Fingerprint:
        """The fingerprint of a state, a branch's result, and `witnesses` of the tensors it saved for its gradient."""
        return Fingerprint(self.summary(state), *self.sample(f, saved))

    @abstractmethod
    def difference(self, before: Fingerprint, after: Fingerprint) -> Tensor:
        """Two numbers, on their device: how far the states, and the branches, differ."""

    @abstractmethod
    def allowed(self, before: Fingerprint) -> tuple[float, float]:
        """The largest `difference` (of the state, of the branch) that is no fault."""

    def hopeless(self, before: Fingerprint, after: Fingerprint) -> bool:
        """Whether both hold values that are not finite, so that they cannot be compared (and no gradient is right)."""
        return False


def scaled(f: Tensor, factor: Factor, like: Tensor) -> Tensor:
    """``factor``·f in the dtype and layout of ``like`` (a float tensor)."""
    out = torch.empty_like(like)
    if isinstance(factor, Tensor):
        factor = factor.to(out.dtype)
    return torch.mul(f, factor, out=out) if f.dtype == out.dtype else out.copy_(f).mul_(factor)


def add_scaled(out: Tensor, x: Tensor, factor: Factor) -> None:
    """out += factor·x, in place."""
    if isinstance(factor, Tensor):
        out.addcmul_(x, factor.to(out.dtype))
    elif factor:
        out.add_(x, alpha=factor)
