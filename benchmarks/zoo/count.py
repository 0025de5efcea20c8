"""An independent count of residual adds: by the kernels that a forward pass runs, without revwire.

What is counted, exactly. The model runs once; each tensor that a kernel derives from the inputs of the model is an
*activation*. A kernel is

- a *view*: it moves elements and keeps their number (reshape, transpose, roll, a cast, a copy);
- *pointwise*: element i of the result depends on element i of each operand alone (PyTorch's own tag, and dropout);
- a *norm* (layer, batch, group, instance, RMS, where they are one kernel);
- or else *mixing* (products, convolutions, pooling, reductions, softmax); a norm mixes too.

A *residual add* is an addition ``add``, ``add_`` or ``addcmul`` of two activations of one shape, the *skip* and the
*branch*, where the branch was computed, by at least one mixing kernel on the way, from the *fork*: the skip itself, or
what the skip is a view of, or the skip before it was multiplied by something that is no activation (a number, a
parameter, a dropout mask). So neither ``x + 0.04 * x**3`` nor a rotary embedding is one, nor is a projection shortcut,
nor a concatenation, nor a gate. A sum ``x + F(x) + G(x)`` of one fork is one residual add, wherever its brackets are.

An add lies *in a chain* if its fork is the result of another residual add, seen through views, and pointwise kernels
and norms of one activation that keep the shape; or if its own result is the fork of another in this way. A skip that
was detached, so that gradients take the branch only, links to nothing. An add is *nested* if it lies between the fork
of another add in a chain and that add's branch operand: a wiring that rewires the outer one recomputes it, and need not
rewire it.

Limits: a fused kernel is seen as one; a norm of several kernels is not taken for a norm (what it makes can be the fork
of an add, but it ends a chain); sums of stacked tensors and scattered additions are not taken for adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INPUT, VIEW, SCALE, POINTWISE, NORM, MIX = "input", "view", "scale", "pointwise", "norm", "mix"
LONGEST = 64
"""Kernels that are followed from a skip, or from a fork, upwards."""

ADDITIONS = ("aten.add.Tensor", "aten.add_.Tensor", "aten.addcmul.default", "aten.addcmul_.default")
BLIND = "reads the shape of its argument only (a random mask is no activation)"
KERNELS = {
    SCALE: "mul mul_ div div_ neg native_dropout dropout dropout_",
    VIEW: """
        clone _to_copy _unsafe_view copy_ roll flip contiguous alias lift_fresh cat stack index index_select gather
        constant_pad_nd repeat pixel_shuffle pixel_unshuffle im2col index_put index_put_ slice_scatter select_scatter
        view_copy split_with_sizes channel_shuffle embedding scatter narrow_copy _reshape_copy tril triu
    """,
    NORM: """
        native_layer_norm native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        _batch_norm_with_update batch_norm cudnn_batch_norm native_group_norm _fused_rms_norm rms_norm
    """,
    POINTWISE: "hardswish hardswish_ _prelu_kernel hardsigmoid mish clamp_",
    BLIND: """
        empty_like zeros_like ones_like full_like rand_like randn_like new_empty new_zeros new_ones new_full
        new_empty_strided bernoulli
    """,
}
"""What is known of kernels by name; of the others, PyTorch's tags decide."""
KIND = {name: kind for kind, names in KERNELS.items() for name in names.split()}


@dataclass(frozen=True)
class Add:
    """A residual add: the qualified name of the innermost module around it, whether it lies in a chain, and nested in
    another.
    """

    path: str
    shape: tuple[int, ...]
    in_chain: bool
    nested: bool


@dataclass(frozen=True)
class Count:
    """The residual adds of one forward pass, in the order of the pass."""

    adds: tuple[Add, ...]

    @property
    def found(self) -> int:
        return len(self.adds)

    @property
    def in_chains(self) -> int:
        return sum(a.in_chain for a in self.adds)

    @property
    def nested(self) -> int:
        """Of those in chains."""
        return sum(a.in_chain and a.nested for a in self.adds)


def count(model: nn.Module, *args: Any, **kwargs: Any) -> Count:
    """Run ``model(*args, **kwargs)`` once, in the mode it is in, and count. Buffers change as in any forward pass."""
    with _paths(model) as where, _Watch(where) as watch:
        watch.enter([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
        model(*args, **kwargs)
    return _counted(watch)


@dataclass(frozen=True)
class _Found:
    fork: int
    branches: tuple[int, ...]
    result: int
    cut: bool
    path: str


@dataclass(frozen=True)
class _Node:
    """One activation. ``above`` and ``mixed`` are sets of nodes as bits: all ancestors, and those with a mixing kernel
    on the way.
    """

    kind: str
    shape: tuple[int, ...]
    parents: tuple[int, ...]
    above: int
    mixed: int


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows activations through every kernel. A tensor is known by its storage and its place in it; storages are kept
    alive.
    """

    def __init__(self, where: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where = where
        self.nodes: list[_Node] = []
        self.adds: dict[int, _Found] = {}
        self.cells: dict[int, dict[Any, int]] = {}
        self.alive: list[Any] = []

    def enter(self, inputs: list[Tensor]) -> None:
        for t in inputs:
            self._place(t, self._node(INPUT, t, ()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        nodes = [self._lookup(t) for t in operands]
        out = func(*args, **kwargs)
        active = tuple(dict.fromkeys(n for n in nodes if n is not None))
        if active and KIND.get(func.overloadpacket.__name__) != BLIND:
            self._result(func, nodes, active, out)
            if str(func) in ADDITIONS and out.is_floating_point():
                self._addition(operands, nodes, out)
        return out

    def _result(self, func: Any, nodes: list[int | None], active: tuple[int, ...], out: Any) -> None:
        written = func._schema.is_mutable
        for t in (t for t in tree_leaves(out) if isinstance(t, Tensor)):
            known = self.cells.get(_storage(t), {})
            if not written and _place_of(t) in known:
                continue  # the same place, seen again
            node = self._node(_kind(func, len(active)), t, active)
            if written:
                for place, old in list(known.items()):
                    whole = prod(self.nodes[old].shape) == t.numel()
                    known[place] = self._node(VIEW, t, (node,) if whole else (old, node))
            self._place(t, node)

    def _addition(self, operands: list[Tensor], nodes: list[int | None], out: Tensor) -> None:
        result = self.cells[_storage(out)][_place_of(out)]
        grads = {
            n: t.requires_grad for t, n in zip(operands, nodes, strict=True) if n is not None and t.shape == out.shape
        }
        pairs = [(a, b) for a in grads for b in grads if a != b]
        found = [add for a, b in pairs if (add := self._found(a, b, result, cut=grads[b] and not grads[a])) is not None]
        if found:
            self.adds[result] = max(found, key=lambda add: add.fork)

    def _found(self, skip: int, branch: int, result: int, cut: bool) -> _Found | None:
        """The add that these operands make. If the skip is a sum itself, and the branch is of the fork of that sum,
        both are one.
        """
        path = self.where[-1] if self.where else ""
        way = list(self.up(skip, (VIEW, SCALE)))
        for at in way:
            if self.nodes[branch].mixed >> at & 1:
                return _Found(at, (branch,), result, cut, path)
        inner = next((self.adds[at] for at in way if at in self.adds), None)
        if inner is None or not self.nodes[branch].mixed >> inner.fork & 1:
            return None
        del self.adds[inner.result]
        return _Found(inner.fork, (*inner.branches, branch), result, inner.cut, path)

    def up(self, node: int, through: tuple[str, ...]) -> Iterator[int]:
        """The node, and what it comes from by kernels of these kinds with one activation each, that keep the number of
        elements.
        """
        for _ in range(LONGEST):
            yield node
            at = self.nodes[node]
            if (
                at.kind not in through
                or len(at.parents) != 1
                or prod(self.nodes[at.parents[0]].shape) != prod(at.shape)
            ):
                return
            node = at.parents[0]

    def _node(self, kind: str, t: Tensor, parents: tuple[int, ...]) -> int:
        above = mixed = 0
        for p in parents:
            above |= self.nodes[p].above | 1 << p
            mixed |= self.nodes[p].mixed
        self.nodes.append(_Node(kind, tuple(t.shape), parents, above, above if kind in (NORM, MIX) else mixed))
        return len(self.nodes) - 1

    def _place(self, t: Tensor, node: int) -> None:
        if _storage(t) not in self.cells:
            self.cells[_storage(t)] = {}
            self.alive.append(t.untyped_storage())
        self.cells[_storage(t)][_place_of(t)] = node

    def _lookup(self, t: Tensor) -> int | None:
        known = self.cells.get(_storage(t))
        if known is None:
            return None
        if _place_of(t) not in known:
            known[_place_of(t)] = self._node(VIEW, t, tuple(dict.fromkeys(known.values())))
        return known[_place_of(t)]


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata) if t.layout == torch.strided else id(t)


def _place_of(t: Tensor) -> Any:
    return (t.storage_offset(), tuple(t.shape), t.stride(), t.dtype) if t.layout == torch.strided else None


def _kind(func: Any, active: int) -> str:
    known = KIND.get(func.overloadpacket.__name__)
    if known is not None:
        return POINTWISE if known == SCALE and active > 1 else known
    if func.is_view:
        return VIEW
    return POINTWISE if torch.Tag.pointwise in func.tags else MIX


def _counted(watch: _Watch) -> Count:
    chained: set[int] = set()
    for add in watch.adds.values():
        before = (
            None
            if add.cut
            else next((n for n in watch.up(add.fork, (VIEW, SCALE, POINTWISE, NORM)) if n in watch.adds), None)
        )
        if before is not None:
            chained |= {before, add.result}
    outer = [watch.adds[n] for n in chained]
    rows = ((a, watch.nodes[a.result].shape) for a in watch.adds.values())
    return Count(tuple(Add(a.path, shape, a.result in chained, _nested(watch, a, outer)) for a, shape in rows))


def _nested(watch: _Watch, add: _Found, outer: list[_Found]) -> bool:
    above = watch.nodes[add.result].above
    return any(
        above >> o.fork & 1 and any(_reaches(watch, add.result, b) for b in o.branches) for o in outer if o is not add
    )


def _reaches(watch: _Watch, low: int, high: int) -> bool:
    return low == high or bool(watch.nodes[high].above >> low & 1)


@contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """The qualified names of the modules that are running, innermost last."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    running: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(names.get(module, ""))

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        running.pop()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield running
    finally:
        for hook in hooks:
            hook.remove()
