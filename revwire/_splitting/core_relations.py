"""What a part of a call's result needs of its inputs; found out by running the call on random tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from revwire._capture.recording import Value
from revwire._splitting.core_graph import CallGraph
from revwire._streams.samples import alike
from revwire._surroundings.randomness import preserved_random_state

_DROPS = (functional.dropout, torch.dropout)


_MOST_WAYS = 64


_MOST_KNOWN = 4096


_EXACT = 2**22  # elements up to which calls are tried in double precision


_SIZED = ("view", "reshape", "expand", "unflatten", "repeat")


class Relation(NamedTuple):
    """What a part of a call's result needs: the dimension of each input along which it needs the same part (None: all
    of it).

    ``size``: the place among the call's constants of the number that stands for the size of the parted dimension, if
    there is one.
    """

    dims: tuple[int | None, ...]
    size: int | None = None


Known = dict[Any, Relation | None]
"""The relations that were found, by call and shapes."""


def _aligned(own: Sequence[int], shape: Sequence[int], dim: int) -> int | None:
    """The dimension of an input that is broadcast to ``shape``, of which it needs the same part; None: it is the same
    for all.
    """
    d = dim - (len(shape) - len(own))
    return d if d >= 0 and own[d] == shape[dim] else None


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


def _random(value: Value, device: torch.device, most: int, *, wide: bool) -> Tensor:
    """Random values, larger towards the end of each dimension; integers below ``most``."""
    if value.dtype is torch.bool:
        return torch.rand(value.shape, device=device) < 0.5
    if _is_integer(value.dtype):
        return torch.randint(0, max(1, most), value.shape, dtype=value.dtype, device=device)
    if value.dtype.is_complex:
        dtype = torch.complex128 if wide or value.dtype == torch.complex128 else torch.complex64
    else:
        dtype = torch.float64 if wide or value.dtype == torch.float64 else torch.float32
    out = torch.randn(value.shape, dtype=dtype, device=device)
    for d, size in enumerate(value.shape):
        out *= torch.linspace(1, 3, size, device=device).view([-1 if i == d else 1 for i in range(out.dim())])
    return out


def _constants(node: fx.Node) -> list[Any]:
    out: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda a: out.append(a))
    return out


def with_size(node: fx.Node, number: int | None, size: Any) -> tuple[Any, Any]:
    """The arguments of a call, with the number at a place among them replaced."""
    count = iter(range(1 << 30))
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda a: size if next(count) == number else a)
    return args, kwargs


class Relations:
    """What parts of the results of a graph's calls need of their inputs.

    Args:
        graph: whose calls they are.
        known: relations found before, to which new ones are added.
    """

    def __init__(self, graph: CallGraph, known: Known) -> None:
        self.graph = graph
        self.known = known
        self.found: dict[tuple[fx.Node, int], Relation | None] = {}

    def related(self, node: fx.Node, dim: int) -> Relation:
        """That of a node of the core."""
        relation = self.of(node, dim)
        assert relation is not None
        return relation

    def of(self, node: fx.Node, dim: int) -> Relation | None:
        """What a part of a call's result along a dimension needs; None where that is not a part of its inputs."""
        if (node, dim) not in self.found:
            self.found[node, dim] = self.known_relation(node, dim) if self.graph.may_belong(node) else None
        return self.found[node, dim]

    def known_relation(self, node: fx.Node, dim: int) -> Relation | None:
        """As `of`, looked up once for all calls alike."""
        key = self.key(node), dim
        if key not in self.known:
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            self.known[key] = self.looked_up(node, dim)
        return self.known[key]

    def key(self, node: fx.Node) -> Any:
        """What two calls have in common whose relations are the same."""
        call, inputs = self.graph.call(node), self.graph.inputs(node)
        values = [self.graph.value_of[i] for i in inputs]
        constants = repr(fx.map_arg((call.args, call.kwargs), lambda n: f"<{inputs.index(n)}>"))
        return (
            self.graph.event(node).target,
            self.graph.index(node),
            tuple((v.shape, v.dtype) for v in values),
            constants,
            self.graph.event(node).modes,
        )

    def looked_up(self, node: fx.Node, dim: int) -> Relation | None:
        """As `of`, from the declaration of an element-wise call, or by trying the call."""
        event, shape = self.graph.event(node), self.graph.value_of[node].shape
        if event.is_pointwise or event.target in _DROPS:
            return Relation(tuple(_aligned(self.graph.value_of[i].shape, shape, dim) for i in self.graph.inputs(node)))
        with torch.no_grad(), preserved_random_state(() if self.graph.device.type == "cpu" else (self.graph.device,)):
            for most in self.largest_integers(node):
                try:
                    return self.tried(node, dim, most)
                except Exception:  # noqa: BLE001 - a call that knows its sizes, or is given no valid index, fails in any way
                    continue
        return None

    def largest_integers(self, node: fx.Node) -> list[int]:
        """Up to which to draw integers for a call: they may be any, or indices into its other inputs."""
        values = [self.graph.value_of[i] for i in self.graph.inputs(node)]
        sizes = [s for v in values if v.dtype.is_floating_point or v.dtype.is_complex for s in v.shape]
        return [100, min(sizes, default=1)] if any(_is_integer(v.dtype) for v in values) else [100]

    def tried(self, node: fx.Node, dim: int, most: int) -> Relation | None:
        """Run the call on random tensors, whole and in halves, and see which parts of them a half needs."""
        shape = self.graph.value_of[node].shape
        wide = sum(torch.Size(self.graph.value_of[n].shape).numel() for n in (node, *self.graph.inputs(node))) <= _EXACT
        given = [_random(self.graph.value_of[i], self.graph.device, most, wide=wide) for i in self.graph.inputs(node)]
        half = shape[dim] // 2
        whole = self.run(node, given)
        if (
            not isinstance(whole, Tensor)
            or whole.shape != shape
            or not whole.numel()
            or bool((whole == whole.flatten()[0]).all())
        ):
            return None  # the last: what is the same everywhere shows nothing
        for relation in self.ways(node, dim):
            if all(
                self.holds(node, given, relation, whole, dim, *part) for part in ((0, half), (half, shape[dim] - half))
            ):
                return relation
        return None

    def ways(self, node: fx.Node, dim: int) -> Iterator[Relation]:
        """The relations that may hold, the likely ones first."""
        shape = self.graph.value_of[node].shape
        options: list[list[int | None]] = []
        for i in self.graph.inputs(node):
            own = self.graph.value_of[i].shape
            good = [d for d in range(len(own)) if own[d] == shape[dim]]
            good.sort(key=lambda d: (len(own) - d != len(shape) - dim, d != dim))
            options.append([*good, None])
        names = getattr(self.graph.event(node).target, "__name__", "")
        numbers: list[int | None] = [None]
        if names in _SIZED:
            constants = _constants(self.graph.call(node))
            numbers += [k for k, constant in enumerate(constants) if type(constant) is int and constant == shape[dim]]
        for count, dims in enumerate(product(*options)):
            if count < _MOST_WAYS and any(d is not None for d in dims):
                yield from (Relation(dims, number) for number in numbers)

    def holds(
        self, node: fx.Node, given: list[Tensor], relation: Relation, whole: Tensor, dim: int, start: int, length: int
    ) -> bool:
        """Whether the call on parts of its inputs gives that part of the whole."""
        part = [x if d is None else x.narrow(d, start, length) for x, d in zip(given, relation.dims, strict=True)]
        try:
            found = self.run(node, part, relation.size, length)
        except Exception:  # noqa: BLE001 - as in `looked_up`
            return False
        return isinstance(found, Tensor) and alike(found, whole.narrow(dim, start, length))

    def run(self, node: fx.Node, given: list[Tensor], number: int | None = None, size: int = 0) -> Any:
        """The call on these inputs, without dropout."""
        call: Any = self.graph.call(node)
        tensors = dict(zip(call.all_input_nodes, given, strict=True))
        args, kwargs = fx.map_arg(with_size(call, number, size), lambda n: tensors[n])
        if "dropout_p" in kwargs:
            kwargs = {**kwargs, "dropout_p": 0.0}
        out = call.target(*args, **kwargs)
        return out if node is call else out[self.graph.index(node)]
