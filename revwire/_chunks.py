"""Units that run in chunks: of the batch, of tokens, of windows, where a branch treats each by itself. Each chunk is rebuilt by itself.

Note [What may be cut]
    Along a dimension, F may be cut where F(x)[i] depends on x[i] alone. That is found on the example, with the model in eval mode
    (without dropout): a random half of the elements along the dimension is exchanged for others, and the results of the other half must
    stay the same to the bit, and the other way round; and the chunks, computed alone, must give what the whole gives (up to the rounding
    of matrix products of another size), so that F does not count positions either. Weights are moved a little meanwhile: a part of a
    branch that begins as zero (an output layer, a gate) hides what it will do once it has been trained. Branches that write buffers
    (batch statistics) are never cut.

Note [Windows]
    Where elements act on each other, they may do so in pieces that do not (the windows of attention, along time). Where the first two end
    is found by exchanging one element of each; the others are taken to be as long as the second, and then any of them are exchanged,
    of which the rest must know nothing. A window that is shifted around the border is two pieces. What pieces there are depends on the
    size of the input (where one window covers all, it is not shifted), so such a cut holds for the sizes of the example alone; a unit
    runs whole on others. Neighbouring pieces are one chunk only in those numbers of chunks for which the branch, run on each, was seen to
    give the same as on the whole: a branch that shifts its windows would shift those of the chunk.

Note [Random numbers in chunks]
    Dropout draws a number for each element, so chunks of samples draw theirs one after the other. Along other dimensions that would break
    what a whole sample shares (stochastic depth drops its branch or does not). So a branch that draws random numbers is cut along a
    dimension other than the batch only where all that it draws has the same shape for a chunk as for the whole; then each chunk draws the
    same numbers again (`Chunk.shares`), and the generator ends where a plain forward leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from revwire._couplings import Rule
from revwire._errors import ConversionError
from revwire._numerics import canonical
from revwire._records import evaluate as evaluate_once
from revwire._records import recalled
from revwire._replay import Inventory, RandomStates, accelerators_of, preserved_random_state, random_states, set_random_states
from revwire._step import left_as_found

if TYPE_CHECKING:
    from revwire._module import Chain, Unit

Chunks = int | Mapping[str, int]
"""How many chunks: for all units, or for each glob over the names of units and hosts; the first that matches counts."""

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
        a, c, signs = (f.narrow(BATCH, self.start, self.length) if isinstance(f, Tensor) else f for f in (rule.a, rule.c, rule.signs))
        return Rule(a, rule.b, c, rule.bits, signs)  # type: ignore[arg-type]


class Windows(NamedTuple):
    """Pieces along a dimension that a branch treats each by itself; see Note [Windows].

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
        return _together(self.ends, count) if count in self.merged else list(self.ends)


def _together(ends: Sequence[int], count: int) -> list[int]:
    """The ends of runs of pieces, each as long as it can be without being longer than the ``count``-th part of all (or one piece)."""
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
        kinds: of the extra inputs for which that was found; with others (a mask that the example had not) a unit runs whole.
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
        """The chunks in which the branch runs on this stream tensor and these extra inputs; none if it must stay whole."""
        found = self.chunks_of(x.shape)
        return found if found and kinds_of(extras, x) == self.kinds else ()

    def chunks_of(self, shape: Sequence[int]) -> tuple[Chunk, ...]:
        """The chunks of a stream of this shape, along the first dimension that has enough of them; none if it must stay whole."""
        if len(shape) != self.rank:
            return ()
        ways: list[tuple[int, int, Windows | None]] = [(shape[d], d, None) for d in self.dims]
        ways += [(len(w.ends), w.dim, w) for w in self.windows if w.sizes == tuple(shape[1:])]
        size, dim, windows = next((way for way in ways if way[0] >= self.count), max(ways, key=lambda way: way[0], default=(0, 0, None)))
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
    windows: tuple[Windows, ...] = ()
    open: bool = False  # the example has one sample, so it may or may not be cut along the batch


class Prober:
    """Finds, while a converted model runs, along which dimensions its units may be cut.

    Args:
        counts: the numbers of chunks that are wanted.
    """

    def __init__(self, counts: Iterable[int]) -> None:
        self.counts = sorted(set(counts))
        self.found: dict[tuple[int, int], _Found] = {}
        self.draws: dict[tuple[int, int], tuple[int, ...]] = {}  # the dimensions along which a unit that draws may share what it draws
        self.stage: Literal["dimensions", "draws", "batch"] = "dimensions"
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
        if self.stage == "draws":
            if any(key in self.found for key in keys) and _draws(unit, host, x, extras):
                seen = next(self.found[key] for key in keys if key in self.found)
                self.draws.update(dict.fromkeys(keys, _shared(unit, host, x, extras, seen, self.counts[-1])))
            return
        if self.stage == "batch":
            open_ = [key for key in keys if key in self.found and self.found[key].open and not self._usable(key)]
            if open_ and _cuts_batch(unit, host, x, extras, self.counts[-1]):
                self.found.update({key: self.found[key]._replace(dims=(BATCH, *self.found[key].dims)) for key in open_})
            return
        found = _separable(unit, host, x, extras, self.counts)
        for key in keys:
            same = self.found.get(key, found) == found  # a unit that runs several times
            self.found[key] = found if same else found._replace(dims=(), windows=(), open=False)

    def _usable(self, key: tuple[int, int]) -> tuple[tuple[int, ...], tuple[Windows, ...]] | None:
        """The dimensions along which a unit may be cut, and its windows, if there are any; those that its random numbers allow."""
        found, shared = self.found[key], self.draws.get(key)
        dims = tuple(d for d in found.dims if shared is None or d == BATCH or d in shared)
        windows = tuple(w for w in found.windows if shared is None or w.dim in shared)
        return (dims, windows) if dims or windows else None

    @property
    def unsettled(self) -> bool:
        """Whether there are units that may be cut along the batch, if at all."""
        return any(found.open and not self._usable(key) for key, found in self.found.items())

    def cut(self, chain: Chain, place: int, count: int) -> Cut | None:
        """How the unit at a place of a chain may be cut into so many chunks, or None."""
        key = id(chain), place
        found = self.found.get(key)
        if count == 1 or found is None:
            return None
        usable = self._usable(key)
        if usable is None:
            return None
        return Cut(count, found.rank, usable[0], found.slices, found.kinds, usable[1], self.draws.get(key, ()))

    @property
    def cuts_something(self) -> bool:
        """Whether any unit may be cut."""
        return any(found.dims or found.windows for found in self.found.values())


def probed(model: nn.Module, chains: Sequence[Chain], run: Callable[[], Any], counts: Iterable[int]) -> Prober:
    """Run a converted model on its example in eval mode, and in train mode, and see how its units may be cut into so many chunks.

    The model is left as it was. One that cannot run in train mode on the example counts as one that draws random numbers.

    Raises:
        ConversionError: the model fails in eval mode.
    """
    prober = Prober(counts)
    with left_as_found(model), _modes_kept(model), torch.no_grad(), probing(chains, prober):
        model.eval()
        try:
            run()
        except Exception as error:
            raise ConversionError(
                f"{type(model).__name__}: chunks= looks at the model in eval mode, in which it failed on the example inputs "
                f"({type(error).__name__}: {error}); pass an example that it takes in eval mode, or leave chunks= out"
            ) from error
        prober.stage = "draws"
        model.train()
        try:
            run()
        except Exception:  # noqa: BLE001 - anything: models want labels, or a larger batch, in train mode
            prober.draws.update(dict.fromkeys(prober.found, ()))
        if prober.unsettled:
            prober.stage = "batch"
            model.eval()
            run()
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


def evaluate(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """The branch on ``x``, with copies of what it may write to (a cache among its extra inputs)."""
    return evaluate_once(unit, host, x, tuple(map(recalled, extras)))


def _draws(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> bool:
    devices = accelerators_of([x])
    before = random_states(devices)
    evaluate(unit, host, x, extras)
    return not _same_states(before, random_states(devices))


def _same_states(before: RandomStates, after: RandomStates) -> bool:
    return all(torch.equal(state, after[device]) for device, state in before.items())


def _separable(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], counts: Sequence[int]) -> _Found:
    """Along which dimensions the branch treats every element, or every window, by itself; see Note [What may be cut].

    Beside the batch, the first dimension that has windows, or enough elements, is enough. A batch of one is looked at last, and only where
    nothing else may be cut: it takes two samples.
    """
    none, most = _Found(x.dim(), (), False, kinds_of(extras, x)), counts[-1]
    if unit.assigned or Inventory.of(unit.modules(host)).writers or _draws(unit, host, x, extras):
        return none
    if any(isinstance(leaf, Tensor) for leaf in tree_leaves(evaluate(unit, host, x, extras)[1])):
        return none  # side outputs would have to be joined
    dims, windows = [], []
    with _moved_weights(unit.modules(host)):
        several = x.dim() > 1 and x.shape[BATCH] > 1
        slices = next((s for s in (False, True) if several and _may_be_cut(unit, host, x, extras, BATCH, most, slices=s)), None)
        if slices is not None:
            dims.append(BATCH)
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(extras)):
                x = canonical(x[:1])  # one sample tells the rest
        whole = evaluate(unit, host, x, extras)[0]
        for d in range(1, x.dim() - 1):
            if _may_be_cut(unit, host, x, extras, d, most, slices=False, whole=whole):
                dims.append(d)
            else:
                found = _windows(unit, host, x, extras, d, counts, whole)
                windows += [] if found is None else [found]
            if windows or (dims[-1:] == [d] and x.shape[d] >= most):
                break
    return none._replace(dims=tuple(dims), slices=bool(slices), windows=tuple(windows), open=x.dim() > 1 and not several)


def _cuts_batch(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], count: int) -> bool:
    """Whether the branch treats samples by themselves, where the example has one."""
    with _moved_weights(unit.modules(host)):
        return _may_be_cut(unit, host, torch.cat([x, x.roll(1, -1)]), extras, BATCH, count, slices=False)


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


def _may_be_cut(
    unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], dim: int, count: int, *, slices: bool, whole: Tensor | None = None
) -> bool:
    if x.shape[dim] < 2 or not x.numel():
        return False
    cut = Cut(min(count, x.shape[dim]), x.dim(), (dim,), slices)
    try:
        whole = evaluate(unit, host, x, extras)[0] if whole is None else whole
        return all(_independent(unit, host, x, extras, dim, whole) for _ in range(1 if x.shape[dim] == 2 else 2)) and (
            all(alike(evaluate(unit, host, *_part(x, extras, p, cut))[0], p.of(whole)) for p in cut.chunks_of(x.shape))
        )
    except Exception:  # noqa: BLE001 - a branch that knows the size of its input fails on a part of it, in any way
        return False


def _windows(
    unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], dim: int, counts: Sequence[int], whole: Tensor
) -> Windows | None:
    """The pieces along a dimension that the branch treats each by itself, if there are several; see Note [Windows]."""
    size = x.shape[dim]
    if size < 2 or not x.numel():
        return None

    def as_whole(borders: Sequence[int]) -> bool:
        chunks = [Chunk(dim, start, end - start) for start, end in pairwise([0, *borders])]
        try:
            return all(alike(evaluate(unit, host, p.of(x).clone(), extras)[0], p.of(whole)) for p in chunks)
        except Exception:  # noqa: BLE001 - as in `_may_be_cut`
            return False

    try:
        ends = _pieces(lambda mixed: evaluate(unit, host, mixed, extras)[0], x, dim, whole)
    except Exception:  # noqa: BLE001 - as in `_may_be_cut`
        return None
    if len(ends) < 2 or not as_whole(ends):
        return None
    together = [_together(ends, count) for count in counts]
    merged = [n for n, borders in zip(counts, together, strict=True) if 1 < len(borders) < len(ends) and as_whole(borders)]
    return Windows(dim, ends, tuple(merged), tuple(x.shape[1:]))


def _pieces(branch: Callable[[Tensor], Tensor], x: Tensor, dim: int, whole: Tensor) -> tuple[int, ...]:
    """Where the pieces end, the second of which tells how long the others are; nothing where there are none."""
    size, other = x.shape[dim], _other(x, dim)
    around = [d for d in range(x.dim()) if d != dim]

    def changed(elements: Tensor) -> Tensor:
        elements = elements.to(x.device)
        mixed = torch.empty_like(x).copy_(x).index_copy_(dim, elements, other.index_select(dim, elements))
        return (branch(mixed) != whole).amax(around).nonzero().flatten().cpu()

    def end_of(start: int) -> int:
        end, reach = start, start + 1
        while end < reach:
            end = reach
            found = changed(torch.arange(start, end))
            if not len(found) or int(found[0]) < start:
                return 0
            reach = int(found[-1]) + 1
        return end

    first = end_of(0)
    second = end_of(first) if 0 < first < size else 0
    if not second:
        return ()
    ends = torch.tensor([first, *range(second, size, second - first), size])
    if len(ends) > 2 and int(ends[-1] - ends[-2]) == 0:
        ends = ends[:-1]
    piece_of = torch.bucketize(torch.arange(size), ends, right=True)
    alternate = torch.arange(len(ends)) % 2 == 0
    for moved in (alternate, ~alternate, torch.rand(len(ends)) < 0.5, torch.rand(len(ends)) < 0.5):
        chosen = moved[piece_of]
        if chosen.any() and not chosen[changed(chosen.nonzero().flatten())].all():
            return ()
    return tuple(ends.tolist())


def _shared(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], found: _Found, count: int) -> tuple[int, ...]:
    """The dimensions along which what the branch draws has the same shape for a chunk as for the whole."""

    def draws(x: Tensor, extras: tuple[Any, ...]) -> list[Any]:
        seen = _Draws(accelerators_of([x]))
        with seen:
            evaluate(unit, host, x, extras)
        seen.note_hidden()
        return seen.shapes

    ways: list[tuple[int, tuple[Windows, ...]]] = [*((d, ()) for d in found.dims), *((w.dim, (w,)) for w in found.windows)]
    shared = []
    try:
        whole = draws(x, extras)
        for dim, windows in ways:
            cut = Cut(max(2, min(count, x.shape[dim])), found.rank, () if windows else (dim,), found.slices, found.kinds, windows)
            chunks = cut.chunks_of(x.shape)
            if whole and chunks and all(draws(*_part(x, extras, p, cut)) == whole for p in chunks):
                shared.append(dim)
    except Exception:  # noqa: BLE001 - as in `_may_be_cut`
        return ()
    return tuple(shared)


class _Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which operators draw random numbers, and the shapes of what they give."""

    def __init__(self, devices: tuple[torch.device, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices = devices
        self.states = random_states(devices)
        self.shapes: list[Any] = []

    def note_hidden(self) -> None:
        """Note, as what equals nothing, that the generators have moved since the last operator that is known to draw."""
        if not _same_states(self.states, random_states(self.devices)):
            self.shapes.append(object())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        self.note_hidden()
        before = random_states(self.devices)
        out = func(*args, **(kwargs or {}))
        self.states = random_states(self.devices)
        if not _same_states(before, self.states):  # attention draws only where it drops
            self.shapes.append((func, [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]))
        return out


def _part(x: Tensor, extras: tuple[Any, ...], chunk: Chunk, cut: Cut) -> tuple[Tensor, tuple[Any, ...]]:
    return chunk.of(x).clone(), cut.extras(extras, chunk, x.shape[chunk.dim])


def _independent(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], dim: int, whole: Tensor) -> bool:
    """Whether results stay, to the bit, where a random half of the elements along a dimension is exchanged; both ways round."""
    size, other = x.shape[dim], _other(x, dim)
    chosen = torch.randperm(size, device=x.device)
    for stay in (chosen[: size // 2], chosen[size // 2 :]):
        mixed = torch.empty_like(x).copy_(other).index_copy_(dim, stay, x.index_select(dim, stay))  # in the layout of x
        again = evaluate(unit, host, mixed, extras)[0]
        if not torch.equal(again.index_select(dim, stay), whole.index_select(dim, stay)) or torch.equal(again, whole):
            return False  # the second: it does not depend on its input at all, so nothing can be learned
    return True


def _other(x: Tensor, dim: int) -> Tensor:
    """Other values than those of ``x``, of the same magnitude."""
    return x.roll(1, dim).mul(-1.5).add(x.abs().mean())


def alike(part: Tensor, whole: Tensor) -> bool:
    """Whether they are equal, up to the rounding of matrix products of another size."""
    if part.shape != whole.shape or part.dtype != whole.dtype:
        return False
    if part.is_complex():
        part, whole = torch.view_as_real(part), torch.view_as_real(whole)
    if not part.is_floating_point():
        return torch.equal(part, whole)
    finite = whole[whole.isfinite()]
    size = float(finite.abs().amax()) if finite.numel() else 0.0
    allowed = size * {torch.float64: 1e-7, torch.float32: 1e-4}.get(part.dtype, 2e-2) + 1e-30
    return torch.allclose(part, whole, rtol=0, atol=allowed, equal_nan=True)
