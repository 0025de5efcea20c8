"""The branch of a unit, run with placeholders for what autograd saves; and what is noted in their place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import ref

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revwire._runtime.cells import Cell, Source, opened_cell
from revwire._runtime.chain import Chain
from revwire._runtime.chunks import Chunk
from revwire._runtime.entries import Stop, UnitRecord, meta_of
from revwire._runtime.faults import WROTE_INPUT, fault
from revwire._runtime.kinds import kind_of
from revwire._runtime.selective import Products
from revwire._runtime.unit import Unit, evaluate
from revwire._streams.base import Streams
from revwire._streams.samples import can_be_sampled, glance, is_random_state
from revwire._surroundings.buffers import Written, statistics_of
from revwire._surroundings.copies import Versions, detached
from revwire._surroundings.holdings import Held
from revwire._surroundings.inventory import Inventory, has_hooks, version_of
from revwire._surroundings.modes import NOTHING, stalls
from revwire._surroundings.settings import kernels_not_searched, searches_kernels
from revwire._surroundings.surroundings import Surroundings
from revwire._torch import checkpoint_stops_early
from revwire.couplings.base import Rule


class Evaluation(NamedTuple):
    """A branch that is to run, on all of its state or on a chunk of it.

    Attributes:
        chain, place: where its unit stands.
        rule: by which its result will enter the step.
        x, extras: the float value of x_k, and the extra inputs.
    """

    chain: Chain
    streams: Streams
    unit: Unit
    place: int
    host: nn.Module
    rule: Rule
    chunk: Chunk | None
    x: Tensor
    extras: tuple[Any, ...]

    @property
    def may_skip(self) -> bool:
        """Whether its recompute may leave out what is known anyway."""
        return bool(self.streams.witnesses) and self.unit.path not in self.chain.run_whole


def evaluated_as_is(
    chain: Chain, unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]
) -> tuple[Tensor, tuple[Any, ...]]:
    """(F_k(x_k), side outputs); autograd keeps what it saves.

    Raises:
        ReconstructionError: the branch wrote to its input.
    """
    version = version_of(x)
    f, sides = evaluate(unit, host, x, extras)
    _refuse_writes(unit, chain, x, version)
    return f, sides


def recorded(call: Evaluation, source: Source) -> tuple[UnitRecord, Tensor, tuple[Any, ...]]:
    """Run a branch with placeholders, which ``source`` will give tensors for: (its record, F_k(x_k), side outputs).

    Raises:
        ReconstructionError: the branch wrote to its input.
    """
    chain, x = call.chain, call.x
    if searches_kernels() and stalls(x.device):
        with kernels_not_searched():
            return recorded(call, source)
    version = version_of(x)
    record = _record(call)
    last: deque[tuple[int, Tensor]] = deque(maxlen=call.streams.witnesses)
    products = Products() if chain.selects(call.place) and call.may_skip else None
    try:
        pack = packer(record, x, last, source)
        if chain.observer and (see := chain.observer.on_branch(x, record.standing)):
            pack = seen(pack, see)
        with saved_tensors_hooks(pack, opened_cell), products or NOTHING:
            f, sides = _evaluated(call, record)
        _refuse_writes(call.unit, chain, x, version)
        if products:
            products.settle(f)
            record.products = products
        if not record.held.reached.sets_back:
            record.surroundings.settle()
        if record.held.generators or call.unit.known.draws[call.host.training] is None:
            record.held.settle(call.unit.known, call.host.training)
        if record.held.reached.changes:
            call.unit.known.note_moved(record.owned)
        record.witnesses = [number for number, _ in last]
        record.sample = call.streams.sample(f, [t for _, t in last])
    finally:
        last.clear()  # see `packer`
    return record, f, sides


def _record(call: Evaluation) -> UnitRecord:
    unit, host, x = call.unit, call.host, call.x
    inputs: Versions = []
    extras = tuple([detached(e, inputs) for e in call.extras]) if call.extras else ()
    owned = Inventory.of(unit.modules(host))
    return UnitRecord(
        unit=unit,
        host=host,
        rule=call.rule,
        dtype=x.dtype,
        input_requires_grad=x.requires_grad,
        extras=extras,
        inputs=inputs,
        owned=owned,
        held=Held.by(unit.known, owned, host.training),
        chunk=call.chunk,
        kind=kind_of(x),
        stop=Stop() if _may_stop(call) else None,
        surroundings=Surroundings.capture([x, *[t for t, _ in inputs], *owned.weights]),
    )


def _may_stop(call: Evaluation) -> bool:
    """Whether the recompute may stop early; see Note [What need not be rebuilt] in `recompute`."""
    if not (call.chain.checkpoints(call.place) and call.may_skip and checkpoint_stops_early()):
        return False
    return not any(has_hooks(m) for root in call.unit.modules(call.host) for m in root.modules())


def _evaluated(call: Evaluation, record: UnitRecord) -> tuple[Tensor, tuple[Any, ...]]:
    """Run the branch; of what it writes to buffers, the record keeps what was there."""
    writers = record.owned.writing
    if not (writers or record.held.reached.changes):
        return evaluate(call.unit, call.host, call.x, call.extras)
    with record.held.undisturbed(writers):
        written = Written(writers, unseen=record.held.reached.unseen)
        statistics = statistics_of(writers) if record.stop else {}
        f, sides = evaluate(call.unit, call.host, call.x, call.extras)
        record.buffers = {**statistics, **written.copies()}
        return f, sides


def packer(record: UnitRecord, x: Tensor, last: deque[tuple[int, Tensor]], source: Source) -> Callable[[Tensor], Cell]:
    """The hook that packs what the branch saves. Autograd keeps it with every saved tensor: it must not own a graph.

    ``last`` collects witnesses: tensors that the branch computed. Neither its input, nor weights and views of them,
    which FSDP takes away as soon as the branch has run; a leaf that needs a gradient is a weight. Where the recompute
    stops early, all but its input is looked at; and buffers that are saved must not be written to, which the version
    counters tell, as in autograd.
    """
    saved, owned, stop = record.saved, record.owned, record.stop
    inputs = {id(x), id(x._base)}
    known = inputs.union(map(id, owned.weights))
    buffers = {id(t) for _, then, is_weight in owned.tables if not is_weight for t in then.values()} if stop else ()

    def pack(t: Tensor) -> Cell:
        number, owner = len(saved), t._base
        if owner is None:
            owner = t
        if id(owner) not in known:
            if not owner.is_leaf:
                if can_be_sampled(t):
                    last.append((number, t))
            elif owner.requires_grad or id(owner) in buffers:
                known.add(id(owner))  # a weight from outside of the unit's modules, or a buffer
                owned.note(owner)
            elif stop:
                stop.constants.append((ref(owner), version_of(owner)))
        if stop and id(owner) not in inputs:
            _look(record, stop, number, t)
        saved.append(meta_of(t))
        return [None, number, source]

    return pack


def given_up(
    record: UnitRecord,
    x: Tensor,
    cells: Sequence[Cell],
    source: Source,
    last: deque[tuple[int, Tensor]],
) -> None:
    """As `packer` for what was saved in cells, where no recompute stops early: from now on ``source`` rebuilds it."""
    owned, most, saved = record.owned, last.maxlen or 0, record.saved
    known = {id(x), id(x._base), *map(id, owned.weights)}
    tensors: list[Tensor] = [cell[0] for cell in cells]
    saved += map(meta_of, tensors)
    for number, t, cell in zip(range(len(cells) - 1, -1, -1), reversed(tensors), reversed(cells), strict=True):
        cell[:] = None, number, source
        owner = t._base
        if owner is None:
            owner = t
        if not owner.is_leaf:
            if len(last) < most and id(owner) not in known and can_be_sampled(t):
                last.appendleft((number, t))
        elif owner.requires_grad and id(owner) not in known:
            known.add(id(owner))  # a weight from outside of the unit's modules
            owned.note(owner)


def seen(pack: Callable[[Tensor], Cell], see: Callable[[Tensor], None]) -> Callable[[Tensor], Cell]:
    def both(t: Tensor) -> Cell:
        see(t)
        return pack(t)

    return both


def _look(record: UnitRecord, stop: Stop, number: int, t: Tensor) -> None:
    """Take a sample of what a branch saves; where it has none, the branch is computed to its end in its recompute.

    Of the state of a generator none is needed: what attention drew from it shows in the result that it saves, too.
    """
    if is_random_state(t):
        return
    found = glance(t) if record.stop else None
    if found is None:
        record.stop = None
    else:
        stop.looked.append(number)
        stop.looks.append(found)


def _refuse_writes(unit: Unit, chain: Chain, x: Tensor, version: int) -> None:
    if version_of(x) != version:
        raise fault(unit, chain, *WROTE_INPUT)
