"""`verify`: measure on a converted model what the library promises: rebuilt states, and gradients, against stored
activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revwire._api.report import report
from revwire._api.stored_activations import stored_activations
from revwire._budget.progress import Progress
from revwire._capture.arguments import as_call, fresh_arguments
from revwire._errors import ConversionError
from revwire._forwards.base import own_forwards
from revwire._forwards.converted import chains_of, converted
from revwire._runtime.chain import observed
from revwire._runtime.observer import Key, Observer, Rebuilt
from revwire._runtime.range import ranges_held
from revwire._structures import tensors_in
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.modes import deterministic_kernels

_REPEATS = 32
"""Runs with stored activations that tell a gradient that varies by itself from one that was rebuilt wrongly."""


@dataclass(frozen=True)
class UnitCheck:
    """One unit of one forward pass: the largest error of its rebuilt input, relative to the largest true value."""

    path: str
    reconstruction_error: float


@dataclass(frozen=True)
class Check:
    """What `verify` measured.

    Attributes:
        bit_exact: every rebuilt state, the outputs and every gradient equal those of stored activations to the bit.
        reconstruction_error: largest relative error of a rebuilt state.
        gradient_error: largest relative error of a gradient (each tensor by its own largest magnitude).
        output_equal: outputs equal to the bit.
        function_change: difference of the outputs to those of the original network, relative to their size (of the
            vectors of all outputs, in the mode that the model is in; with the same random numbers, so units in chunks
            run whole for it). A measure, no fault.
        units: per unit, in the order of the backward pass.
        inexact: names of the parameters and inputs whose gradients differ.
        unstable: names of those whose gradients differ between runs with stored activations too (a kernel of the
            network itself is not deterministic); they are not compared.
        original_error: what the rewiring itself does to the function: largest relative difference of an output (each by
            its own largest magnitude; infinite where other outputs come) between the rewired network under the ordinary
            rule, x + F(x), and the model's own forward, with the same random numbers, on the example and on all further
            inputs. 0.0: equal to the bit. Some rounding is usual, as streams are wider than 16 bits, and a block that
            is one unit is x + (block(x) - x); more than that is a fault.
    """

    bit_exact: bool
    reconstruction_error: float
    gradient_error: float
    output_equal: bool
    units: tuple[UnitCheck, ...]
    inexact: tuple[str, ...]
    unstable: tuple[str, ...] = ()
    function_change: float = 0.0
    original_error: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The check as plain data (JSON-ready)."""
        return asdict(self)

    def __str__(self) -> str:
        verdict = "bit-exact" if self.bit_exact else "not bit-exact"
        return (
            f"{verdict}: {len(self.units)} states rebuilt, largest error {self.reconstruction_error:.2g}; "
            f"gradients differ from stored activations by at most {self.gradient_error:.2g}; the output differs from "
            f"the original network's by {self.function_change:.2%} (by {self.original_error:.2g} under its own rule)"
            + (f" ({len(self.inexact)} tensors: {', '.join(self.inexact[:3])} ...)" if self.inexact else "")
            + (
                f"; not compared, as they vary with stored activations too: {', '.join(self.unstable)}"
                if self.unstable
                else ""
            )
        )


class _Witness(Observer):
    """Keeps every state that a tape drops, and compares it with the one that is rebuilt."""

    def __init__(self) -> None:
        self.states: dict[Key, Tensor] = {}
        self.units: list[UnitCheck] = []
        self.equal = True

    def on_drop(self, key: Key, state: Tensor) -> None:
        self.states[key] = state.clone()

    def on_rebuild(self, rebuilt: Rebuilt) -> None:
        true, streams = self.states.pop(rebuilt.key), rebuilt.streams
        self.equal = self.equal and torch.equal(true, rebuilt.state)
        error = relative_error(streams.read(rebuilt.state), streams.read(true))
        self.units.append(UnitCheck(rebuilt.path, error))


def verify(model: nn.Module, example_inputs: Any, *, further_inputs: Iterable[Any] = ()) -> Check:
    """Run one forward and backward reversibly, and one with stored activations, and compare; and compare the rewired
    network under the ordinary rule with the model's own forward.

    The loss is a fixed random projection of all floating-point outputs. Both runs use deterministic kernels where
    PyTorch has them. The model's mode is used as it is; its gradients, buffers, and the random state are left as found.

    Args:
        model: a converted model.
        example_inputs: as for `convert`.
        further_inputs: a list of more of them, on which the rewired network is compared with the model's own forward
            too: other sizes, other values, other arguments.

    Raises:
        ConversionError: the model is not converted, or ``further_inputs`` is no list of inputs.
        ReconstructionError: the run itself detected that a state was rebuilt wrongly.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> x = torch.randn(2, 5, 16)
        >>> revwire.verify(revwire.convert(net, x), x).bit_exact
        True
    """
    report(model)
    if isinstance(further_inputs, (Tensor, Mapping)):
        raise ConversionError(
            f"verify: got {type(further_inputs).__name__} as further_inputs; expected a list of inputs, each as for "
            "convert; pass [inputs]"
        )
    further, witness = list(further_inputs), _Witness()
    progress = Progress(4 + len(further), "verifying, run")
    ranges = ranges_held(chain.reach for chain in chains_of(model))
    with deterministic_kernels(), left_as_found(model, example_inputs, backward=True), ranges, progress:
        progress.advance()
        with stored_activations(model):
            true_out, true_grads = _step(model, example_inputs)
        progress.advance()
        with observed(chains_of(model), witness):
            out, grads = _step(model, example_inputs)
        with stored_activations(model):
            unstable = _unstable(model, example_inputs, grads, true_grads)
            progress.advance()
            with _whole(model):
                whole = _outputs(model, example_inputs)
        progress.advance()
        original = _original_outputs(model, example_inputs)
        wrong = [_largest_error(*original)]
        wrong += [_largest_error(*_original_outputs(model, inputs)) for inputs in _counted(further, progress)]
    same_out = len(out) == len(true_out) and all(torch.equal(a, b) for a, b in zip(out, true_out, strict=True))
    compared = {name: true for name, true in true_grads.items() if name not in unstable}
    errors = {name: relative_error(grads[name], true) for name, true in compared.items()}
    inexact = tuple(name for name, true in compared.items() if not torch.equal(grads[name], true))
    return Check(
        bit_exact=witness.equal and same_out and not inexact,
        reconstruction_error=max((u.reconstruction_error for u in witness.units), default=0.0),
        gradient_error=max(errors.values(), default=0.0),
        output_equal=same_out,
        units=tuple(witness.units),
        inexact=inexact,
        unstable=unstable,
        function_change=_distance(whole, original[0]),
        original_error=max(wrong),
    )


def _counted(inputs: list[Any], progress: Progress) -> Iterator[Any]:
    for one in inputs:
        progress.advance()
        yield one


def _unstable(
    model: nn.Module, example_inputs: Any, grads: dict[str, Tensor], true: dict[str, Tensor]
) -> tuple[str, ...]:
    """Where gradients differ: the names of those that also differ between runs with stored activations.

    Some kernels rarely differ from themselves, so runs are repeated until each difference is explained, or `_REPEATS`
    times.
    """
    left = {name for name, g in true.items() if not torch.equal(grads[name], g)}
    found = set[str]()
    for _ in range(_REPEATS):
        if not left - found:
            break
        again = _step(model, example_inputs)[1]
        found |= {name for name, g in true.items() if not torch.equal(again[name], g)}
    return tuple(name for name in true if name in found)


def relative_error(got: Tensor, true: Tensor) -> float:
    """Largest difference, relative to the largest true magnitude."""
    if not true.numel():
        return 0.0
    scale = true.detach().double().abs().amax().clamp_min(torch.finfo(torch.float64).tiny)
    return float((got.detach().double() - true.detach().double()).abs().amax() / scale)


def _distance(got: list[Tensor], true: list[Tensor]) -> float:
    """Norm of the difference of all outputs, relative to that of the true ones; infinite where other outputs come."""
    if [t.shape for t in got] != [t.shape for t in true]:
        return float("inf")
    change, size = (
        sum(float(t.double().square().sum()) for t in ts)
        for ts in ([a - b for a, b in zip(got, true, strict=True)], true)
    )
    return float((change / size) ** 0.5) if size else float(change > 0)


def _largest_error(got: list[Tensor], true: list[Tensor]) -> float:
    """Largest `relative_error` of outputs; infinite where other outputs come."""
    if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in true]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(got, true, strict=True) if not torch.equal(a, b)]
    return max((error if (error := relative_error(a, b)) >= 0 else float("inf") for a, b in pairs), default=0.0)


def _original_outputs(model: nn.Module, inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the rewired network under the ordinary rule, and of the model's own forward."""
    with _original(model):
        rewired = _outputs(model, inputs)
    with own_forwards(model):
        return rewired, _outputs(model, inputs)


@contextmanager
def _original(model: nn.Module) -> Iterator[None]:
    chains = chains_of(model)
    try:
        for chain in chains:
            chain.original = True
        yield
    finally:
        for chain in chains:
            chain.original = False


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """No unit runs in chunks, and no core in parts: they draw random numbers in another order."""
    state = converted(model)
    cuts = [chain.cuts for chain in state.chains]
    counts = [parted.forward.parting.count for parted in state.parted]
    try:
        for chain in state.chains:
            chain.cuts = None
        for parted in state.parted:
            parted.forward.parting.count = 1
        yield
    finally:
        for chain, cut in zip(state.chains, cuts, strict=True):
            chain.cuts = cut
        for parted, count in zip(state.parted, counts, strict=True):
            parted.forward.parting.count = count


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The floating-point outputs of one forward, with gradients enabled."""
    call = as_call(example_inputs)
    args, kwargs = fresh_arguments((call.args, call.kwargs))
    with left_as_found(model, (args, kwargs)), torch.enable_grad():
        return [t.detach() for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]


def _step(model: nn.Module, example_inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One step: (floating-point outputs, gradients by name, those of the inputs that require them included)."""
    call = as_call(example_inputs)
    args, kwargs = fresh_arguments((call.args, call.kwargs))
    inputs = [t for t in tensors_in((args, kwargs)) if t.requires_grad]
    for t in inputs:
        t.retain_grad()
    with left_as_found(model, (args, kwargs), backward=True), torch.enable_grad():
        outputs = [t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point()]
        loss = sum(((t * _projection(t)).sum() for t in outputs if t.requires_grad), torch.zeros(()))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads.update({f"input {i}": t.grad for i, t in enumerate(inputs) if t.grad is not None})
    return [t.detach() for t in outputs], grads


def _projection(t: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(t.numel())
    return torch.randn(t.shape, generator=generator).to(t)
