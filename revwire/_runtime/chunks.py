"""Chunks of a unit: how its arguments are cut, and how results are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revwire._streams.base import canonical
from revwire._surroundings.randomness import RandomStates, accelerators_of, random_states, set_random_states
from revwire._torch import tree_leaves, tree_map
from revwire.couplings.base import Rule

BATCH = 0


class Chunk(NamedTuple):
    """A part of a state: ``length`` elements from ``start`` along ``dim``; ``first`` is the one that is undone last.

    Where it ``shares`` random numbers, its branch draws those of the first chunk again.
    """

    dim: int
    start: int
    length: int
    shares: bool = False

    @property
    def first(self) -> bool:
        """Whether nothing of the state lies before it."""
        return self.start == 0

    def of(self, state: Tensor) -> Tensor:
        """That part, dense: where it does not lie dense in the state, it is a copy."""
        return canonical(state.narrow(self.dim, self.start, self.length))

    def rule(self, rule: Rule) -> Rule:
        """The rule of this part, where there is one number for each sample."""
        if rule.signs is None or self.dim != BATCH:
            return rule
        a, c, signs = (
            f.narrow(BATCH, self.start, self.length) if isinstance(f, Tensor) else f
            for f in (rule.a, rule.c, rule.signs)
        )
        return Rule(a, rule.b, c, rule.bits, signs)  # type: ignore[arg-type]


class Windows(NamedTuple):
    """Pieces along a dimension that a branch treats each by itself; see Note [Windows] in `probe`.

    Attributes:
        dim: the dimension.
        ends: where each piece ends.
        merged: counts of chunks for which it was seen that neighbouring pieces may run together.
        sizes: of the stream, without the batch, for which that was found.
    """

    dim: int
    ends: tuple[int, ...]
    merged: tuple[int, ...]
    sizes: tuple[int, ...]

    def borders(self, count: int) -> list[int]:
        """The ends of ``count`` chunks of them, or of a few more; of all, where they may not run together."""
        return together(self.ends, count) if count in self.merged else list(self.ends)


def together(ends: Sequence[int], count: int) -> list[int]:
    """The ends of runs of pieces, each as long as it can be without being longer than the ``count``-th part of all (or
    one piece).
    """
    most, out, start = -(-ends[-1] // count), list[int](), 0
    for end, after in pairwise([*ends, 2 * ends[-1]]):
        if after - start > most:
            out.append(end)
            start = end
    return out


@dataclass(frozen=True)
class Cut:
    """How a unit may be cut.

    Attributes:
        count: the number of chunks.
        rank: dimensions of the stream for which that was found.
        dims: dimensions along which its branch treats every element by itself, the batch first.
        slices: whether its extra inputs are cut with the batch, where they have as many elements there.
        kinds: of the extra inputs for which that was found; with others (a mask that the example had not) a unit runs
            whole.
        windows: dimensions along which it treats pieces by themselves.
        shared: dimensions along which chunks share the random numbers that the branch draws.
    """

    count: int
    rank: int
    dims: tuple[int, ...]
    slices: bool
    kinds: Kinds = ()
    windows: tuple[Windows, ...] = ()
    shared: tuple[int, ...] = ()

    def chunks(self, x: Tensor, extras: tuple[Any, ...]) -> tuple[Chunk, ...]:
        """The chunks in which the branch runs on this stream tensor and these extra inputs; none if it must stay
        whole.
        """
        found = self.chunks_of(x.shape)
        return found if found and kinds_of(extras, x) == self.kinds else ()

    def chunks_of(self, shape: Sequence[int]) -> tuple[Chunk, ...]:
        """The chunks of a stream of this shape, along the first dimension that has enough of them; none if it must stay
        whole.
        """
        if len(shape) != self.rank:
            return ()
        ways: list[tuple[int, int, Windows | None]] = [(shape[d], d, None) for d in self.dims]
        ways += [(len(w.ends), w.dim, w) for w in self.windows if w.sizes == tuple(shape[1:])]
        size, dim, windows = next(
            (way for way in ways if way[0] >= self.count), max(ways, key=lambda way: way[0], default=(0, 0, None))
        )
        if size < 2:
            return ()
        length = -(-size // self.count)
        ends = windows.borders(self.count) if windows else [*range(length, size, length), size]
        return tuple(Chunk(dim, start, end - start, dim in self.shared) for start, end in pairwise([0, *ends]))

    def extras(self, extras: tuple[Any, ...], chunk: Chunk, size: int) -> tuple[Any, ...]:
        """The extra inputs of a chunk; ``size``: of the stream along the dimension that is cut."""
        if not self.slices or chunk.dim != BATCH:
            return extras
        return _sliced(extras, chunk, size)


Kinds = tuple[Any, ...]


def kinds_of(extras: tuple[Any, ...], x: Tensor) -> Kinds:
    """How extra inputs go with the samples and tokens of ``x``: for each tensor, which of its sizes are 1, and whether
    it has a batch.
    """
    batch = x.shape[BATCH] if x.dim() else 1

    def kind(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return tuple(size == 1 for size in leaf.shape), batch > 1 and leaf.dim() > 0 and leaf.shape[BATCH] == batch

    return tuple(map(kind, tree_leaves(extras)))


def _sliced(extras: tuple[Any, ...], chunk: Chunk, size: int) -> tuple[Any, ...]:
    def part(leaf: Any) -> Any:
        cut = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[BATCH] == size and size > 1
        return leaf.narrow(BATCH, chunk.start, chunk.length) if cut else leaf

    return tuple(tree_map(part, extra) for extra in extras)


def views_of(x: Tensor, chunks: Sequence[Chunk]) -> tuple[Tensor, ...]:
    """The chunks of ``x``, all from one graph node."""
    return torch.split(x, [p.length for p in chunks], chunks[0].dim)


class SharedDraws:
    """Lets each chunk that shares them draw the random numbers of the first one."""

    def __init__(self, x: Tensor) -> None:
        self.devices = accelerators_of([x])
        self.states: RandomStates | None = None

    def before(self, chunk: Chunk) -> None:
        """Set the generators for a chunk, or remember them, where it is the first."""
        if not chunk.shares:
            return
        if self.states is None:
            self.states = random_states(self.devices)
        else:
            set_random_states(self.states)


def parts_of(x: Tensor, chunks: Sequence[Chunk]) -> list[Tensor]:
    """Copies of the chunks of ``x``, through which gradients flow; they lie as the parts of a rebuilt state will."""
    views = views_of(x, chunks)
    dense = [canonical(view) for view in views]
    return [part.clone() if part is view else part for part, view in zip(dense, views, strict=True)]


def joined(parts: Sequence[Tensor], dim: int, like: Tensor) -> Tensor:
    """The state that these are the parts of, in the layout of another."""
    out, start = torch.empty_like(like), 0
    for part in parts:
        out.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
    return out


def concatenated(parts: Sequence[Tensor], dim: int, like: Tensor) -> Tensor:
    """These parts as one tensor through which gradients flow, in the layout of another (`torch.cat` knows no transposed
    one).

    It is never a view: FSDP2, and backward hooks, hand a view of it to the next block, and the chain goes on behind
    that.
    """
    out = torch.cat(list(parts), dim)
    return out if out.stride() == like.stride() else torch.empty_like(like, dtype=out.dtype).copy_(out)
