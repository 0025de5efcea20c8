"""Experiments on one branch: does it treat samples, tokens or windows each by itself, and what does it draw?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from revwire._runtime.chunks import BATCH, Chunk, Cut, Kinds, Windows, kinds_of, together
from revwire._runtime.unit import evaluate as evaluate_once
from revwire._streams.base import canonical
from revwire._streams.samples import alike
from revwire._surroundings.copies import recalled
from revwire._surroundings.holdings import Held, Known
from revwire._surroundings.inventory import Inventory
from revwire._surroundings.randomness import RandomStates, accelerators_of, random_states
from revwire._torch import LOOKS, TorchDispatchMode, storage_id, tree_leaves

if TYPE_CHECKING:
    from revwire._runtime.unit import Unit


class Separable(NamedTuple):
    rank: int
    dims: tuple[int, ...]
    slices: bool
    kinds: Kinds
    windows: tuple[Windows, ...] = ()
    open: bool = False  # the example has one sample, so it may or may not be cut along the batch


def evaluate(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """The branch on ``x``, with copies of what it may write to (a cache among its extra inputs)."""
    return evaluate_once(unit, host, x, tuple(map(recalled, extras)))


class Observed(NamedTuple):
    """One run of a branch.

    Attributes:
        traces: it draws random numbers, or writes to what its modules hold.
        decides: it takes values of a tensor into Python, where what is done with those of a part may be another thing
            (a module in the branch that tests the mean of its input). Constants among its weights are no such values.
        sides: its side outputs.
    """

    traces: bool
    decides: bool
    sides: tuple[Any, ...]


def observed_run(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> Observed:
    devices, modules = accelerators_of([x]), unit.modules(host)
    before, held = random_states(devices), Held.by(Known(), Inventory.of(modules), host.training)
    looks = _Looks(modules)
    with looks:
        sides = evaluate(unit, host, x, extras)[1]
    traces = held.was_changed() or not _same_states(before, random_states(devices))
    return Observed(traces, looks.found, sides)


class _Looks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether values of a tensor, but for those that the modules hold, are taken into Python."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = [*modules]
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOOKS:
            held = [t for m in self.modules for t in (*m.parameters(), *m.buffers()) if t.layout == torch.strided]
            known = {storage_id(t.untyped_storage()) for t in held}
            self.found |= any(storage_id(t.untyped_storage()) not in known for t in args if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


def _same_states(before: RandomStates, after: RandomStates) -> bool:
    return all(torch.equal(state, after[device]) for device, state in before.items())


def separable(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], counts: Sequence[int]) -> Separable:
    """Along which dimensions the branch treats every element, or every window, by itself; see Note [What may be cut] in
    `probe`.

    Beside the batch, the first dimension that has windows, or enough elements, is enough. A batch of one is looked at
    last, and only where nothing else may be cut: it takes two samples.
    """
    none, most = Separable(x.dim(), (), False, kinds_of(extras, x)), counts[-1]
    if Inventory.of(unit.modules(host)).writers:
        return none
    seen = observed_run(unit, host, x, extras)
    if seen.traces or seen.decides or any(isinstance(leaf, Tensor) for leaf in tree_leaves(seen.sides)):
        return none  # side outputs would have to be joined
    dims, windows = [], []
    with _moved_weights(unit.modules(host)):
        several = x.dim() > 1 and x.shape[BATCH] > 1
        slices = next(
            (s for s in (False, True) if several and _may_be_cut(unit, host, x, extras, BATCH, most, slices=s)), None
        )
        if slices is not None:
            dims.append(BATCH)
            if not slices:
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
    return none._replace(
        dims=tuple(dims), slices=bool(slices), windows=tuple(windows), open=x.dim() > 1 and not several
    )


def cuts_batch(unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], count: int) -> bool:
    """Whether the branch treats samples by themselves, where the example has one."""
    with _moved_weights(unit.modules(host)):
        return _may_be_cut(unit, host, torch.cat([x, x.roll(1, -1)]), extras, BATCH, count, slices=False)


@contextmanager
def _moved_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give the modules, and all below them, other weights near their own, none of them zero."""
    kept = [
        (m, name, p) for root in modules for m in root.modules() for name, p in m._parameters.items() if p is not None
    ]
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
    unit: Unit,
    host: nn.Module,
    x: Tensor,
    extras: tuple[Any, ...],
    dim: int,
    count: int,
    *,
    slices: bool,
    whole: Tensor | None = None,
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
    """The pieces along a dimension that the branch treats each by itself, if there are several; see Note [Windows] in
    `probe`.
    """
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
    fewer = [together(ends, count) for count in counts]
    merged = [n for n, borders in zip(counts, fewer, strict=True) if 1 < len(borders) < len(ends) and as_whole(borders)]
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


def shared_draws(
    unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...], found: Separable, count: int
) -> tuple[int, ...]:
    """The dimensions along which what the branch draws has the same shape for a chunk as for the whole."""

    def draws(x: Tensor, extras: tuple[Any, ...]) -> list[Any]:
        seen = _Draws(accelerators_of([x]))
        with seen:
            evaluate(unit, host, x, extras)
        seen.note_hidden()
        return seen.shapes

    ways: list[tuple[int, tuple[Windows, ...]]] = [
        *((d, ()) for d in found.dims),
        *((w.dim, (w,)) for w in found.windows),
    ]
    shared = []
    try:
        whole = draws(x, extras)
        for dim, windows in ways:
            cut = Cut(
                max(2, min(count, x.shape[dim])),
                found.rank,
                () if windows else (dim,),
                found.slices,
                found.kinds,
                windows,
            )
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
        """Note, as what equals nothing, that the generators have moved since the last operator that is known to
        draw.
        """
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
    """Whether results stay, to the bit, where a random half of the elements along a dimension is exchanged; both ways
    round.
    """
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
