"""The abstract coupling: one linear two-step rule with three coefficients per unit.

    x_{k+1} = a·x_k + b·x_{k-1} + c·F_k(x_k),   x_{-1} = x_0            (step)
    x_{k-1} = (x_{k+1} − a·x_k − c·F_k(x_k)) / b                        (unstep)

A scheme may take a second step after each unit but the last, which moves the point where the next branch is evaluated:

    (y_k, z_k) → (z_k, y_{k+1}) → (y_{k+1}, z_{k+1}),   z_{k+1} = a·y_{k+1} + b·z_k + c·p(y_{k+1})      (move)

On two streams it is the same rule again, with p(y_{k+1}) in the place of a branch; so all laws hold for it.

Laws, measured on every scheme by the tests:

1. ``unstep(step(x_{k-1}, x_k, f), x_k, f) == x_{k-1}`` in exact arithmetic, for every f.
2. In floating point the error of law 1 grows by at most ``error_growth`` per unit.
3. In fixed point law 1 holds to the bit, at the price of ``kept_bits`` bits per element and unit.
4. ``consistent`` schemes have a + b = 1 and c = 1 + b: they integrate the same residual flow as
   the plain network, and so keep its function up to the order of the method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import inf, log2
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from revwire._errors import CouplingError

FLOAT_TOLERANCE = 1e-4
"""Float mode is the default only where the rebuilt input of a chain is expected within this relative error."""


_EPSILON = 2.0**-23
"""One unit in the last place of float32: the rounding error that every unit adds in float mode."""


MOST_BITS = 7
"""The most bits per element and unit that fixed point can keep: |b| is 2^-7 or more."""


KEEPING = 1 / 4
"""The largest |b| with which consistent schemes still came near the pretrained function in the retention benchmarks."""


Factor: TypeAlias = "float | Tensor"


Kind: TypeAlias = Literal["residual", "block"]
"""How a coupling is asked for its rule: for a branch beside a skip, or for block(x) − x."""


C = TypeVar("C", bound="Coupling")


class Coefficients(NamedTuple):
    """(a, b, c) of the recurrence; b is never zero."""

    a: float
    b: float
    c: float

    @property
    def for_block(self) -> Coefficients:
        """The same rule written for a whole block B(x) = x + F(x): F = B − x moves −c into a."""
        return Coefficients(self.a - self.c, self.b, self.c)


@dataclass(frozen=True, eq=False, slots=True)
class Rule:
    """The coefficients of one unit in one forward pass: numbers, or one number per sample.

    Attributes:
        a, c: factors of x_k and of the branch's value: floats, or tensors of shape (batch, 1, .. 1) in the stream
            dtype.
        b: factor of x_{k-1}; with ``signs``, its magnitude. 0 where the step is never undone.
        bits: m, where |b| = 2^-m for a whole m; else None.
        signs: the signs of b, +1 or -1, of shape (batch, 1, .. 1) in the stream dtype, or None.
    """

    a: Factor
    b: float
    c: Factor
    bits: int | None
    signs: Tensor | None = None

    @property
    def back(self) -> Factor:
        """The factor of x_{k-1}, with its signs."""
        return self.b if self.signs is None else self.signs * self.b

    @classmethod
    def of(cls, coefficients: Coefficients) -> Rule:
        """The rule with these numbers."""
        return cls(*coefficients, bits=bits_of(coefficients.b))


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
        a, c = float(self.rule.a), float(self.rule.c)
        if self.map is None:
            return g * a
        with torch.autocast(g.device.type, enabled=False):
            return torch.add(self.map.pulled(g, y) * c, g, alpha=a)


def bits_of(b: float) -> int | None:
    """m, where |b| = 2^-m for a whole m from 0 to `MOST_BITS`; else None."""
    m = -log2(abs(b)) if b else -1.0
    return int(m) if m.is_integer() and 0 <= m <= MOST_BITS else None


def nearest_power(b: float, fewest: int = 0) -> float:
    """The number 2^-m, m = ``fewest`` .. `MOST_BITS`, that is nearest to ``b`` (at least 0) as a ratio."""
    m = round(-log2(b)) if b > 0 else MOST_BITS
    return float(2.0 ** -min(MOST_BITS, max(fewest, m)))


@dataclass(frozen=True)
class Coupling(ABC):
    """A scheme: how the two streams of a chain are coupled. Subclasses hold their parameters only."""

    backward_parameter: ClassVar[str | None] = None
    """The parameter whose magnitude is |b|: the one that must be a power of two for exact arithmetic."""

    fewest_bits: ClassVar[int] = 0
    """The least m for which |b| = 2^-m is allowed."""

    plain_in_eval: ClassVar[bool] = False
    """Whether units of a model in eval mode run as in the original network, x_{k+1} = x_k + F_k(x_k), with ordinary
    autograd.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The spelling that `convert(coupling=...)` accepts."""

    @property
    @abstractmethod
    def coefficients(self) -> Coefficients:
        """(a, b, c) of one unit."""

    @property
    def error_growth(self) -> float:
        """1 / min|λ| over the roots of λ² = aλ + b: what one float unstep multiplies an error by."""
        a, b, _ = self.coefficients
        root = complex(a * a + 4 * b) ** 0.5
        return 1 / min(abs(a + root), abs(a - root)) * 2

    @abstractmethod
    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        """The output of a chain from its two streams (x_{K-1}, x_K), both of the chain's shape."""

    @property
    def move(self) -> Move | None:
        """What moves the point of the next branch after each unit but the last of a chain: a second step; `Move`."""
        return None

    def to_plain(self) -> Any:
        """It as `coupling_from` reads it: its spelling, or a dict of plain data (JSON-ready) that has its ``name``."""
        return self.name

    @property
    def bare(self: C) -> C:
        """The scheme without what was fitted to one place in a chain."""
        return self

    def in_place_of(self: C, old: Coupling) -> C:
        """The scheme at the place of ``old``, from which it takes what was fitted there, if it is of the same kind."""
        return self

    @property
    def drops_skip(self) -> bool:
        """Whether a post-activation block act(x + F(x)) is rewired as x_{k-1} + act(F(x_k))."""
        return False

    @property
    def keeps_function(self) -> bool:
        """Whether the same weights compute nearly the same in the plain network: where the rule is consistent and |b|
        is small, or where models in eval mode *are* the plain network.

        Weights that were trained under another scheme are of use under that scheme alone.
        """
        a, b, c = self.coefficients
        return self.plain_in_eval or (max(abs(a + b - 1), abs(c - 1 - b)) < 1e-9 and abs(b) <= KEEPING)

    @property
    def kept_bits(self) -> int:
        """Bits kept per element and unit in fixed point: m, where |b| = 2^-m.

        Raises:
            CouplingError: |b| is not 2^-m for a whole m from 0 to 7, so no fixed-point form exists.
        """
        m = bits_of(self.coefficients.b)
        if m is None:
            neighbour = self.exact_neighbour().name if self.backward_parameter else "such a coefficient"
            raise CouplingError(
                f"coupling {self.name!r}: got b = {self.coefficients.b}; exact arithmetic needs |b| = 2^-m with m = "
                f"0..{MOST_BITS}; choose {neighbour}, or pass exact=False"
            )
        return m

    def exact_neighbour(self: C) -> C:
        """The nearest scheme of the same kind that has an exact form: itself, if it has one."""
        name = self.backward_parameter
        return self if name is None else replace(self, **{name: nearest_power(getattr(self, name), self.fewest_bits)})

    def between(self: C, other: Coupling, share: float, *, exact: bool) -> C:
        """The scheme whose parameters lie at ``share`` (0 to 1) on the way from these to those of ``other``.

        Where it must be ``exact``, the parameter that sets |b| goes in steps: to the nearest power of two.

        Raises:
            CouplingError: ``other`` is of another kind.
        """
        if type(other) is not type(self):
            raise CouplingError(
                f"coupling {self.name!r}: got a way to {other.name!r}; expected a coupling of the same kind; "
                "set_coupling changes the kind"
            )
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {n: v + share * (getattr(other, n) - v) for n, v in mine.items()}
        if exact and self.backward_parameter:
            values[self.backward_parameter] = nearest_power(values[self.backward_parameter], self.fewest_bits)
        return replace(self, **values)

    def rule(self, kind: Kind, x: Tensor) -> Rule:
        """The coefficients by which one unit enters the step of the stream ``x``, drawn anew where they are random."""
        return self._rules[kind]

    @cached_property
    def _rules(self) -> dict[Kind, Rule]:
        """The constant rules, by kind of unit: a property is quicker than a cache that must hash the coefficients."""
        return {"residual": Rule.of(self.coefficients), "block": Rule.of(self.coefficients.for_block)}

    @cached_property
    def shares(self) -> bool:
        """Whether the gradient that a step gives x_{k-1} may be made of that of its branch: not where b < 0.

        Gradients of steps cancel in part then, and one more rounding of them would count.
        """
        return self.coefficients.b > 0

    def float_error(self, units: int) -> float:
        """Expected relative error of the rebuilt input of a chain of ``units`` units in float32."""
        return float(sum(_EPSILON * self.error_growth**k for k in range(1, units + 1)))

    @property
    def has_exact_form(self) -> bool:
        """Whether |b| = 2^-m. Fixed-point streams are the default then.

        Float inversion of ``re2tal`` loses about 1e-7 as long as branches compute in float32; in bfloat16 (autocast) a
        last-bit difference of the rebuilt input flips roundings in the branch, and the loss passes `FLOAT_TOLERANCE`.
        That is not known at conversion, and exactness costs ``re2tal`` no bits.
        """
        return bits_of(self.coefficients.b) is not None

    def step(self, previous: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """x_{k+1} from (x_{k-1}, x_k, F_k(x_k)), all of one shape, in ordinary differentiable arithmetic."""
        a, b, c = self.coefficients
        return a * current + b * previous + c * branch

    def unstep(self, following: Tensor, current: Tensor, branch: Tensor) -> Tensor:
        """x_{k-1} from (x_{k+1}, x_k, F_k(x_k)): the inverse of `step`."""
        a, b, c = self.coefficients
        return (following - a * current - c * branch) / b


PLAIN = {"residual": Rule(1.0, 0.0, 1.0, None), "block": Rule(0.0, 0.0, 1.0, None)}
"""The original network, by kind of unit."""


def named(value: float) -> str:
    """A parameter as users spell it: 1/8, -3/4, 0.3."""
    for denominator in (2**m for m in range(MOST_BITS + 1)):
        if float(value * denominator).is_integer():
            return f"{int(value * denominator)}/{denominator}" if denominator > 1 else f"{int(value)}"
    return repr(value)


def is_number(value: Any) -> bool:
    """Whether a parameter is a finite real number."""
    return type(value) is not bool and isinstance(value, (int, float, Real)) and abs(value) < inf  # type: ignore[operator]


def random_signs(x: Tensor) -> Tensor:
    """+1 or -1 for each sample of a stream (dimension 0), drawn from the default generator of its device.

    Shape (batch, 1, .. 1); float64 for streams in 64 bits, else float32.
    """
    dtype = torch.float64 if x.dtype in (torch.int64, torch.float64) else torch.float32
    shape = (x.shape[0], *[1] * (x.dim() - 1)) if x.dim() else ()
    return torch.randint(0, 2, shape, device=x.device, dtype=dtype).mul_(2).sub_(1)
