"""Units that run in chunks: of the batch, or of the tokens where a branch treats each by itself. Each chunk is rebuilt by itself.

Note [What may be cut]
    Along a dimension, F may be cut where F(x)[i] depends on x[i] alone. That is found on the example, with the model in eval mode
    (without dropout): a random half of the elements along the dimension is exchanged for others, and the results of the other half must
    stay the same to the bit, and the other way round; and the chunks, computed alone, must give what the whole gives (up to the rounding
    of matrix products of another size), so that F does not count positions either. Weights are moved a little meanwhile: a part of a
    branch that begins as zero (an output layer, a gate) hides what it will do once it has been trained. Branches that write buffers
    (batch statistics) are never cut. Branches that draw random numbers are cut along the batch alone: a mask over tokens that a whole
    sample shares must be one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from revwire._couplings import Rule
from revwire._errors import ConversionError
from revwire._numerics import canonical
from revwire._records import evaluate
from revwire._replay import Inventory, accelerators_of, preserved_random_state, random_states
from revwire._step import left_as_found

if TYPE_CHECKING:
    from revwire._module import Chain, Unit

Chunks = int | Mapping[str, int]
"""How many chunks: for all units, or for each glob over the names of units and hosts; the first that matches counts."""

BATCH = 0


class Chunk(NamedTuple):
    """A part of a state: ``length`` elements from ``start`` along ``dim``; ``first`` is the one that is undone last."""

    dim: int
    start: int
    length: int

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
        a, c, signs = (f.narrow(BATCH, self.start, self.length) if isinstance(f, Tensor) else f for f in (rule.a, rule.c, rule.signs))
        return Rule(a, rule.b, c, rule.bits, signs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cut:
    """How a unit may be cut.

    Attributes:
        count: the number of chunks.
        rank: dimensions of the stream for which that was found.
        dims: dimensions along which its branch treats every element by itself, the batch first.
        slices: whether its extra inputs are cut with the batch, where they have as many elements there.
        kinds: of the extra inputs for which that was found; with others (a mask that the example had not) a unit runs whole.
    """

    count: int
    rank: int
    dims: tuple[int, ...]
    slices: bool
    kinds: Kinds = ()

    def chunks(self, x: Tensor, extras: tuple[Any, ...]) -> tuple[Chunk, ...]:
        """The chunks in which the branch runs on this stream tensor and these extra inputs; none if it must stay whole."""
        found = self.chunks_of(x.shape)
        return found if found and kinds_of(extras, x) == self.kinds else ()

    def chunks_of(self, shape: Sequence[int]) -> tuple[Chunk, ...]:
        """The chunks of a stream of this shape, cut along the first dimension that has enough elements; none if it must stay whole."""
        if len(shape) != self.rank:
            return ()
        dim = next((d for d in self.dims if shape[d] >= self.count), max(self.dims, key=lambda d: shape[d]))
        size = shape[dim]
        if size < 2:
            return ()
        length = -(-size // self.count)
        return tuple(Chunk(dim, start, min(length, size - start)) for start in range(0, size, length))

    def extras(self, extras: tuple[Any, ...], chunk: Chunk, size: int) -> tuple[Any, ...]:
        """The extra inputs of a chunk; ``size``: of the stream along the dimension that is cut."""
        if not self.slices or chunk.dim != BATCH:
            return extras
        return _sliced(extras, chunk, size)


Kinds = tuple[Any, ...]


def kinds_of(extras: tuple[Any, ...], x: Tensor) -> Kinds:
    """How extra inputs go with the samples and tokens of ``x``: for each tensor, which of its sizes are 1, and whether it has a batch."""
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
    """These parts as one tensor through which gradients flow, in the layout of another (`torch.cat` knows no transposed one).

    It is never a view: FSDP2, and backward hooks, hand a view of it to the next block, and the chain goes on behind that.
    """
    out = torch.cat(list(parts), dim)
    return out if out.stride() == like.stride() else torch.empty_like(like).copy_(out)


# -- how many ----------------------------------------------------------------------------------------------------------


def refuse_no_chunks(chunks: Any) -> None:
    """Raise where this is no number of chunks.

    Raises:
        ConversionError: says what was got.
    """
    for count in chunks.values() if isinstance(chunks, Mapping) else (chunks,):
        if type(count) is not int or count < 1:
            raise ConversionError(f"chunks: got {count!r}; expected a number of chunks from 1, or a dict from globs to such numbers")


def wanted(chunks: Chunks, names: tuple[str, ...]) -> int:
    """The number of chunks of the unit that goes by these names."""
    if isinstance(chunks, int):
        return chunks
    return next((count for glob, count in chunks.items() if any(fnmatchcase(n, glob) for n in names)), 1)


# -- what may be cut ---------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    rank: int
    dims: tuple[int, ...]
    slices: bool
    kinds: Kinds


class Prober:
    """Finds, while a converted model runs, along which dimensions its units may be cut.

    Args:
        count: the most chunks that are wanted.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: dict[tuple[int, int], _Found] = {}
        self.draws: set[tuple[int, int]] = set()
        self.compares = True
        self.looks = False  # at a unit, in whose branch others may lie

    def __call__(self, chain: Chain, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> None:
        if self.looks:
            return
        self.looks = True
        try:
            with torch.no_grad(), preserved_random_state(accelerators_of([x])):
                self._look([(id(chain), place) for place in (unit.index, *unit.later)], unit, host, x.detach(), extras)
        finally:
            self.looks = False

    def _look(self, keys: list[tuple[int, int]], unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> None:
        if not self.compares:
            self.draws.update(keys if _draws(unit, host, x, extras) else ())
            return
        found = _separable(unit, host, x, extras, self.count)
        for key in keys:
            same = self.found.get(key, found) == found  # a unit that runs several times
            self.found[key] = found if same else found._replace(dims=())

    def cut(self, chain: Chain, place: int, count: int) -> Cut | None:
        """How the unit at a place of a chain may be cut into so many chunks, or None."""
        key = id(chain), place
        found = self.found.get(key)
        if count == 1 or found is None:
            return None
        dims = tuple(d for d in found.dims if d == BATCH or key not in self.draws)
        return Cut(count, found.rank, dims, found.slices, found.kinds) if dims else None


def probed(model: nn.Module, chains: Sequence[Chain], run: Callable[[], Any], count: int) -> Prober:
    """Run a converted model on its example in eval mode, and in train mode, and see how its units may be cut into ``count`` chunks.

    The model is left as it was. One that cannot run in train mode on the example counts as one that draws random numbers.

    Raises:
        ConversionError: the model fails in eval mode.
    """
    prober = Prober(count)
    with left_as_found(model), _modes_kept(model), torch.no_grad(), probing(chains, prober):
        model.eval()
        try:
            run()
        except Exception as error:
            raise ConversionError(
                f"{type(model).__name__}: chunks= looks at the model in eval mode, in which it failed on the example inputs "
                f"({type(error).__name__}: {error}); pass an example that it takes in eval mode, or leave chunks= out"
            ) from error
        prober.compares = False
        model.train()
        try:
            run()
        except Exception:  # noqa: BLE001 - anything: models want labels, or a larger batch, in train mode
            prober.draws.update(prober.found)
    return prober


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def probing(chains: Sequence[Chain], prober: Prober) -> Iterator[None]:
    """Let the prober see every unit that runs."""
    try:
        for chain in chains:
            chain.prober = prober
        yield
    finally:
        for chain in chains:
            chain.prober = None


def _draws(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> bool:
    devices = accelerators_of([x])
    before = random_states(devices)
    evaluate(unit, host, x, extras)
    after = random_states(devices)
    return any(not torch.equal(state, after[device]) for device, state in before.items())


def _separable(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], count: int) -> _Found:
    """Along which dimensions the branch treats every element by itself; see Note [What may be cut]."""
    none = _Found(x.dim(), (), False, kinds_of(extras, x))
    if unit.assigned or Inventory.of(unit.modules(host)).writers or _draws(unit, host, x, extras):
        return none
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(evaluate(unit, host, x, extras)[1])):
        return none  # side outputs would have to be joined
    with _moved_weights(unit.modules(host)):
        slices = next((s for s in (False, True) if x.dim() > 1 and _may_be_cut(unit, host, x, extras, BATCH, count, slices=s)), None)
        others = [d for d in range(1, x.dim() - 1) if _may_be_cut(unit, host, x, extras, d, count, slices=False)]
    return none._replace(dims=(*([] if slices is None else [BATCH]), *others), slices=bool(slices))


@contextmanager
def _moved_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give the modules, and all below them, other weights near their own, none of them zero."""
    kept = [(m, name, p) for root in modules for m in root.modules() for name, p in m._parameters.items() if p is not None]
    moved: dict[int, nn.Parameter] = {}
    try:
        for module, name, p in kept:
            if p.is_floating_point() and id(p) not in moved:
                size = 0.1 * float(p.detach().float().square().mean().sqrt()) + 0.01 if p.numel() else 0.0
                moved[id(p)] = nn.Parameter(p.detach() + size * torch.randn_like(p), requires_grad=p.requires_grad)
            module._parameters[name] = moved.get(id(p), p)
        yield
    finally:
        for module, name, p in kept:
            module._parameters[name] = p


def _may_be_cut(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], dim: int, count: int, *, slices: bool) -> bool:
    if dim == BATCH and x.shape[BATCH] == 1:
        x = torch.cat([x, x.roll(1, -1)])  # the batch of an example is often one
        if slices:
            return False
    if x.shape[dim] < 2 or not x.numel():
        return False
    cut = Cut(min(count, x.shape[dim]), x.dim(), (dim,), slices)
    try:
        whole = evaluate(unit, host, x, extras)[0]
        return (
            _independent(unit, host, x, extras, dim, whole)
            and _independent(unit, host, x, extras, dim, whole)
            and all(_alike(evaluate(unit, host, *_part(x, extras, p, cut))[0], p.of(whole)) for p in cut.chunks_of(x.shape))
        )
    except Exception:  # noqa: BLE001 - a branch that knows the size of its input fails on a part of it, in any way
        return False


def _part(x: Tensor, extras: tuple[Any, ...], chunk: Chunk, cut: Cut) -> tuple[Tensor, tuple[Any, ...]]:
    return chunk.of(x).clone(), cut.extras(extras, chunk, x.shape[chunk.dim])


def _independent(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], dim: int, whole: Tensor) -> bool:
    """Whether results stay, to the bit, where a random half of the elements along a dimension is exchanged; both ways round."""
    size = x.shape[dim]
    chosen = torch.randperm(size, device=x.device)
    other = x.roll(1, dim).mul(-1.5).add(x.abs().mean())
    for stay in (chosen[: size // 2], chosen[size // 2 :]):
        mixed = torch.empty_like(x).copy_(other).index_copy_(dim, stay, x.index_select(dim, stay))  # in the layout of x
        again = evaluate(unit, host, mixed, extras)[0]
        if not torch.equal(again.index_select(dim, stay), whole.index_select(dim, stay)) or torch.equal(again, whole):
            return False  # the second: it does not depend on its input at all, so nothing can be learned
    return True


def _alike(part: Tensor, whole: Tensor) -> bool:
    """Equal up to the rounding of matrix products of another size."""
    if part.shape != whole.shape or part.dtype != whole.dtype:
        return False
    allowed = 2e-2 if whole.dtype in (torch.bfloat16, torch.float16) else 1e-4
    size = float(whole.abs().amax())
    return float((part.double() - whole.double()).abs().amax()) <= allowed * size + 1e-30
