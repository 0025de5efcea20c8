"""A unit that the host's own code runs: its beginning, where the code first uses a state, and its end, where it adds.

What `run` does at once is done in two steps here: `begun`, before the code's first call with the state, and `ended`,
when the residual add comes.
"""

from __future__ import annotations

import warnings
from collections import deque
from functools import partial

import torch
from torch import Tensor, nn

from revwire._runtime.chain import Chain
from revwire._runtime.entries import Stop, UnitRecord
from revwire._runtime.functions import later, step
from revwire._runtime.kinds import kind_of
from revwire._runtime.links import Link
from revwire._runtime.replay import Replay
from revwire._runtime.run import entered, left, outside_inference_mode, relayout, result_dtype
from revwire._runtime.saving import given_up, packer, seen
from revwire._runtime.segment import Segment
from revwire._runtime.unit import Unit
from revwire._runtime.unit_run import UnitRun
from revwire._streams.base import laid_out
from revwire._surroundings.copies import Versions, detached
from revwire._surroundings.holdings import NO_HOLDINGS
from revwire._surroundings.inventory import Inventory, has_hooks, version_of
from revwire._torch import checkpoint_stops_early


def begun(chain: Chain, unit: Unit, host: nn.Module, x: Tensor, link: Link | None) -> Segment:
    """Begin a unit on the tensor ``x``; where it had no link, a chain begins, and the segment has another ``x``."""
    x, link = entered(chain, unit, host, x, link, ())
    previous, current = link.carriers(x)
    run = UnitRun(link.tape, unit, host, ())
    previous, share = later(run, previous)
    return Segment(run, x, link, (previous, current, share))


def ended(segment: Segment, value: Tensor, unit: Unit, strides: tuple[int, ...] | None = None) -> Tensor | None:
    """Step to the next state by what a branch gave; ``unit``: as which; ``strides``: of the next state, where they are
    others. None where the add must be made as it was written, as the state was written to.
    """
    run, x = segment.run, segment.x
    tape, chain = run.tape, run.tape.chain
    if version_of(x) != segment.version or tape.keep != torch.is_grad_enabled():
        return None
    previous, current, share = segment.carriers
    f = value if value.shape == x.shape else value.expand_as(x)
    with run:
        if unit.kind != run.unit.kind:
            run.become(unit)
        if segment.rewinds and not _put_on_tape(segment, value, f):
            run.keep()
        segment.let_go()
        dtype = result_dtype(run.unit, x, f)
        out = outside_inference_mode(step, run, previous, current, f, share, dtype)
        run.join(out)
    del previous  # where the chain ends, its streams are merged: as few tensors as can be are there meanwhile
    out = left(segment.link, run.unit, out, current, dtype, kind_of(x))
    return out if strides is None else relayout(chain, partial(laid_out, strides=strides), out)


def _put_on_tape(segment: Segment, value: Tensor, f: Tensor) -> bool:
    """Give the tape what a recompute needs, and give up what the branch saved; False where it cannot be made again."""
    run = segment.run
    chain, tape = run.tape.chain, run.tape
    number = segment.number(value)
    assert number is not None
    if not (segment.calls and segment.settle()):
        return False
    found = segment.branch(number)
    if found is None:
        _warn_stored(chain, run.unit)
        return False
    replay, cells = found
    record = _record(segment, replay)
    last: deque[tuple[int, Tensor]] = deque(maxlen=tape.streams.witnesses)
    source = tape.source(tape, len(tape.records))
    see = chain.observer.on_branch(segment.x, record.standing) if chain.observer else None
    try:
        if see is None and record.stop is None:
            given_up(record, segment.x, cells, source, last)
        else:
            pack = packer(record, segment.x, last, source)
            pack = pack if see is None else seen(pack, see)
            for cell in cells:
                cell[:] = pack(cell[0])
        if segment.products is not None and segment.whole:
            segment.products.settle(f)
            record.products = segment.products
        record.witnesses = [n for n, _ in last]
        record.sample = tape.streams.sample(f, [t for _, t in last])
    finally:
        last.clear()  # see `packer`
    if segment.whole:
        segment.cells.clear()
    run.take(record, segment.x, f, ())
    return True


def _record(segment: Segment, replay: Replay) -> UnitRecord:
    run, inputs, weights = segment.run, Versions(), list[Tensor]()
    for number, t in replay.held.items():
        if t.is_leaf and t.requires_grad:
            weights.append(t)
        else:
            replay.held[number] = detached(t, inputs)
    owned, *others = segment.modules or [Inventory.of(())]
    for other in others:
        owned.take_up(other)
    for weight in weights:
        owned.note(weight)
    return UnitRecord(
        unit=run.unit,
        host=run.host,
        rule=run.rule,
        dtype=segment.x.dtype,
        input_requires_grad=segment.x.requires_grad,
        extras=(),
        inputs=inputs,
        owned=owned,
        held=NO_HOLDINGS,
        buffers=segment.buffers,
        stop=Stop() if _may_stop(segment) else None,
        surroundings=segment.surroundings,
        replay=replay,
        kind=kind_of(segment.x),
    )


def _may_stop(segment: Segment) -> bool:
    """Whether the recompute may stop early; see Note [What need not be rebuilt] in `recompute`."""
    if not (segment.checkpoints and segment.may_skip and checkpoint_stops_early()):
        return False
    return not any(has_hooks(m) for owned in segment.modules for m in owned.modules.values())


def _warn_stored(chain: Chain, unit: Unit) -> None:
    if unit.path not in chain.told:
        chain.told.add(unit.path)
        warnings.warn(
            f"{unit.where(chain.name)}: got a branch that writes in place to a tensor from outside of it, and so "
            "cannot be run twice; expected writes to its own tensors. Its activations are kept, with right gradients; "
            "write to a clone to have them rebuilt",
            stacklevel=2,
        )
