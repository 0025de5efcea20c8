"""Which tensors share memory, and which value each of them has now."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revwire._torch import storage_id


class Memory:
    """Which tensors share memory, and which values those that are alive have now.

    Args:
        released: told the number of a memory whenever a tensor that lies in it is gone.
    """

    def __init__(self, released: Callable[[int], None]) -> None:
        self.released = released
        self.numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.sharing: dict[int, tuple[int, list[weakref.ref[Tensor]]]] = {}
        self.count = 0

    def number_of(self, t: Tensor) -> int | None:
        """The value number of a tensor, if it has one."""
        found = self.numbers.get(id(t))
        if found is None or found[0]() is not t:
            return None
        return found[1]

    def bind(self, t: Tensor, number: int) -> int:
        """Give a tensor a value number; returns the number of its memory."""
        known = self.number_of(t) is not None
        address = address_of(t)
        token, sharing = self.sharing.get(address, (-1, [])) if address is not None else (-1, [])
        alive = [r for r in sharing if r() is not None]
        if not alive:  # the memory may have been another tensor's before
            self.count += 1
            token = self.count if address is not None else -self.count
        released = self.released  # not by way of this object, which would hold itself
        reference = weakref.ref(t, lambda _: released(token))
        self.numbers[id(t)] = (reference, number)
        if address is not None:
            self.sharing[address] = (token, alive if known and alive else [*alive, reference])
        return token

    def storage_at(self, address: int | None) -> int:
        """The number of the memory at an address: that of the tensors that are alive there, or a new one."""
        token, sharing = self.sharing.get(address, (-1, [])) if address is not None else (-1, [])
        if any(r() is not None for r in sharing):
            return token
        self.count += 1
        return self.count

    def aliases(self, t: Tensor) -> list[Tensor]:
        """All known tensors that are alive and share the memory of ``t``, itself first."""
        address = address_of(t)
        sharing = [] if address is None else self.sharing.get(address, (-1, []))[1]
        others = {id(o): o for o in (r() for r in sharing) if o is not None and o is not t}
        return [t, *others.values()]


def address_of(t: Tensor) -> int | None:
    """What is equal for tensors that share memory; None where that cannot be told."""
    if t.layout != torch.strided or t.is_meta or t.is_nested or type(t) not in (Tensor, nn.Parameter, nn.Buffer):
        return None
    return storage_id(t.untyped_storage())


_aten = torch.ops.aten


_COPIES = frozenset({_aten.clone.default, _aten._unsafe_view.default, _aten.view.default})
"""The kernels of ``reshape`` and ``contiguous`` where they cannot do without a copy: the order of the elements
stays.
"""


def is_view(args: Any, out: Any, kernels: list[Any]) -> bool:
    """Whether a result re-reads the memory of the first argument, with all its elements; or copies it to another shape
    or layout.
    """
    if not isinstance(out, Tensor) or not args or not isinstance(args[0], Tensor) or out is args[0]:
        return False
    x = args[0]
    if address_of(out) is None or out.numel() != x.numel() or out.dtype != x.dtype:
        return False
    if address_of(out) == address_of(x):
        return True
    copied = _aten.clone.default in kernels and _COPIES.issuperset(kernels)
    return copied and address_of(x) is not None and (out.shape, out.stride()) != (x.shape, x.stride())
