"""The networks of the tests: the smallest branch of each kind, chains of them that are driven without the graph side,
and models of one peculiarity each for `revwire.convert`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import DEPTH
from revwire import Coupling, Innovation
from revwire._budget.forms import Form
from revwire._runtime import run as runner
from revwire._runtime.chain import Chain
from revwire._runtime.unit import Unit
from revwire.couplings.base import Coefficients

WIDTH = 8
SHAPE = (3, 5, WIDTH)  # (batch, tokens, channels)
IMAGE = (2, WIDTH, 4, 4)  # (batch, channels, height, width)
LARGE = (16, 64, WIDTH)  # as SHAPE, where bytes are counted
STREAM = 16 * 64 * WIDTH * 4
"""Bytes of one state of the shape LARGE."""


_SEEDS = count()


def restless() -> torch.Generator:
    """A generator that begins elsewhere each time: nobody can replay it."""
    return torch.Generator().manual_seed(next(_SEEDS))


class Setting:
    """An attribute of a module that no recompute puts back, so that it may go another way."""

    def __init__(self, value: Any) -> None:
        self.value, self.values = value, WeakKeyDictionary[nn.Module, Any]()

    def __get__(self, module: nn.Module, _: type) -> Any:
        return self.values.get(module, self.value)

    def __set__(self, module: nn.Module, value: Any) -> None:
        self.values[module] = value


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X = noise(2, 5, 8)


# -- couplings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain(Coupling):
    """x_{k+1} = x_k + F(x_k): the original network.

    It cannot be inverted, but with stored activations a model that is converted with it must give the outputs and
    gradients of the original, whatever the graph side did to it.
    """

    name = "plain"
    coefficients = Coefficients(1.0, 0.0, 1.0)
    error_growth = 1.0

    def merge(self, previous: Tensor, current: Tensor) -> Tensor:
        return current


class Leapfrog(Coupling):
    """(0, −1, 2): b is negative; and any other coefficients."""

    def __init__(self, a=0.0, b=-1.0, c=2.0):
        object.__setattr__(self, "numbers", Coefficients(a, b, c))

    @property
    def name(self):
        return "leapfrog"

    @property
    def coefficients(self):
        return self.numbers

    @property
    def error_growth(self):
        return 1.0

    def merge(self, previous, current):
        return current


# -- branches ----------------------------------------------------------------------------------------------------------


class PreNorm(nn.Module):
    """Layer norm, two linear layers, dropout between them."""

    shape = SHAPE

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x):
        return self.down(F.dropout(F.gelu(self.up(self.norm(x))), self.dropout, self.training))


class Dropped(PreNorm):
    """Dropout inside, and the whole branch dropped for some samples (stochastic depth)."""

    def __init__(self):
        super().__init__(dropout=0.2)

    def forward(self, x):
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < 0.8
        return super().forward(x) * keep / 0.8 if self.training else super().forward(x)


class Guarded(PreNorm):
    """Takes every error for one of its own kernel's."""

    def forward(self, x):
        try:
            return super().forward(x)
        except Exception:  # noqa: BLE001 (that is the point)
            return torch.zeros_like(x)


class Convolution(nn.Module):
    """Convolution and batch norm, whose buffers a training step writes."""

    shape = IMAGE

    def __init__(self):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return F.relu(self.norm(self.convolution(x)))


class Linear(nn.Linear):
    """Nothing but a matrix: its input's gradient needs no saved activation."""

    shape = SHAPE

    def __init__(self):
        super().__init__(WIDTH, WIDTH)


class Weightless(nn.Module):
    """No parameters at all."""

    shape = SHAPE

    def forward(self, x):
        return 0.3 * torch.sin(x)


class Attention(nn.Module):
    """Extra inputs: a bias tensor, a number, and a list with a tensor in it; a side output that carries a gradient."""

    shape = SHAPE

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, bias, scale, gates):
        q, k, v = self.mix(x).chunk(3, -1)
        weights = (q @ k.mT * scale + bias).softmax(-1)
        return weights @ v * gates[0], weights, tuple(x.shape)


def attention_extras(dtype=torch.float32):
    bias = torch.randn(SHAPE[1], SHAPE[1], dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gate = torch.full((WIDTH,), 0.7, dtype=dtype).requires_grad_()
    return bias, 0.5, [gate]


# -- chains that are driven without the graph side ---------------------------------------------------------------------


KINDS = {
    "pre-norm": PreNorm,
    "dropped": Dropped,
    "convolution": Convolution,
    "linear": Linear,
    "weightless": Weightless,
}


def as_residual(host, x, *extras):
    out = host(x, *extras)
    return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())


def as_block(host, x, *extras):
    f, sides = as_residual(host, x, *extras)
    return torch.tanh(x + f), sides


class Toy(nn.Module):
    """A chain of these branches; ``kind`` "block" is post-activation: tanh(x + F(x)).

    Extra inputs go to every branch. Returns the output of the chain, followed by the side outputs if there are any.
    """

    def __init__(self, branches, case, kind="residual", largest=3.9):
        super().__init__()
        self.branches = nn.ModuleList(branches).to(case.dtype)
        self.chain = Chain("chain 0", case.coupling, exact=case.exact, length=len(branches), largest=largest)
        self.kind = kind
        run = as_residual if kind == "residual" else as_block
        self.units = [Unit(f"branches.{i}", i, kind, run, lambda host: [host]) for i in range(len(branches))]

    def forward(self, x, *extras):
        sides = []
        for unit, branch in zip(self.units, self.branches, strict=True):
            x, extra = runner.apply(self.chain, unit, branch, x, extras)
            sides += extra
        return (x, *sides) if sides else x

    def oracle(self, x, *extras):
        """The same function in plain floating point, by the recurrence of the papers, written down a second time."""
        scheme = self.chain.couplings[0]
        if isinstance(scheme, Innovation):
            return self._innovation(x, extras, scheme)
        a, b, c = coefficients(self.chain.coupling_name)
        before, now, sides = x, x, []
        for branch in self.branches:
            f, extra = as_residual(branch, now, *extras)
            f = f if self.kind == "residual" else torch.tanh(now + f) - now
            before, now = now, a * now + b * before + c * f
            sides += extra
        out = (before + now) / 2 if self.chain.coupling_name == "re2tal" else now
        return (out, *sides) if sides else out

    def _innovation(self, x, extras, scheme):
        y, z, sides = x, x, []
        for branch in self.branches:
            f, extra = as_residual(branch, z, *extras)
            y = y + (f if self.kind == "residual" else torch.tanh(z + f) - z)
            predicted = y - (0 if scheme.map is None else scheme.map.value(y))
            z = y + scheme.epsilon * (z - predicted)
            sides += extra
        return (y, *sides) if sides else y


class Oracle(nn.Module):
    """The oracle of a toy as a module with the same parameters and buffers."""

    def __init__(self, toy):
        super().__init__()
        self.branches = toy.branches
        self.__dict__["toy"] = toy

    def forward(self, *inputs):
        return self.toy.oracle(*inputs)


def coefficients(name):
    if name == "re2tal":
        return 0, 1, 1
    name, _, numbers = name.partition(":")
    g, *more = (float(Fraction(number)) for number in numbers.split(","))
    return {
        "bdia": lambda: (1 - g, g, 1 + g),
        "momentum": lambda: (1 + g, -g, 1 - g),
        "dr2net": lambda: (g, more[0], 1),
        "midpoint": lambda: (1 - g, g, more[0]),
    }[name]()


@contextmanager
def stored(toy):
    """As `revwire.stored_activations`, for a toy."""
    toy.chain.stored = True
    try:
        yield
    finally:
        toy.chain.stored = False


def toy(case, branch=PreNorm, *, depth=DEPTH, kind="residual", seed=0, **options):
    torch.manual_seed(seed)
    return Toy([branch() for _ in range(depth)], case, kind, **options)


def inputs_of(model, case, *, requires_grad=True, seed=1) -> Tensor:
    x = torch.rand(model.branches[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * x - 1.5).to(case.dtype).requires_grad_(requires_grad)


def run_units(model, x, start=0, stop=None):
    """The state behind the units from ``start`` up to ``stop``."""
    for unit, branch in list(zip(model.units, model.branches, strict=True))[start:stop]:
        x, _ = runner.apply(model.chain, unit, branch, x)
    return x


LETTERS = {"s": "stored", "p": "selective", "c": "checkpointed", "r": "reversible"}
FORMS = {
    "r": Form.REVERSIBLE,
    "c": Form.CHECKPOINTED,
    "p": Form.SELECTIVE,
    "s": Form.STORED,
    "z": Form.TO_THE_END,
    "y": Form.SECOND_TO_END,
    "x": Form.LATER_TO_END,
    "a": Form.WHOLE_CHAIN,
}


def modes_of(mix):
    """The modes of units, of a letter each."""
    return tuple(LETTERS[letter] for letter in mix)


def forms_of(mix):
    """The forms of units, of a letter each."""
    return [FORMS[letter] for letter in mix]


def mixed(case, mix, kind=PreNorm):
    """A toy with a unit for each letter."""
    model = toy(case, kind, depth=len(mix))
    model.chain.modes = modes_of(mix)
    return model


# -- models for `revwire.convert` --------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Blocks in a row, all with the same extra inputs."""

    def __init__(self, make, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x, *extras):
        for block in self.blocks:
            x = block(x, *extras)
        return x


def block(forward: Callable[..., Any], init: Callable[[nn.Module], Any] = lambda _: None) -> type[nn.Module]:
    """A module class with two linear layers, a dropout and this forward."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.drop = nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.3)
            init(self)

    Block.forward = forward
    return Block


class Loop(nn.Module):
    """A loop over blocks that hands each of them the other arguments; what they return besides the stream is
    collected.
    """

    def __init__(self, kind: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        sides = []
        for b in self.blocks:
            out = b(x, *args, **kwargs)
            x, *side = out if isinstance(out, tuple) else (out,)
            sides.append(side)
        return x, sides


def stack(forward: Callable[..., Any], init: Callable[[nn.Module], Any] = lambda _: None, depth: int = 3) -> Loop:
    torch.manual_seed(0)
    return Loop(block(forward, init), depth).double()


def pre_norm(self: nn.Module, x: Tensor) -> Tensor:
    return x + self.drop(self.g(self.f(x).tanh()))


class Residual(nn.Module):
    """x + F(x), and nothing after the sum."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x).tanh()


class ResidualMlp(nn.Module):
    """x + an MLP that widens ``factor`` times."""

    def __init__(self, width=8, factor=1):
        super().__init__()
        self.branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, factor * width), nn.GELU(), nn.Linear(factor * width, width)
        )

    def forward(self, x):
        return x + self.branch(x)


def encoder(depth=3, width=16, heads=2, hidden=32, *, dropout=0.1, norm_first=True, **options):
    """Transformer layers: two units each. Inputs: (batch, tokens, width)."""
    layer = nn.TransformerEncoderLayer(
        width, heads, hidden, dropout=dropout, norm_first=norm_first, batch_first=True, **options
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def transformer_blocks(depth=6, dropout=0.1):
    """Transformer layers that differ in their weights. Inputs: (batch, tokens, 32)."""
    return Blocks(
        lambda: nn.TransformerEncoderLayer(32, 4, 128, dropout=dropout, batch_first=True, norm_first=True), depth
    ).train()
