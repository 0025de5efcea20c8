"""Conformance kit: the laws of couplings, and of converted models, as functions that raise `AssertionError`.

The tests of revwire are written with it; use it for a coupling of your own, or for a model that you convert:

    check_invertible(MyCoupling(), exact=True)
    check_gradients(revwire.convert(model, x), x)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revwire._api.convert import convert
from revwire._api.report import report
from revwire._api.revert import revert
from revwire._api.stored_activations import stored_activations
from revwire._api.verify import Check
from revwire._capture.arguments import as_call
from revwire._streams.base import Streams, stream_dtype
from revwire._streams.bits import pack_bits
from revwire._streams.fixed import FixedStreams
from revwire._streams.floats import FloatStreams
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.modes import deterministic_kernels as deterministic_kernels
from revwire._surroundings.randomness import accelerators_of, random_states
from revwire._torch import tree_leaves, tree_map
from revwire.couplings.base import Coupling
from revwire.measure import saved_bytes

Loss = Callable[[Any], Tensor]


Stored = Callable[[nn.Module], AbstractContextManager[None]]


def check_invertible(
    coupling: Coupling,
    *,
    exact: bool,
    units: int = 6,
    shape: tuple[int, ...] = (2, 3, 5),
    dtype: torch.dtype = torch.float32,
    tolerance: float = 0.0,
) -> float:
    """Law: the streams run forward through ``units`` steps with random branches, and back, arrive where they began.

    Args:
        coupling: the scheme.
        exact: fixed-point streams, which must arrive to the bit, or float streams.
        units: number of steps.
        shape, dtype: of the streams.
        tolerance: largest relative error allowed; leave it at 0 where ``exact``.

    Returns:
        The relative error that was measured.

    Example:
        >>> from revwire import Bdia
        >>> check_invertible(Bdia(1 / 8), exact=True)
        0.0
    """
    generator = torch.Generator().manual_seed(units)
    wide = stream_dtype(dtype)
    x, *branches = torch.randn(units + 1, *shape, generator=generator, dtype=wide)
    if exact:
        _ = coupling.kept_bits  # raises where there is no exact form
    streams: Streams = FixedStreams.for_range(2.0**units, wide) if exact else FloatStreams()
    start = streams.enter(x)
    previous, current = start, start
    kept = []
    for f in branches:
        rule = coupling.rule("residual", current)
        following, _, bits, *_ = streams.step(previous, streams.read(current), f.to(dtype), rule)
        kept.append((f.to(dtype), rule, bits))
        previous, current = current, following
        if coupling.move is not None:
            y, rule = streams.read(current), coupling.move.rule
            following, _, bits, *_ = streams.step(previous, y, coupling.move.value(y), rule)
            kept.append((None, rule, bits))
            previous, current = current, following
    for f, rule, bits in reversed(kept):
        x = streams.read(previous)
        if f is None:
            assert coupling.move is not None
            f = coupling.move.value(x)
        rebuilt = streams.unstep(current, x, f, rule, bits).state
        previous, current = rebuilt, previous
    error = max(_relative(previous, start), _relative(current, start))
    assert error <= tolerance, (
        f"{coupling.name}: rebuilt with relative error {error:.3g} after {units} units, not {tolerance:.3g}"
    )
    return error


def check_error_growth(coupling: Coupling) -> None:
    """Law: ``error_growth`` is 1 / min|λ| over the roots of λ² = aλ + b; of a scheme that moves the points of its
    branches, over the eigenvalues of both its steps, without the map.
    """
    steps = [coupling.coefficients[:2], *([(coupling.move.rule.a, coupling.move.rule.b)] if coupling.move else [])]
    matrices = [torch.tensor([[a, b], [1.0, 0.0]], dtype=torch.float64) for a, b in steps]
    both = matrices[0] if len(matrices) == 1 else matrices[1] @ matrices[0]
    smallest = float(torch.linalg.eigvals(both).abs().min())
    declared = coupling.error_growth
    assert abs(declared * smallest - 1) < 1e-9, f"{coupling.name}: error growth is {1 / smallest}, declared {declared}"


def check_consistent(coupling: Coupling) -> None:
    """Law: a + b = 1 and c = 1 + b, so that the rule integrates the residual flow of the plain network."""
    a, b, c = coupling.coefficients
    assert abs(a + b - 1) < 1e-12, f"{coupling.name}: a + b = {a + b}, expected 1"
    assert abs(c - 1 - b) < 1e-12, f"{coupling.name}: c = {c}, expected 1 + b = {1 + b}"


def check_kept_bits(coupling: Coupling, elements: int = 1000) -> int:
    """Law: a unit keeps ``kept_bits`` bits per element, packed. Returns the bytes that were kept for ``elements``
    elements.
    """
    packed = (
        pack_bits(torch.arange(elements, dtype=torch.int32), coupling.kept_bits).nbytes if coupling.kept_bits else 0
    )
    expected = -(-elements // 8) * coupling.kept_bits
    assert packed == expected, f"{coupling.name}: kept {packed} bytes for {elements} elements; expected {expected}"
    return packed


@dataclass(frozen=True)
class Step:
    """All that a training step computes, and all that it leaves behind.

    Attributes:
        outputs: the tensors in the model's output, detached.
        gradients: by name of the parameter; inputs are ``"input 0"``, ...
        buffers: by name, after the step.
        random_states: of the generators of the CPU and of the devices used, after the step.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random_states: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, inputs: Any, loss: Loss | None = None, *, seed: int = 0) -> Step:
        """Run one step on copies of the inputs. Gradients, buffers and random state are left as found.

        Args:
            model: any module.
            inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.
            loss: the model's output → scalar; by default a random projection of all floating-point outputs.
            seed: of the random numbers in the forward pass.
        """
        call = as_call(inputs)
        args, kwargs = tree_map(_own, (call.args, call.kwargs))
        with left_as_found(model, inputs, backward=True, attributes=False):  # a first call may convert the model
            torch.manual_seed(seed)
            output = model(*args, **kwargs)
            (loss or random_projection)(output).backward()  # type: ignore[no-untyped-call]
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            gradients.update({f"input {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None})
            buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
            outputs = [t.detach() for t in tree_leaves(output) if isinstance(t, Tensor)]
            return cls(outputs, gradients, buffers, list(random_states(accelerators_of(model.parameters())).values()))

    def assert_like(self, other: Step, *, tolerance: float = 0.0) -> None:
        """Equal to ``other``: to the bit, or gradients and outputs within a relative ``tolerance`` (of each tensor's
        norm).

        Which gradients exist, the random state, and counters must always agree.
        """
        assert self.gradients.keys() == other.gradients.keys(), (
            f"gradients of {set(self.gradients) ^ set(other.gradients)} are missing"
        )
        same = all(torch.equal(a, b) for a, b in zip(self.random_states, other.random_states, strict=True))
        assert same, "the random generator was left in another state"
        mine = {**{f"output {i}": t for i, t in enumerate(self.outputs)}, **self.gradients, **self.buffers}
        others = {**{f"output {i}": t for i, t in enumerate(other.outputs)}, **other.gradients, **other.buffers}
        for name, value in mine.items():
            error = _relative(value, others[name])
            assert error <= tolerance, f"{name}: relative difference {error:.3g}; expected at most {tolerance:.3g}"


def random_projection(output: Any) -> Tensor:
    """A scalar on which every element of every floating-point tensor in ``output`` has an influence of its own."""
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(t.shape, generator=generator).to(t) for t in leaves]
    return torch.stack([(t * w).sum().to(torch.float64) for t, w in zip(leaves, weights, strict=True)]).sum()


def check_gradients(
    model: nn.Module,
    inputs: Any,
    loss: Loss | None = None,
    *,
    tolerance: float = 0.0,
    stored: Stored = stored_activations,
) -> Step:
    """Law: a reversible step equals the same step with stored activations: outputs, gradients, buffers, random state.

    Args:
        model: a converted model.
        inputs, loss: as for `Step.of`.
        tolerance: relative, for gradients in float mode; 0 means to the bit.
        stored: the context manager in which the model runs with stored activations.

    Example:
        >>> import revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> x = torch.randn(2, 5, 16)
        >>> step = check_gradients(revwire.convert(net, x), x)
    """
    reversible = Step.of(model, inputs, loss)
    with stored(model):
        reversible.assert_like(Step.of(model, inputs, loss), tolerance=tolerance)
    return reversible


def check_modes(model: nn.Module, inputs: Any) -> None:
    """Law: with gradients, under ``no_grad`` and under ``inference_mode`` the outputs are the same to the bit."""
    call = as_call(inputs)
    outputs = []
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with left_as_found(model, inputs, backward=True, attributes=False), mode():
            torch.manual_seed(0)
            outputs.append([t for t in tree_leaves(model(*call.args, **call.kwargs)) if isinstance(t, Tensor)])
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True)), "outputs depend on the grad mode"


def check_revert(model: nn.Module, inputs: Any, **options: Any) -> None:
    """Law: ``revert(convert(model))`` is the identity: class, modules, parameters, keys, and outputs to the bit.

    Args:
        model: a model that is not converted; left so.
        inputs: as for `convert`.
        options: passed to `convert`.
    """
    before, attributes = Step.of(model, inputs), {n: dict(vars(m)) for n, m in model.named_modules()}
    assert revert(convert(model, inputs, **options)) is model, "revert returned another object"
    for name, module in model.named_modules():
        assert vars(module).keys() == attributes[name].keys(), (
            f"{name}: attributes {set(vars(module)) ^ set(attributes[name])} changed"
        )
        same = all(vars(module)[k] is v or vars(module)[k] == v for k, v in attributes[name].items())
        assert same, f"{name}: an attribute has another value"
    Step.of(model, inputs).assert_like(before)


def check_saved_bytes(
    model: nn.Module, inputs: Any, *, stored: Stored = stored_activations, slack: float = 0.1, per_unit: int = 8192
) -> tuple[int, int]:
    """Law: between forward and backward a converted model holds less, by what its plan promises for these inputs.

    Args:
        model: a converted model.
        inputs: of the shapes of the example at conversion.
        stored: as for `check_gradients`.
        slack: the part of the promise that may be missing.
        per_unit: bytes that each unit may keep besides: a fingerprint, and the random state where it draws (5 kB).

    Returns:
        Bytes held (reversible, stored activations).
    """
    call = as_call(inputs)
    with left_as_found(model, inputs, backward=True, attributes=False):
        held = saved_bytes(lambda: model(*call.args, **call.kwargs))
        with stored(model):
            before = saved_bytes(lambda: model(*call.args, **call.kwargs))
    plan = report(model)
    promised = sum(chain.bytes_saved for chain in plan.chains)
    enough = (1 - slack) * promised - per_unit * len(plan.units)
    assert before - held >= enough, f"holds {held} bytes, stored activations {before}; {promised} fewer were promised"
    return held, before


def saved_by_autograd(fn: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that autograd is asked to save while ``fn`` runs, parameters not counted.

    Example:
        >>> x = torch.zeros(1000, requires_grad=True)
        >>> saved_by_autograd(lambda: x.exp().exp())
        8000
    """
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter) and not isinstance(t._base, nn.Parameter):
            alive.append(t)  # so that no storage is counted under the address of one that is gone
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = fn()
    del result
    return sum(sizes.values())


FLOAT_TOLERANCE = 1e-3
"""Relative error at which float streams still hold: states within 1e-4 by the library's own limit, gradients ten times
that.
"""


def holds(model: nn.Module, check: Check) -> bool:
    """Whether what `revwire.verify` measured of a model is what its conversion promised.

    Where all chains are in exact streams, they must be exact to the bit; where one is in floating point, relative
    errors up to `FLOAT_TOLERANCE` pass.

    Raises:
        ConversionError: the model is not converted.

    Example:
        >>> import revwire
        >>> layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True), torch.randn(2, 5, 16)
        >>> model = revwire.convert(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), x)
        >>> holds(model, revwire.verify(model, x))
        True
    """
    if all(chain.exact for chain in report(model).chains):
        return check.bit_exact
    return max(check.reconstruction_error, check.gradient_error) <= FLOAT_TOLERANCE


def _relative(got: Tensor, true: Tensor) -> float:
    """0 for equal bits, else the norm of the difference over the norm of the true tensor (but never 0)."""
    if got.shape != true.shape or got.dtype != true.dtype:
        return float("inf")
    if torch.equal(got, true):
        return 0.0
    tiny = torch.finfo(torch.float64).tiny
    error = float((got.double() - true.double()).norm() / true.double().norm().clamp_min(tiny))
    return error if error > 0 else float("inf")  # NaN never equals


def _own(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return copy.copy(value)
    return value.detach().clone().requires_grad_(value.requires_grad)
