"""A unit that the host's own code runs: its beginning, where the code first uses a state, and its end, where it adds.

What `run` does at once is done in two steps here: `begun`, before the code's first call with the state, and `ended`,
when the residual add comes.
"""

from __future__ import annotations

import warnings
from collections import deque
from dataclasses import replace

import torch
from torch import Tensor, nn

from revwire._runtime import functions as _engine
from revwire._runtime.chain import Chain, Kept
from revwire._runtime.entries import Stop, UnitRecord
from revwire._runtime.links import Link
from revwire._runtime.replay import Replay
from revwire._runtime.rewind import unpacker
from revwire._runtime.run import _begin, _give_out, _in_grad_mode, _link_of, _result_dtype
from revwire._runtime.segment import Segment
from revwire._runtime.tape import Tape
from revwire._runtime.unit import Unit
from revwire._surroundings.copies import detached
from revwire._surroundings.inventory import Inventory, hooked, version_of
from revwire._surroundings.modes import stops_early
from revwire._surroundings.surroundings import Surroundings


def stream_of(chain: Chain, x: Tensor) -> Link | None:
    """The link of a tensor that is the newest state of a chain."""
    return _link_of(chain, None, x)


def begun(chain: Chain, unit: Unit, host: nn.Module, x: Tensor, link: Link | None) -> Segment:
    """Begin a unit on the tensor ``x``; where it had no link, a chain begins, and the segment has another ``x``."""
    if chain.meter:
        chain.meter.enter(chain, unit)
    if link is None:
        x, link = _begin(chain, unit, host, x)
    elif link.tape.keep != torch.is_grad_enabled():
        link = _in_grad_mode(chain, unit.path, link, x)
    tape = link.tape
    previous, current = link.carriers(x)
    previous, share = _engine.later(tape, unit, previous)
    _, state = tape.intact_state()
    place = unit.place(tape.position)
    assert place is not None
    tape.now = tape._rule(unit, place, state)
    tape.kept = None
    rewinds = tape.rewinds and not tape._keeps(place)
    segment = Segment(unit, host, x, link, rewinds)
    segment.carriers, segment.share, segment.rule = (previous, current), share, tape.now
    if rewinds:
        segment.products = tape._products(unit)
        segment.statistics = chain.checkpoints(place)
    return segment


def given_up(segment: Segment) -> None:
    """The unit does not come to its add: what it saved stays saved."""
    tape = segment.link.tape
    tape.kept = None
    segment.let_go()


def ended(segment: Segment, value: Tensor, unit: Unit) -> Tensor | None:
    """Step to the next state by what a branch gave; ``unit``: as which. None where the add must be made as it was
    written, as the state was written to.
    """
    tape, x, chain = segment.link.tape, segment.x, segment.link.tape.chain
    if version_of(x) != segment.version:
        return None
    if tape.keep != torch.is_grad_enabled():
        return None
    previous, current = segment.carriers
    f = value if value.shape == x.shape else value.expand_as(x)
    tape.now = segment.rule
    if unit.kind != segment.unit.kind:
        place = unit.place(tape.position)
        assert place is not None
        tape.now = tape._rule(unit, place, tape.intact_state()[1])
    if segment.rewinds and not _put_on_tape(segment, tape, value, f, unit):
        tape.kept = Kept()
    segment.let_go()
    dtype, link = _result_dtype(unit, x, f), segment.link
    if torch.is_inference_mode_enabled():  # inference tensors have no version: a link could not tell a write to them
        with torch.inference_mode(False), torch.no_grad():
            out = _give_out(chain, link, _engine.step(tape, unit, previous, current, f), current, dtype)
    else:
        out = _give_out(chain, link, _engine.step(tape, unit, previous, current, f, segment.share), current, dtype)
    if chain.meter:
        chain.meter.leave(chain, unit, tape, out)
    return out


def _put_on_tape(segment: Segment, tape: Tape, value: Tensor, f: Tensor, unit: Unit) -> bool:
    """Give the tape what a recompute needs, and give up what the branch saved; False where it cannot be made again."""
    number = segment.number(value)
    assert number is not None
    segment.settle()
    found = segment.branch(number)
    if found is None:
        _warn_stored(tape.chain, unit)
        return False
    replay, cells = found
    record = _record(segment, tape, replay, unit)
    last: deque[tuple[int, Tensor]] = deque(maxlen=tape.streams.witnesses)
    pack, source = tape._packer(record, segment.x, last), unpacker(tape, len(tape.records))
    if tape.chain.meter:
        pack = tape.chain.meter.seeing(pack, record, segment.x)
    try:
        for cell in cells:
            assert cell.tensor is not None
            cell.give_up(pack(cell.tensor), source)
        if segment.products is not None and segment.whole:
            segment.products.settle(f)
            record.products = segment.products
        record.witnesses = [n for n, _ in last]
        record.sample = tape.streams.sample(f, [t for _, t in last])
    finally:
        last.clear()
    if tape.chain.modes is not None or tape.chain.meter:
        record.narrow = tape._is_narrow(f, ())
    if tape.start is None and (segment.x.requires_grad or f.requires_grad or record.saved):
        tape.start = len(tape.records)
    tape._open = record
    return True


def _record(segment: Segment, tape: Tape, replay: Replay, unit: Unit) -> UnitRecord:
    inputs, weights = segment.inputs, list[Tensor]()
    for number, t in replay.held.items():
        if t.is_leaf and t.requires_grad:
            weights.append(t)
        else:
            replay.held[number] = detached(t, inputs)
    owned = Inventory.of(segment.modules)
    for weight in weights:
        owned.note(weight)
    return UnitRecord(
        unit=unit,
        host=segment.host,
        rule=tape.now,
        dtype=segment.x.dtype,
        input_requires_grad=segment.x.requires_grad,
        extras=(),
        inputs=inputs,
        owned=owned,
        attributes=segment.attributes,
        buffers=segment.buffers,
        stop=Stop() if _may_stop(segment, tape) else None,
        surroundings=Surroundings(
            segment.devices, {}, {kind: (on, dtype) for kind, on, dtype in segment.modes[2]}, segment.cache_enabled
        ),
        replay=replay,
    )


def _may_stop(segment: Segment, tape: Tape) -> bool:
    """Whether the recompute may stop early; see Note [What need not be rebuilt] in `tape`."""
    place, chain = segment.unit.place(tape.position), tape.chain
    if place is None or not chain.checkpoints(place) or segment.unit.path in chain.run_whole:
        return False
    if not tape.streams.witnesses or not stops_early():
        return False
    return not any(hooked(m) for root in segment.modules for m in root.modules())


def as_kind(unit: Unit, kind: str) -> Unit:
    """The unit, as a block or as a residual."""
    return unit if unit.kind == kind else replace(unit, kind=kind)  # type: ignore[arg-type]


def _warn_stored(chain: Chain, unit: Unit) -> None:
    if unit.path not in chain.told:
        chain.told.add(unit.path)
        warnings.warn(
            f"{unit.path} ({chain.name}): got a branch that writes in place to a tensor from outside of it, and so "
            "cannot be run twice; expected writes to its own tensors. Its activations are kept, with right gradients; "
            "write to a clone to have them rebuilt",
            stacklevel=2,
        )
