"""Buffers that a run writes to: each write counts once, however often a branch runs, or not at all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from revwire._surroundings.inventory import is_written, version_of
from revwire._surroundings.modes import NOTHING
from revwire._torch import ModuleWithStatistics

Copies = dict[tuple[int, str], Tensor]
"""Buffers as a forward found them, by the identity of their module, and name."""


_QUIET: WeakSet[nn.Module] = WeakSet()  # modules whose last forward moved no version counter of a floating-point buffer


class Written:
    """What a forward of these modules (not of those below them) writes to their buffers; see Note [Buffers that are
    read and written] in `surroundings`.
    """

    def __init__(self, modules: Iterable[nn.Module], *, copied: bool = False, unseen: bool = False) -> None:
        """Before the forward; ``copied``: with copies of all that is written, counters too, whatever was written last
        time; ``unseen``: version counters may not tell.
        """
        self.copied, self.unseen = copied, unseen
        always = copied or unseen
        self.before = [(m, quiet := m in _QUIET and not always, _with_copies(m, not quiet)) for m in modules]

    def copies(self) -> Copies:
        """After the forward: the old values of those buffers whose new ones must not be read by a recompute."""
        found: Copies = {}
        for module, quiet, buffers in self.before:
            old: dict[str, Tensor | None] = {}
            for name, buffer, version, copy in buffers:
                if self.unseen or version_of(buffer) != version:
                    old[name] = copy
                elif _standing(module, name) is not buffer:  # another tensor took its place: it is a copy itself
                    old[name] = buffer
            loud = any(b.is_floating_point() for name, b, _, _ in buffers if name in old)
            found |= {
                (id(module), name): value for name, value in old.items() if (loud or self.copied) and value is not None
            }
            if loud and quiet:
                _QUIET.discard(module)
            elif not (loud or quiet):
                _QUIET.add(module)
        return found


class Constants:
    """Buffers of these modules that are usually constants (tables of integers): which of them a forward writes."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        """Before the forward."""
        self.before = [
            (m, name, b, version_of(b))
            for m in modules
            for name, b in m._buffers.items()
            if b is not None and not is_written(b)
        ]

    def written(self) -> frozenset[tuple[int, str]]:
        """After the forward: the identity of the module, and the name."""
        return frozenset(
            (id(m), name)
            for m, name, b, version in self.before
            if version_of(b) != version or _standing(m, name) is not b
        )


def _standing(module: nn.Module, name: str) -> Tensor | None:
    """The buffer of that name (the table of a scripted module is no dict)."""
    return next((b for n, b in module._buffers.items() if n == name), None)


def statistics_of(modules: Iterable[nn.Module]) -> Copies:
    """Copies of the running statistics of those among these modules that are in train mode.

    Batch normalisation saves them for a gradient that does not use them, and its forward changes them: a recompute that
    is compared finds those of the forward.
    """
    found = [m for m in modules if m.training and isinstance(m, ModuleWithStatistics)]
    named = [(m, name, m._buffers.get(name)) for m in found for name in ("running_mean", "running_var")]
    return {(id(m), name): b.detach().clone() for m, name, b in named if b is not None}


def _with_copies(module: nn.Module, copied: bool) -> list[tuple[str, Tensor, int, Tensor | None]]:
    """(name, buffer, its version counter, a copy if wanted) of what a forward may write."""
    buffers = [(name, b) for name, b in module._buffers.items() if b is not None and is_written(b)]
    return [(name, b, version_of(b), b.detach().clone() if copied else None) for name, b in buffers]


Lock = Any  # that of `RLock` has a name since Python 3.13

_LOCKS = tuple(RLock() for _ in range(64))


class undisturbed(AbstractContextManager[None]):  # noqa: N801 - it is used as a function
    """Keep other threads from exchanging the buffers of these modules; ``first``: locks that are taken before theirs.

    Modules share a few locks, taken in one order; a nested chain takes a part of what its outer branch holds.
    """

    __slots__ = ("locks", "taken")

    def __init__(self, modules: Iterable[nn.Module], *first: Lock) -> None:
        numbers = {id(module) // 64 % len(_LOCKS) for module in modules}
        self.locks = [*first, *map(_LOCKS.__getitem__, sorted(numbers))]
        self.taken: list[Lock] = []

    def __enter__(self) -> None:
        try:
            for lock in self.locks:
                lock.acquire()
                self.taken.append(lock)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        while self.taken:
            self.taken.pop().release()


@contextmanager
def buffers_exchanged(
    modules: Iterable[nn.Module],
    copies: Copies | None = None,
    *,
    more: Container[tuple[int, str]] = (),
) -> Iterator[None]:
    """Let these modules (not those below them) write to copies of their buffers, and give them the originals back.

    Args:
        modules: whose buffers are exchanged.
        copies: older values for some of them.
        more: which of those that are usually constants (integers) too: copies of all would be large.

    Batch normalisation writes its statistics without touching their version counter, so what was written cannot be
    seen afterwards; and writing values back would race with, and look like, a change by somebody else.
    """
    writers = [*modules]
    kept: list[tuple[nn.Module, str, Tensor]] = []
    with undisturbed(writers):
        try:
            for module in writers:
                for name, buffer in module._buffers.items():
                    if buffer is not None and (is_written(buffer) or (id(module), name) in more):
                        kept.append((module, name, buffer))
                        module._buffers[name] = (copies or {}).get((id(module), name), buffer).clone()
            yield
        finally:
            for module, name, buffer in kept:
                module._buffers[name] = buffer


@contextmanager
def buffers_kept(root: nn.Module, *, alone: bool = True) -> Iterator[None]:
    """Undo what is written to the buffers of a module and of all below it; those that it puts in their place stay.

    What a forward usually writes is exchanged for copies, for the reasons given at `buffers_exchanged`, whatever the
    mode, which may be switched inside. Other buffers are large (masks, indices) and stay in place; they are written
    back where their version counters tell that somebody wrote to them.

    Args:
        root: the module.
        alone: keep other threads from exchanging the same buffers meanwhile.
    """
    writers = [m for m in root.modules() if any(map(is_written, m._buffers.values()))]
    with undisturbed(writers) if alone else NOTHING, _written_back(root):
        copies: dict[int, Tensor] = {}
        kept: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for module in writers:
                for name, buffer in module._buffers.items():
                    if buffer is not None and is_written(buffer):
                        if id(buffer) not in copies:  # modules may share one
                            copies[id(buffer)] = buffer.clone()
                        kept.append((module, name, buffer))
                        module._buffers[name] = copies[id(buffer)]
            yield
        finally:
            for module, name, buffer in kept:
                if _standing(module, name) is copies[id(buffer)]:
                    module._buffers[name] = buffer


@contextmanager
def _written_back(root: nn.Module) -> Iterator[None]:
    kept = [
        (b, version_of(b), b.detach().clone()) for b in root.buffers() if not is_written(b) and not b.is_inference()
    ]
    try:
        yield
    finally:
        for buffer, version, copy in kept:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(copy)
