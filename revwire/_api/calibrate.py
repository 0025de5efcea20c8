"""`calibrate`: fit what couplings predict to examples, unit by unit, in the rewired network."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from revwire._api.of_first import of_first
from revwire._api.schedule import recosted
from revwire._budget.progress import Progress
from revwire._capture.arguments import as_call
from revwire._errors import CalibrationWarning, CouplingError
from revwire._forwards.converted import converted
from revwire._runtime.chain import Chain, observed
from revwire._runtime.observer import Inputs, Observer
from revwire._structures import tensors_in
from revwire._surroundings.as_found import left_as_found
from revwire.couplings import BY_PATTERN
from revwire.couplings.base import MOST_BITS, Coupling, Move
from revwire.couplings.innovation import Innovation
from revwire.couplings.ridge import Moments, missed

PERTURBATION = 0.05
"""Where ε is to be chosen: how far the point of a branch may be from its stream, relative to what varies of the stream
from row to row.
"""


_MOST_ROWS = 1 << 15
"""Of a state of one example; larger ones are thinned out."""


_HELD_OUT = 4
"""One row of so many is held out: the last ones of each example."""


_FEWEST_ROWS = 32


_FEWEST_VALUES = 16
"""Integers of a smaller range are classes or masks."""


_EVEN = 1.15
"""The variance of how often each integer comes, over its mean: 1 where they are drawn evenly, and more in text."""


Key = tuple[int, int]
"""A chain and a place in it."""


def calibrate(model: nn.Module, examples: Iterable[Any]) -> None:
    """Fit the predictors of the ``innovation`` couplings of a converted model to examples, and choose ε where none was
    given.

    The model runs once on each example, without gradients and in the mode that it is in, and is left as it was found.
    Each unit's predictor is fitted to all examples so far, and used at once, so that those behind it see what they will
    see in training. A quarter of each example is held out: it tells what is predicted (`revwire.report`), and chooses
    ε. May be called again between steps, as weights move.

    Args:
        model: converted with ``coupling="innovation"``, or ``"innovation:1/2"`` ...
        examples: of real data, each as `convert` takes one: a batch or two will do. In a process group all processes
            take the predictors of the first.

    Warns:
        CalibrationWarning: the examples are noise, or constant, or too small. Those units run under ``bdia``, in the
            variables of this coupling, until they are calibrated with others.

    Raises:
        CouplingError: the model has no such coupling, or there are no examples.
        ConversionError: the model is not converted.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> x = torch.sin(torch.linspace(0, 9, 64).view(1, -1, 1) * torch.arange(1, 17)).repeat(4, 1, 1)
        >>> net = revwire.convert(net, x, coupling="innovation:1/2", rewire="everywhere")  # calibrates with x alone
        >>> revwire.calibrate(net, [x, -x])
    """
    chains = [c for c in converted(model).chains if any(isinstance(k, Innovation) for k in c.couplings)]
    if not chains:
        raise CouplingError(
            f"{type(model).__name__}: got a model without a coupling that predicts; expected one that was converted "
            "with coupling='innovation'; or call revwire.set_coupling(model, 'innovation') first"
        )
    many = [] if isinstance(examples, (Tensor, Mapping)) else list(examples)
    if not many:
        got = "one example" if isinstance(examples, (Tensor, Mapping)) else "no examples"
        raise CouplingError(f"calibrate: got {got}; expected an iterable of at least one: [example]")
    fitter, refused = _Fitter(), _refused(many)
    if not refused:
        progress = Progress(len(many), "calibrating, example")
        for example in many:
            progress.advance()
            call = as_call(example)
            with progress, left_as_found(model, example), torch.no_grad(), observed(chains, fitter):
                model(*call.args, **call.kwargs)
        refused = fitter.refused()
    if refused:
        warnings.warn(
            f"{type(model).__name__}: got {refused} to calibrate with; expected a few batches of real data "
            "(calibrate=...), as predictors that were fitted to less are worse than none. Until "
            "revwire.calibrate(model, examples) is called with some, its units run as under 'bdia'",
            CalibrationWarning,
            stacklevel=2,
        )
    plan = converted(model).plan
    found = [
        [_Fitter.fallback(c, u.pattern) if refused else fitter.coupling(chain, i) for i, (c, u) in enumerate(pairs)]
        for chain, planned in zip(converted(model).chains, plan.chains, strict=True)
        for pairs in [[*zip(chain.couplings, planned.units, strict=True)]]
    ]
    for chain, couplings in zip(converted(model).chains, of_first(lambda: found) or found, strict=True):
        chain.couplings = tuple(couplings)
    recosted(model)


@dataclass
class _Fit:
    """Of one place in a chain: what is known of it.

    Attributes:
        missed, whole, spread: of held-out rows, the newest examples count most: the squares of what the predictor
            missed, of what it was to predict, and of the state around its mean.
    """

    moments: Moments
    dim: int
    coupling: Innovation
    missed: float = 0.0
    whole: float = 0.0
    spread: float = 0.0

    def take(self, y: Tensor, z: Tensor) -> None:
        """Take up a state, and the point of the branch before it."""
        rows, targets = _rows(y, self.dim), _rows(y - z, self.dim)
        cut = len(rows) - len(rows) // _HELD_OUT
        self.moments.add(rows[:cut], targets[:cut])
        p = self.moments.fitted(self.dim)
        held = rows[cut:]
        figures = *missed(p, held, targets[cut:]), float((held - held.mean(0)).square().sum())
        self.missed, self.whole, self.spread = (
            old / 2 + new for old, new in zip((self.missed, self.whole, self.spread), figures, strict=True)
        )
        self.moments.add(held, targets[cut:])
        share = 1 - self.missed / max(self.whole, 1e-30)
        p = replace(p, predicted=share)
        self.coupling = replace(self.coupling, map=p if share > 0 else None, chosen=self._epsilon())

    def _epsilon(self) -> float:
        """The one that was asked for; else the largest that moves no point too far."""
        if self.coupling.epsilon is not None:
            return self.coupling.epsilon
        rest = (min(self.missed, self.whole) / max(self.spread, 1e-30)) ** 0.5
        return float(next((2.0**-m for m in range(MOST_BITS) if rest * 2.0**-m <= PERTURBATION), 2.0**-MOST_BITS))


class _Fitter(Observer):
    """Fits a predictor whenever a unit has run, and lets the next one run by it."""

    def __init__(self) -> None:
        self.fits: dict[Key, _Fit] = {}
        self.inputs: Inputs

    def on_inputs(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def on_move(self, chain: object, place: int, y: Tensor, z: Tensor) -> Move | None:
        assert isinstance(chain, Chain)
        coupling = chain.couplings[place]
        if not isinstance(coupling, Innovation):
            return None
        fit = self.fits.get((id(chain), place))
        if fit is None:
            dim = channels_of(y, self.inputs.unit.modules(self.inputs.host))
            if dim is None or y.numel() < _FEWEST_ROWS * y.shape[dim]:
                return None
            fit = self.fits[id(chain), place] = _Fit(Moments(y.shape[dim]), dim, coupling)
        fit.take(y, z)
        return fit.coupling.move

    def coupling(self, chain: Chain, place: int) -> Coupling:
        """What was found for a place; else what it has."""
        fit = self.fits.get((id(chain), place))
        if fit is not None:
            return fit.coupling
        coupling, before = chain.couplings[place], self.fits.get((id(chain), place - 1))
        if (
            isinstance(coupling, Innovation) and before is not None
        ):  # the last one moves nothing: it is named as the rest
            return replace(coupling, map=None, chosen=before.coupling.chosen)
        return coupling

    def refused(self) -> str:
        """Why what was seen is no ground for predictors; nothing where it is."""
        if not self.fits:
            return f"examples with fewer than {_FEWEST_ROWS} rows of channels"
        if sum(fit.coupling.map is None for fit in self.fits.values()) * 2 > len(self.fits):
            return "examples of which predictors tell nothing about a part that was held out"
        return ""

    @staticmethod
    def fallback(coupling: Coupling, pattern: str) -> Coupling:
        """The scheme that ``bdia`` is, in these variables."""
        if not isinstance(coupling, Innovation):
            return coupling
        return replace(coupling, map=None, chosen=-BY_PATTERN[pattern].coefficients.b)


def _rows(x: Tensor, dim: int) -> Tensor:
    """A state as rows of channels."""
    rows = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    return rows[:: -(-len(rows) // _MOST_ROWS)]


def channels_of(x: Tensor, modules: Iterable[nn.Module]) -> int | None:
    """The dimension of a state that holds its channels: whose size the parameters of its branch have most often; None
    where none has.

    It counts from the end where it is the last one: there may be more or fewer dimensions before it.
    """
    parameters = [p for module in modules for p in module.parameters()]
    counts = Counter(size for p in parameters for size in p.shape[:2])
    convolves = any(p.dim() > 2 for p in parameters)
    dims = range(1, x.dim()) if convolves else range(x.dim() - 1, 0, -1)  # of equal sizes, the more usual one
    best = max(dims, key=lambda d: counts[x.shape[d]], default=0)
    if not best or not counts[x.shape[best]]:
        return None
    return -1 if best == x.dim() - 1 else best


def _refused(examples: Sequence[Any]) -> str:
    """Why examples are no ground for predictors, as far as they tell by themselves; nothing where they may be."""
    tensors = [t for t in tensors_in(examples) if t.numel() >= 2 * _FEWEST_ROWS and t.dtype is not torch.bool]
    telling = [t.detach() for t in tensors if not _is_constant(t)]
    if tensors and not telling:
        return "constant examples"
    looks = [_is_noise(t) if t.is_floating_point() else _is_drawn(t) for t in telling]
    return "examples that look like random numbers" if True in looks and False not in looks else ""


def _is_constant(t: Tensor) -> bool:
    return bool((t == t.flatten()[0]).all())


def _is_noise(t: Tensor) -> bool:
    """Whether neighbours along no dimension have to do with each other."""
    for dim in range(1, t.dim()):
        if t.shape[dim] > 1:
            a, b = t.narrow(dim, 1, t.shape[dim] - 1).float(), t.narrow(dim, 0, t.shape[dim] - 1).float()
            a, b = a - a.mean(), b - b.mean()
            product = float((a * b).mean() / (a.std() * b.std()).clamp_min(1e-30))
            if abs(product) > max(0.05, 4 / a.numel() ** 0.5):
                return False
    return True


def _is_drawn(t: Tensor) -> bool | None:
    """Whether integers come as evenly as those drawn from their range; None where they are too few to tell."""
    _, counts = torch.unique(t, return_counts=True)
    size = int(t.max()) - int(t.min()) + 1
    mean = t.numel() / size
    squares = float(counts.double().square().sum()) - t.numel() * mean  # around the mean, absent ones too
    return None if size < _FEWEST_VALUES else squares / t.numel() < _EVEN
