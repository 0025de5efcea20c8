"""Weights that are lent or taken away between forward and backward, and how a recompute finds them again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor, nn

from revwire._surroundings.inventory import Place, Table


@contextmanager
def shards_kept(root: nn.Module) -> Iterator[None]:
    """Let FSDP2 take away again what a run has gathered: it counts which weights are whole, and attributes alone do not
    tell it.
    """
    kept = [
        (m, list(m.parameters()))
        for m in root.modules()
        if hasattr(m, "unshard") and callable(getattr(m, "reshard", None))
    ]
    try:
        yield
    finally:
        for module, weights in kept:
            if any(now is not before for now, before in zip(module.parameters(), weights, strict=True)):
                module.reshard()  # type: ignore[operator]


@contextmanager
def gradients_put_aside(root: nn.Module) -> Iterator[None]:
    """Begin with no ``.grad``, and give each parameter its own back."""
    kept = [(p, p.grad) for p in root.parameters()]
    try:
        for p, _ in kept:
            p.grad = None
        yield
    finally:
        for p, gradient in kept:
            p.grad = gradient


class Homes(dict[int, ReferenceType[Tensor]]):
    """The tensors that the modules of a model had at conversion, by identity; see Note [Weights that are exchanged] in
    `surroundings`.
    """

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copied model has other tensors."""
        return Homes, ()

    def note(self, module: nn.Module) -> None:
        """Learn the tensors of a module and of all below it."""
        for gone in [
            i for i, known in list(self.items()) if known() is None
        ]:  # replicas do this in several threads at once
            self.pop(gone, None)
        self.update({id(t): ref(t) for t in (*module.parameters(), *module.buffers())})

    def have(self, t: Tensor) -> bool:
        """Whether ``t`` is one of them."""
        known = self.get(id(t))
        return known is not None and known() is t


def lent(tables: list[tuple[Table, Table, bool]], homes: Homes) -> list[Place]:
    """The places in which a tensor stood that was only lent, and has gone; see Note [Weights that are exchanged] in
    `surroundings`.
    """
    out: list[Place] = []
    for table, then, is_weight in tables:
        if [*table] != [*then] or not all(map(is_, table.values(), then.values())):
            places = (
                (table, name, t, is_weight) for name, t in then.items() if t is not None and table.get(name) is not t
            )
            out += [place for place in places if _was_lent(place, homes)]
    return out


def _was_lent(place: Place, homes: Homes) -> bool:
    table, name, then, is_weight = place
    now: Any = table.get(name)
    if type(now) not in _PLAIN or type(then) not in _PLAIN or (then.numel() and not then.untyped_storage().nbytes()):
        return False  # FSDP manages it
    one_is_no_parameter = type(now) is not type(then) or type(now) is Tensor
    return homes.have(now) or (is_weight and one_is_no_parameter)


_PLAIN = (Tensor, nn.Parameter)


@contextmanager
def put_back(places: list[Place]) -> Iterator[None]:
    """Put tensors back where they stood."""
    now = [table[name] for table, name, _, _ in places]
    try:
        for table, name, tensor, _ in places:
            table[name] = tensor
        yield
    finally:
        for (table, name, _, _), tensor in zip(places, now, strict=True):
            table[name] = tensor
