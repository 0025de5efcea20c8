"""What the backward of a call needs for itself, measured on one of each kind.

Note [Scratch memory]
    Some kernels unfold their input, or lay their weights out anew: a 3x3x3 convolution on the CPU may take 27 times
    its input for a while. Calls that are several kernels (attention that makes its map) have gradients inside. No run
    of a forward shows either. So the largest convolution of each kind (kernel, stride, groups, dtype, and whether its
    weights are larger than its unfolded input), and of the other calls that may need some the one that saves or gives
    most, run once by themselves, on zeros, forward and backward. The others of their kind are taken to need as much in
    proportion: to what they save or give, or to what explains a measured convolution better, its unfolded input or its
    weights.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revwire._capture.recording import Event, Recording, Value
from revwire._structures import Ref, leaves_of, mapped, refs
from revwire._torch import arguments_of, profiler_enabled
from revwire.measure._trace import Mark, keeps_peak, traced

_CONVOLUTION = torch.ops.aten.convolution
_AS_STRIDED = torch.ops.aten.as_strided.default
"""Its backward counts how often it has read each element."""

_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default

_NEGLIGIBLE = 1 << 16

_REFUSALS = (TypeError, ValueError, RuntimeError)
"""What a call raises that takes more than its arguments show, is not deterministic where that is asked for, or finds no
memory.
"""

_SMALL = 1 << 20
"""Bytes that a forward must save for this to be worth the time."""


class _Sizes(NamedTuple):
    """Bytes of the unfolded input of a convolution, or of what another call saves or gives, and of its weights."""

    unfolded: int
    weights: int = 0


def scratch_of(recording: Recording) -> dict[int, int]:
    """Bytes that the backward of a call needs beside its results, by event; see Note [Scratch memory]."""
    kinds: dict[Any, list[tuple[Event, _Sizes]]] = {}
    if sum(event.saved for event in recording.events) < _SMALL:
        return {}
    for event in recording.events:
        found = _kind(recording, event)
        if found is not None:
            kinds.setdefault(found[0], []).append((event, found[1]))
    largest = [max(several, key=lambda one: sum(one[1])) for several in kinds.values()]
    out: dict[int, int] = {}
    for several, (_, sizes), scratch in zip(kinds.values(), largest, _measured(recording, largest), strict=True):
        if scratch > _NEGLIGIBLE:
            by = 0 if _misses(sizes.unfolded, scratch) < _misses(sizes.weights, scratch) else 1
            out.update({event.number: scratch * one[by] // max(1, sizes[by]) for event, one in several})
    return out


def _misses(size: int, scratch: int) -> float:
    """By which factor a size is larger, or smaller."""
    return max(size, scratch) / max(1, min(size, scratch))


def _kind(recording: Recording, event: Event) -> tuple[Any, _Sizes] | None:
    """What tells a call from others that may need scratch memory, and its sizes; None for one that needs none, or
    cannot run by itself.
    """
    convolution = any(getattr(k, "overloadpacket", None) is _CONVOLUTION for k in event.kernels)
    composed = not event.opaque and event.saved and sum(map(_computes, event.kernels)) > 1
    if not (convolution or composed or _AS_STRIDED in event.kernels):
        return None
    values = [recording.values[r.value] for r in refs((event.args, event.kwargs))]
    results = [recording.values[r.value] for r in refs(event.out)]
    if len(results) != 1 or event.writes or not any(v.wants for v in values):
        return None
    x = values[0]
    settings = [leaf for leaf in leaves_of((event.args, event.kwargs)) if not isinstance(leaf, Ref)]
    order = sorted(range(len(x.strides)), key=lambda d: -x.strides[d])  # of its layout
    kind = event.target, repr(settings), (*order,), x.dtype, x.wants, event.modes
    if not convolution:
        size = max(event.saved, prod(results[0].shape) * x.dtype.itemsize)
        return (*kind, tuple(len(v.shape) for v in values)), _Sizes(size)
    if len(values) < 2:
        return None
    weight = values[1]
    unfolded = prod(x.shape[:2]) * prod(weight.shape[2:]) * prod(results[0].shape[2:]) * x.dtype.itemsize
    sizes = _Sizes(unfolded, prod(weight.shape) * weight.dtype.itemsize)
    which = sizes.weights > sizes.unfolded  # the larger one tells what the scratch memory grows with
    return (*kind, weight.shape[2:], which), sizes


def _computes(kernel: Any) -> bool:
    """Whether its results are no views, nor what it wrote to."""
    return kernel is not _UNSAFE_VIEW and all(a.alias_info is None for a in arguments_of(kernel))


def _measured(recording: Recording, some: list[tuple[Event, _Sizes]]) -> list[int]:
    """What each of these calls needs beside its results; nothing where it does not run by itself."""
    device = _device(recording)
    if not some or profiler_enabled() or not keeps_peak(device):  # one session at a time: the caller's would end
        return [0] * len(some)
    results: list[int | None] = []

    def run(mark: Mark) -> None:
        for event, _ in some:
            forward: tuple[Tensor, list[Tensor]] | None = None
            with suppress(*_REFUSALS):
                forward = _forward(recording, event, device)
            mark()
            results.append(None)
            if forward is not None:
                with suppress(*_REFUSALS):
                    results[-1] = _backward(*forward)
            mark()

    drawing = torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
    with torch.inference_mode(False), torch.enable_grad(), drawing:
        stretches = traced(run, device, thorough=False)[1::2]
    pairs = zip(stretches, results, strict=True)
    return [0 if size is None else max(0, s.peak - s.begin - size) for s, size in pairs]


def _backward(out: Tensor, inputs: list[Tensor]) -> int:
    """Bytes of what the backward of a call is given, and gives."""
    given = torch.autograd.grad(out, inputs, torch.zeros_like(out), allow_unused=True)
    return sum(g.untyped_storage().nbytes() for g in given if g is not None) + out.nbytes


def _forward(recording: Recording, event: Event, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """The result of a call on zeros, and what is given a gradient."""
    made: dict[int, Tensor] = {}

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        if leaf.value not in made:
            made[leaf.value] = _zeros(recording.values[leaf.value], device)
        return made[leaf.value]

    with ExitStack() as stack:
        for kind, on, dtype in event.modes[2]:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=on))
        out: Tensor = event.target(*mapped(event.args, fill), **(mapped(event.kwargs, fill) or {}))
    return out, [t for t in made.values() if t.requires_grad]


def _zeros(value: Value, device: torch.device) -> Tensor:
    extent = max(0, 1 + sum((n - 1) * step for n, step in zip(value.shape, value.strides, strict=True)))
    zeros = torch.zeros(extent, dtype=value.dtype, device=device)  # elements may share memory
    return zeros.as_strided(value.shape, value.strides).requires_grad_(value.wants)


def _device(recording: Recording) -> torch.device:
    there = (v.existing.device for v in recording.values if v.existing is not None)
    return next((d for d in there if d.type != "cpu"), torch.device("cpu"))
