"""The engine: checkpointing whose inputs are rebuilt instead of stored.

Note [Two kinds of graph node]
    The *step* (`_Step`) is an autograd node that computes x_{k+1} and saves nothing. Its backward is linear in the
    gradient, and it is the place where the tape moves one unit back. The *branch* keeps its ordinary autograd graph;
    what that graph saved is replaced by `_Placeholder`s, and refilled by the one recompute that the step needs anyway.
    So gradients are ordinary autograd's, parameters are seen by autograd where they are used, and a whole chain never
    holds more than one unit's activations.

Note [Who owns what]
    Graph nodes own the tape; the tape owns states, kept bits and *detached* extra inputs, and never a tensor with a
    ``grad_fn``: a cycle through autograd's C++ nodes would never be collected. The float tensors that carry gradients
    from unit to unit hang on the unit's output (`Link`), and die with it.

Note [Which backward is this]
    A tape serves several backward passes (``retain_graph``). Each has an id; the cursor of a new one starts from the end
    of the chain. A pass that does not retain the graph takes the end state away with it and frees records as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revwire._errors import RangeError, ReconstructionError, UnsupportedTransformError
from revwire._numerics import Streams
from revwire._replay import Surroundings, buffers_kept

if TYPE_CHECKING:
    from revwire._module import Chain, Unit

TensorMeta = tuple[torch.Size, torch.dtype, torch.device]


def _meta(t: Tensor) -> TensorMeta:
    return t.shape, t.dtype, t.device


@dataclass
class _Placeholder:
    """Stands in an autograd graph for a tensor that a branch saved."""

    tape: Tape
    position: int
    index: int


@dataclass
class UnitRecord:
    """What is kept of one unit's forward: no activation, only what a recompute needs."""

    unit: Unit
    host: nn.Module
    dtype: torch.dtype
    input_requires_grad: bool
    extras: tuple[Any, ...]
    extra_versions: tuple[int, ...]
    weight_versions: dict[int, int]
    surroundings: Surroundings
    fingerprint: Tensor
    bits: Tensor | None = None
    saved: list[TensorMeta] = field(default_factory=list)
    cache: dict[int, tuple[Tensor, int]] = field(default_factory=dict)


@dataclass
class ViewRecord:
    """A relayout of the stream between two units (a reshape or a permutation): undone without arithmetic."""

    view: Callable[[Tensor], Tensor]
    before: Tensor  # a meta tensor with the layout before the view

    def undo(self, state: Tensor) -> Tensor:
        out = torch.empty_like(self.before, device=state.device)
        self.view(out).copy_(state)
        return out


@dataclass
class _Cursor:
    """Where a backward pass stands: the state (x_{position-1}, x_position)."""

    task: int
    position: int
    previous: Tensor | None
    current: Tensor | None


class Tape:
    """One forward pass through one chain, and the way back.

    Args:
        chain: the chain, for its name in errors and its monitor.
        streams: the arithmetic, scaled for this forward.
        state: the state of the chain's input, in both streams.
        first: index of the unit at which this pass entered the chain.
        keep: whether a backward may come (a record is kept per unit) or not (``no_grad``: the plain loop).
    """

    def __init__(self, chain: Chain, streams: Streams, state: Tensor, *, first: int = 0, keep: bool) -> None:
        self.chain = chain
        self.streams = streams
        self.state: tuple[Tensor, Tensor] | None = (state, state)
        self.end_versions = (0, 0)
        self.keep = keep
        self.position = first
        self.progress = 0
        self.records: list[UnitRecord | ViewRecord | None] = []
        self.cursor: _Cursor | None = None

    # -- forward ---------------------------------------------------------------------------------------------------

    def branch(self, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
        """Evaluate F_k(x_k); if a backward may come, with placeholders for what autograd saves."""
        if not self.keep or self.chain.stored:
            return unit.branch(host, x, *extras)
        version = x._version
        record = self._record(unit, host, x, extras)
        with saved_tensors_hooks(self._packer(record), _unpack):
            f, sides = unit.branch(host, x, *extras)
        if x._version != version:
            raise self._fault(record, "its branch wrote to its own input in place", "a branch that leaves its input as it is")
        record.surroundings.settle()
        needed = f.requires_grad or x.requires_grad or any(isinstance(s, Tensor) and s.requires_grad for s in sides)
        self.records.append(record if needed or any(self.records) else None)
        return f, sides

    def _record(self, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> UnitRecord:
        tensors = [e for e in extras if isinstance(e, Tensor)]
        assert self.state is not None
        return UnitRecord(
            unit=unit,
            host=host,
            dtype=x.dtype,
            input_requires_grad=x.requires_grad,
            extras=tuple(e.detach().requires_grad_(e.requires_grad) if isinstance(e, Tensor) else e for e in extras),
            extra_versions=tuple(e._version for e in tensors),
            weight_versions={id(p): p._version for m in unit.modules(host) for p in m.parameters()},
            surroundings=Surroundings.capture([x, *tensors]),
            fingerprint=self.streams.fingerprint(self.state[0]),
        )

    def _packer(self, record: UnitRecord) -> Callable[[Tensor], _Placeholder]:
        position = len(self.records)

        def pack(t: Tensor) -> _Placeholder:
            record.saved.append(_meta(t))
            return _Placeholder(self, position, len(record.saved) - 1)

        return pack

    def step(self, x: Tensor, f: Tensor, unit: Unit) -> Tensor:
        """Advance both streams by one unit; returns the float value of x_{k+1}."""
        assert self.state is not None
        previous, current = self.state
        following, bits = self.streams.step(previous, current, x, f, unit.rule(self.chain.coupling))
        wrong = self.streams.check_range(following)
        if wrong:
            raise RangeError(
                f"{unit.path} ({self.chain.name}): got a value that is not finite, or a {wrong}; expected the streams to stay "
                f"within 2^5 times the range they were scaled for; convert with an example whose values are of the "
                f"magnitude you train on, lower the learning rate, or pass exact=False"
            )
        if self.chain.monitor:
            self.chain.monitor.forward(self, len(self.records) - 1, previous)
        record = self.records[-1] if self.records else None
        if isinstance(record, UnitRecord):
            record.bits = bits
        self.state = (current, following)
        self.position += 1
        self.progress += 1
        out = self.streams.read(following)
        if self.keep:
            self.end_versions = (current._version, following._version)
        return out

    def relayout(self, view: Callable[[Tensor], Tensor]) -> bool:
        """Apply a view to both streams; False (and nothing done) if it would have to copy."""
        assert self.state is not None
        previous, current = self.state
        moved = view(previous), view(current)
        if any(m.untyped_storage().data_ptr() != s.untyped_storage().data_ptr() for m, s in zip(moved, self.state, strict=True)):
            return False
        if self.keep and not self.chain.stored:
            self.records.append(ViewRecord(view, torch.empty_like(current, device="meta")))
        self.state = moved
        self.progress += 1
        self.end_versions = (moved[0]._version, moved[1]._version) if self.keep else (0, 0)
        return True

    # -- backward --------------------------------------------------------------------------------------------------

    def saved(self, position: int, index: int) -> Tensor:
        """The tensor behind a placeholder, recomputed if need be."""
        record = self._unit(position)
        if index not in record.cache or self._task() != getattr(self.cursor, "task", None):
            self._refill(position)
        if index not in record.cache:
            raise self._fault(record, f"its recompute saved {len(record.cache)} tensors", f"{len(record.saved)} as in forward")
        tensor, version = record.cache.pop(index)
        if tensor._version != version:
            raise self._fault(record, "a tensor needed for its gradient was modified in place", "no in-place write")
        return tensor

    def rewind(self, position: int) -> None:
        """Move the cursor back over the unit at ``position``: recompute it, invert it, check what was rebuilt."""
        if torch.is_grad_enabled():
            raise UnsupportedTransformError(
                f"{self.chain.name}: got create_graph=True (a double backward); expected a first-order backward; compute it "
                "inside `with revwire.stored_activations(model):`, or on `revwire.revert(model)`"
            )
        if not self._at(position):  # where a side output already asked for this unit, the tape has moved
            self._move_to(position + 1)
            self._step_back()

    def _refill(self, position: int) -> None:
        if self._at(position) and self.cursor is not None and self.cursor.current is not None:
            self._recompute(self._unit(position), self.cursor.current)  # asked for a second time in one pass
        else:
            self.rewind(position)

    def _move_to(self, position: int) -> None:
        task = self._task()
        if self.cursor is None or self.cursor.task != task or self.cursor.position < position:
            self._restart(task)
        while self.cursor is not None and self.cursor.position > position:
            self._step_back()

    def _restart(self, task: int) -> None:
        if self.state is None:
            raise ReconstructionError(
                f"{self.chain.name}: got a second backward through a chain whose state was freed by the first; "
                "pass retain_graph=True to the first one"
            )
        previous, current = self.state
        if (previous._version, current._version) != self.end_versions:
            raise ReconstructionError(
                f"{self.chain.name}: got an end of the chain that was written in place after the forward pass; expected it "
                "unchanged; write to a clone of the chain's output, or convert with exact=True"
            )
        for record in self.records:
            if isinstance(record, UnitRecord):
                record.cache.clear()
        self.cursor = _Cursor(task, len(self.records), previous, current)
        if not self._retained():
            self.state = None
            if task != -1:
                torch.autograd.Variable._execution_engine.queue_callback(self._release)

    def _release(self) -> None:
        """At the end of a backward pass that does not retain the graph."""
        self.cursor = None
        self.records = [None] * len(self.records)

    def _step_back(self) -> None:
        cursor = self.cursor
        assert cursor is not None and cursor.previous is not None and cursor.current is not None
        position = cursor.position - 1
        record = self.records[position]
        if isinstance(record, ViewRecord):
            cursor.previous, cursor.current = record.undo(cursor.previous), record.undo(cursor.current)
        else:
            record = self._unit(position)
            x, f = self._recompute(record, cursor.previous)
            rebuilt = self.streams.unstep(cursor.current, x, f, record.unit.rule(self.chain.coupling), record.bits)
            self._check(record, position, rebuilt)
            cursor.previous, cursor.current = rebuilt, cursor.previous
        cursor.position = position
        if not self._retained() and position + 1 < len(self.records):
            self.records[position + 1] = None

    def _check(self, record: UnitRecord, position: int, rebuilt: Tensor) -> None:
        if self.chain.monitor:
            self.chain.monitor.backward(self, position, rebuilt)
        error = self.streams.differ(record.fingerprint, self.streams.fingerprint(rebuilt))
        if error is not None:
            raise self._fault(record, f"its rebuilt input differs by {error:.3g}", "the input that the forward pass saw")

    def _recompute(self, record: UnitRecord, state: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the branch again, as in forward; fills the record's cache. Returns (x_k, F_k(x_k)), detached."""
        self._check_versions(record)
        wide = self.streams.read(state)
        x = wide.to(record.dtype).detach().requires_grad_(record.input_requires_grad)
        version = x._version
        cache: dict[int, tuple[Tensor, int]] = {}

        def pack(t: Tensor) -> None:
            index = len(cache)
            if index >= len(record.saved) or record.saved[index] != _meta(t):
                raise self._fault(record, f"its recompute saved another tensor at {index}: {_meta(t)}", "the same as in forward")
            cache[index] = (t.detach(), t._version)

        with (
            torch.enable_grad(),
            record.surroundings.restored(),
            buffers_kept(record.unit.modules(record.host)),
            saved_tensors_hooks(pack, _never),
        ):
            f, _ = record.unit.branch(record.host, x, *record.extras)
        if x._version != version:
            raise self._fault(record, "its branch wrote to its own input in place", "a branch that leaves its input as it is")
        if len(cache) != len(record.saved):
            raise self._fault(record, f"its recompute saved {len(cache)} tensors", f"{len(record.saved)} as in forward")
        record.cache = cache
        return wide, f.detach()

    def _check_versions(self, record: UnitRecord) -> None:
        tensors = [e for e in record.extras if isinstance(e, Tensor)]
        for tensor, version in zip(tensors, record.extra_versions, strict=True):
            if tensor._version != version:
                raise self._fault(record, "an extra input of it was modified in place", "no in-place write before backward")
        for module in record.unit.modules(record.host):
            for name, p in module.named_parameters():
                if record.weight_versions.get(id(p), p._version) != p._version:
                    raise self._fault(record, f"its weight {name!r} was modified in place", "the weights of the forward pass")

    def _fault(self, record: UnitRecord, got: str, expected: str) -> ReconstructionError:
        return ReconstructionError(
            f"{record.unit.path} ({self.chain.name}): between forward and backward, {got}; expected {expected}. Usual causes: weights, "
            "buffers or inputs changed before backward, a non-deterministic kernel (torch.use_deterministic_algorithms(True)), "
            "random numbers from a generator of the module's own. No gradient was computed; exclude the module "
            f"(convert(..., exclude=[{record.unit.path!r}])) or run under revwire.stored_activations(model)"
        )

    def _unit(self, position: int) -> UnitRecord:
        record = self.records[position]
        if not isinstance(record, UnitRecord):
            raise ReconstructionError(
                f"{self.chain.name}: got a backward through a unit whose record was freed; pass retain_graph=True to the first backward"
            )
        return record

    def _at(self, position: int) -> bool:
        cursor = self.cursor
        return cursor is not None and cursor.position == position and cursor.task == self._task()

    @staticmethod
    def _task() -> int:
        return int(torch._C._current_graph_task_id())  # -1 outside of a backward pass

    @classmethod
    def _retained(cls) -> bool:
        return cls._task() == -1 or bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _unpack(placeholder: _Placeholder) -> Tensor:
    return placeholder.tape.saved(placeholder.position, placeholder.index)


def _never(_: Any) -> Tensor:
    raise ReconstructionError("internal: the graph of a recompute was used; please report this")


class _Enter(torch.autograd.Function):
    """The chain's input as the streams hold it; rounding passes the gradient straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, streams: Streams, state: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return streams.read(state)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.dtype), None, None


class _Step(torch.autograd.Function):
    """x_{k+1} = a·x_k + b·x_{k-1} + c·F_k(x_k); see Note [Two kinds of graph node]."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, unit: Unit, previous: Tensor, current: Tensor, f: Tensor) -> Tensor:
        ctx.tape, ctx.rule, ctx.dtype = tape, unit.rule(tape.chain.coupling), f.dtype
        ctx.position = len(tape.records) - 1
        ctx.rewinds = tape.keep and not tape.chain.stored
        return tape.step(current, f, unit)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.rewinds:
            ctx.tape.rewind(ctx.position)
        (a, b, c), g = ctx.rule, grads[0]
        need = ctx.needs_input_grad
        branch = _scale(g, c) if need[4] else None
        return (
            None,
            None,
            _scale(g, b) if need[2] else None,
            _scale(g, a) if need[3] else None,
            None if branch is None else branch.to(ctx.dtype),
        )


def _scale(g: Tensor, factor: float) -> Tensor | None:
    if factor == 0:
        return None
    return g if factor == 1 else g * factor


def enter(x: Tensor, streams: Streams, state: Tensor) -> Tensor:
    """Differentiable entry of ``x`` into the streams, which hold it as ``state``."""
    return _Enter.apply(x, streams, state)  # type: ignore[no-any-return]


def step(tape: Tape, unit: Unit, previous: Tensor, current: Tensor, f: Tensor) -> Tensor:
    """Differentiable step: the float tensors carry gradients, the tape carries the state."""
    return _Step.apply(tape, unit, previous, current, f)  # type: ignore[no-any-return]
