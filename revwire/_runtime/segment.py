"""What the own code of a host does with a state, while it does it; see Note [Replays] in `replay`.

Note [Cells]
    Whether the calls that follow a state are the branch of a unit is known when the residual add comes. Until then
    autograd's saved tensors lie in cells; those of the branch are given up then, all others stay what they are. So a
    unit that does not come to its add, and whatever else is computed from a state, has ordinary gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revwire._runtime.cells import Cell, keep, kept_from_checkpoint, opened_cell, packed_into
from revwire._runtime.draws import Draws
from revwire._runtime.numbers import Numbers
from revwire._runtime.replay import Call, CallModes, Made, Replay
from revwire._runtime.selective import Products
from revwire._structures import tensors_in
from revwire._surroundings.buffers import Copies, Written, statistics_of
from revwire._surroundings.context import context_kept
from revwire._surroundings.holdings import Held, Known
from revwire._surroundings.inventory import Inventory, version_of, versions_of
from revwire._surroundings.modes import NOTHING, stalls
from revwire._surroundings.randomness import accelerators_of
from revwire._surroundings.settings import kernels_not_searched, searches_kernels, settings_now
from revwire._surroundings.surroundings import Surroundings
from revwire._torch import pop_saved_tensors_hooks, push_saved_tensors_hooks

if TYPE_CHECKING:
    from revwire._runtime.functions import Share
    from revwire._runtime.links import Link
    from revwire._runtime.unit_run import UnitRun

_KEEPS_STATISTICS = frozenset({F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm})

_CPU = ("cpu",)


class Segment:
    """The calls that a host's own code has made with a state since the last step.

    Args:
        run: the run of the unit that they are to be.
        x: the state, as the host's code sees it.
        link: its place in the chain.
        carriers: the float tensors through which gradients flow, and what they have in common, for the step.

    Attributes:
        rewinds: whether the unit is to be rebuilt; else it is only known what comes from the state.
    """

    def __init__(self, run: UnitRun, x: Tensor, link: Link, carriers: tuple[Tensor, Tensor, Share | None]) -> None:
        self.run, self.x, self.link, self.carriers = run, x, link, carriers
        tape, chain = run.tape, run.tape.chain
        rewinds = self.rewinds = tape.rewinds and run.kept is None
        self.checkpoints = rewinds and chain.checkpoints(run.place)
        self.may_skip = bool(tape.streams.witnesses) and run.unit.path not in chain.run_whole
        self.products = Products() if rewinds and chain.selects(run.place) and self.may_skip else None
        self.version, self.values = version_of(x), Numbers(x)
        self.number = self.values.number
        self.calls: list[Call] = []
        self.cells: list[Cell] = []
        self.ends: list[int] = []  # how many cells there were after each call
        self.wrote = False  # in place, to something that comes from the state
        self.effects: set[int] = set()  # the places of calls that wrote to something else
        self.buffers: Copies = {}
        self.modules: list[Inventory] = []  # of those that were called
        self.taken: Held | None = None  # what a module that is about to be called holds
        self.skip = self.latest = x  # what came from the state by calls without weights, and from the sum, last
        self.whole = True  # whether all calls are in the branch
        self.devices = () if x.is_cpu else accelerators_of([x])
        self.kinds = ("cpu", *(d.type for d in self.devices)) if self.devices else _CPU
        self.modes: CallModes | None = None  # around the first call, with gradients
        if rewinds:
            self.standing = run.place, run.unit.path, run.host.training
            self.draws = Draws(self.devices, quiet=self.standing in chain.quiet)
            self.pack = packed_into(self.cells)

    # -- calls -----------------------------------------------------------------------------------------------------

    def make(
        self, function: Callable[..., Any], args: Any, kwargs: Any, run: Callable[..., Any], tensors: list[Tensor]
    ) -> Any:
        """Make a call by ``run``, and put it down as one of ``function``; ``tensors``: those among its arguments."""
        if not self.rewinds:
            with kept_from_checkpoint():
                out = run(*args, **kwargs)
            self._note_made(out)
            return out
        if searches_kernels() and stalls(self.x.device):
            with kernels_not_searched():
                return self.make(function, args, kwargs, run, tensors)
        needs: list[int] = []
        recorded = [*map(self.values.noted, args, repeat(needs))]
        named = {k: self.values.noted(a, needs) for k, a in kwargs.items()} if kwargs else None
        call = Call(function, recorded, named, needs)
        versions, start = versions_of(tensors), len(self.cells)
        self._look(call)
        try:
            push_saved_tensors_hooks(self.pack, opened_cell)
            try:
                with self.products or NOTHING:
                    out = run(*args, **kwargs)
            finally:
                pop_saved_tensors_hooks()
        except BaseException:
            self._let_go(start)
            raise
        if versions_of(tensors) != versions:
            self._note_writes(tensors, versions)
        self._put_down(call, out)
        return out

    def make_module(
        self, module: nn.Module, args: Any, kwargs: Any, run: Callable[..., Any], tensors: list[Tensor], known: Known
    ) -> Any:
        """As `make`, for a call of a module."""
        if not self.rewinds:
            return self.make(module, args, kwargs, run, tensors)
        again = module if type(module).__call__ is nn.Module.__call__ else run  # what is around it goes on in the host
        owned, training = Inventory.of((module,)), self.run.host.training
        held = self.taken = Held.by(known, owned, training)
        self.modules.append(owned)
        writers = owned.writing
        if not (writers or held.reached.changes):
            out = self.make(again, args, kwargs, run, tensors)
        else:
            with held.undisturbed(writers):
                written = Written(writers, unseen=held.reached.unseen)
                if self.checkpoints:  # batch statistics are compared
                    self.buffers.update(statistics_of(writers))
                out = self.make(again, args, kwargs, run, tensors)
                self.buffers.update(written.copies())
            if known.note_moved(owned):
                self.effects.add(len(self.calls) - 1)
        if held.generators or known.draws[training] is None:
            held.settle(known, training)
        return out

    def note_done(self, function: Callable[..., Any], args: Any, out: Any) -> None:
        """Put down a call that was made already, and saves nothing (a property of a tensor)."""
        if not self.rewinds:
            self._note_made(out)
            return
        needs: list[int] = []
        call = Call(function, [*map(self.values.noted, args, repeat(needs))], None, needs)
        self._look(call)
        self._put_down(call, out)

    def _note_made(self, out: Any) -> None:
        for t in tensors_in(out):
            self.values.made(t)

    def _look(self, call: Call) -> None:
        """See Note [Random numbers of a replay] in `replay`; and the modes around a call."""
        sets_back = self.taken is not None and self.taken.reached.sets_back
        if sets_back or not self.draws.quiet:
            self.draws.before(call, sets_back=sets_back)
        kinds, context = self.kinds, copy_context()
        if kinds is _CPU:
            casts = [("cpu", torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))]
        else:
            casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), casts, settings_now(kinds is not _CPU)
        if self.modes is None:
            self.modes, self.context = (True, False, casts, modes[3]), context
            autocast = {kind: (enabled, dtype) for kind, enabled, dtype in casts}
            cache = torch.is_autocast_cache_enabled()
            self.surroundings = Surroundings(self.devices, {}, autocast, cache, modes[3], context_kept())
        if modes != self.modes:
            call.modes = modes
        if context != self.context:
            call.context = context_kept()

    def _note_writes(self, tensors: list[Tensor], versions: list[int]) -> None:
        """The call that is about to be put down wrote to some of these."""
        written = [self.number(t) for t, version in zip(tensors, versions, strict=True) if version_of(t) != version]
        if None in written:
            self.effects.add(len(self.calls))
        self.wrote = self.wrote or any(number is not None for number in written)

    def _put_down(self, call: Call, out: Any) -> None:
        if not self.draws.quiet:
            self.draws.after(call)
        if call.function in _KEEPS_STATISTICS:
            given = [*call.args[1:3], *((call.kwargs or {}).get(n) for n in ("running_mean", "running_var"))]
            call.copies = [g.number for g in given if type(g) is Made]
        made = self.values.made
        call.makes = (made(out),) if type(out) is Tensor else [*map(made, tensors_in(out))]
        call.held, self.taken = self.taken, None
        self.calls.append(call)
        self.ends.append(len(self.cells))

    # -- ends ------------------------------------------------------------------------------------------------------

    def branch(self, out: int) -> tuple[Replay, list[Cell]] | None:
        """The calls that lead from the state to the value with this number, and what they saved; None where they
        cannot be made again.
        """
        wanted, used, effects = {out}, list[int](), self.effects
        for place in range(len(self.calls) - 1, -1, -1):
            call = self.calls[place]
            if not wanted.isdisjoint(call.makes) or (self.wrote and place not in effects):
                if place in effects:
                    return None
                used.append(place)
                wanted.update(call.needs)
        held = {n: self.values.held[n] for n in wanted if n in self.values.held} if self.values.held else {}
        if held and versions_of([t for t, _ in held.values()]) != [version for _, version in held.values()]:
            return None
        used.reverse()
        self.whole = len(used) == len(self.calls)
        if self.whole:
            cells = self.cells[:]
        else:
            cells = [c for p in used for c in self.cells[self.ends[p - 1] if p else 0 : self.ends[p]]]
        return Replay([self.calls[p] for p in used], {n: t for n, (t, _) in held.items()}, self.values.size, out), cells

    def settle(self) -> bool:
        """After the last call: whether it is known what each of them drew."""
        known, quiet = self.draws.settle(), self.run.tape.chain.quiet
        if not known:
            quiet.discard(self.standing)
        elif not self.draws.quiet and not self.draws.drew:
            quiet.add(self.standing)
        return known

    def let_go(self) -> None:
        """Keep what is left of the cells, and nothing else."""
        self._let_go(0)
        del self.carriers
        self.calls.clear()
        self.values.forget()

    def _let_go(self, start: int) -> None:
        keep(self.cells[start:])
        del self.cells[start:]
