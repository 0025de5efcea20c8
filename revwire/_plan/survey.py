"""From a recording to the plan: chains of units with their names, what is to be installed where, and what stays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch

from revwire._capture.code_reads import tells_its_reads
from revwire._capture.lines import shown
from revwire._capture.recording import Recording
from revwire._errors import CaptureError
from revwire._plan.adds import WHOLE as WHOLE_HOST
from revwire._plan.adds import Add, adds_of
from revwire._plan.costed import with_costs
from revwire._plan.globs import idle_glob, matches, refuse_idle_globs
from revwire._plan.hints import Hints, hints_of, repeated
from revwire._plan.leanest import Chosen, OnPaper
from revwire._plan.names import Names, Placed
from revwire._plan.options import STAYS, Options
from revwire._plan.outside import Outside, outside_of_chains
from revwire._plan.plan import Plan, PlannedChain, PlannedUnit
from revwire._plan.stays import DOES_NOT_PAY, Skipped
from revwire._programs.calls import Slot
from revwire._runtime.chain import Chain
from revwire._search.chains import Search, find_chains
from revwire._search.dataflow import flow_of
from revwire._search.places import Layout, layout
from revwire._search.residuals import Candidate
from revwire._search.units import WHOLE, UnitKey, find_units
from revwire._splitting.core_relations import Known
from revwire._splitting.core_search import Sizes, calls_with_cores
from revwire._streams.fixed import asks_for_wide
from revwire._structures import refs

UNREGISTERED = (
    "its host is not registered below the model; make it an attribute of a module, or an item of an nn.ModuleList"
)


USED_TWICE = "its module is used a second time, in another chain; give each of them a module of its own"


class InBranch(NamedTuple):
    """A core, in the branch of the unit at a place of a chain."""

    chain: int
    place: int
    sizes: Sizes


class Prepared(NamedTuple):
    """What is to be installed: the slots of each host, the modules with cores in branches, by name; what is known
    of calls, and what the example tells of chunks and of a budget.
    """

    plan: Plan
    chains: list[Chain]
    hosts: dict[str, list[Slot]]
    layouts: dict[str, Layout]
    cores: dict[str, InBranch]
    known: Known
    hints: Hints


class Failures(dict[int, str]):
    """Residual adds that could not be built into their hosts, with the reason.

    The search lets a unit that failed in a larger module end within its own host. Where it came to that module again,
    the reason names its host, which is then tried as a whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stuck: set[int] = set()  # what failed more than once

    def note(self, failed: dict[int, str]) -> None:
        self.stuck |= failed.keys() & self.keys()
        self.update(failed)

    def reason(self, add: int, host: str) -> str:
        reason = self[add]
        return f"{host} goes on where {reason}" if add in self.stuck and not reason.startswith(host) else reason


class Planner:
    """From a recording to the plan, the chains, and the slots of each host."""

    def __init__(self, recording: Recording, options: Options) -> None:
        self.recording = recording
        self.options = options
        self.adds = adds_of(recording)
        self.banned = Failures()
        self.names = Names(recording)
        self.known: Known = {}
        self.layouts: dict[str, Layout] = {}
        self.decided = False  # whether the leanest layout says what is checkpointed
        self.opened: set[int] = set()  # calls inside of hosts whose code is in the host's program

    def run(self) -> Prepared:
        search, units, chains, slots = self.all_that_can_be()
        _refuse_idle_globs(self.recording, self.options, units, map(self.names.place, search.rejected))
        planned = [*map(self.planned, units, chains)]
        paper = OnPaper(self.recording, _candidates(units), planned)
        chosen = Chosen(tuple(range(len(units))), ())
        if paper.tells and not self.options.everywhere:
            self.decided = self.options.checkpoint is None
            chosen = paper.choose([*map(self.may_be_rewired, units)], checkpoints=self.decided)
            search.rejected += _rejected(units, chosen.chains)
            units = [units[i] for i in chosen.chains]
            chains = [self.chain(i, several) for i, several in enumerate(units)]
            slots, planned, self.layouts = self.slots(units, chains), [*map(self.planned, units, chains)], {}
            self.failures(units, slots)
        outside = self.outside(search, units)
        chosen = chosen._replace(checkpointed=(*outside.names, *chosen.checkpointed))
        plan = Plan(
            type(self.recording.root).__name__,
            tuple(planned),
            tuple(self.skipped(self.names.place(c), outside) for c in sorted(search.rejected, key=lambda c: c.add)),
            checkpointed=chosen.checkpointed,
            peaks=paper.peaks(chosen) if self.options.chunks in (None, 1) else None,
        )
        self.mark_last(units, chains, plan)
        plan = replace(plan, chains=tuple(map(with_costs, plan.chains, chains)))
        hints = Hints()
        if self.options.spends_less:
            hints = hints_of(self.recording, _candidates(units), repeated(chains, slots), paper, chosen)
        return Prepared(plan, chains, slots, self.layouts, self.cores(units), self.known, hints)

    def all_that_can_be(self) -> tuple[Search, list[list[Placed]], list[Chain], dict[str, list[Slot]]]:
        """The chains of all that can be rewired, and what is to be installed for them."""
        while True:
            self.names, self.layouts = Names(self.recording), {}
            search = find_chains(self.recording, self.refuse, whole=self.whole)
            units = self.unique(search)
            chains = [self.chain(i, chain) for i, chain in enumerate(units)]
            slots = self.slots(units, chains)
            failed = self.failures(units, slots)
            if not failed:
                return search, units, chains, slots
            self.banned.note(failed)

    def refuse(self, c: Candidate) -> str | None:
        if c.add in self.banned:
            return self.banned.reason(c.add, self.names.name(c.host) or "the model")
        if self.options.include or self.options.exclude:
            names = (self.names.path(c, self.names.key(c)), self.names.name(c.host))
            if matches(names, self.options.exclude):
                return "excluded by the caller; let it through by include= and exclude="
            if self.options.include and not matches(names, self.options.include):
                return "excluded: not among the caller's include patterns; let it through by include="
        known = self.recording.module_names.get(id(self.recording.events[c.host].target))
        return None if known else UNREGISTERED

    def may_be_rewired(self, units: list[Placed]) -> bool:
        """Whether the caller does not want a part of a chain checkpointed."""
        calls = {call for u in units for call in (u.candidate.host, *self.recording.calls_around(u.candidate.host))}
        return not matches([*map(self.names.name, calls)], self.options.checkpoint or ())

    def whole(self, c: Candidate) -> list[int]:
        """The calls around a residual add that the caller would have as one unit, the outermost first."""
        wish = self.options.whole
        if wish is None:
            return [c.host]
        calls = self.recording.calls_around(c.add) if wish else ()
        return [call for call in calls if matches([self.names.name(call)], wish)]

    def outside(self, search: Search, units: list[list[Placed]]) -> Outside:
        """The modules outside of chains that are to be checkpointed, or may be."""
        wish = self.options.checkpoint
        if wish is None and self.options.budget is not None and units:
            wish = (STAYS,)
        return outside_of_chains(self.recording, wish or (), search.rejected, _hosts(self.recording, units))

    def cores(self, units: list[list[Placed]]) -> dict[str, InBranch]:
        """The modules in the branches of units whose cores may run in parts; looked for where chunks may be wanted."""
        if self.options.chunks == 1 or not self.options.spends_less:
            return {}
        flow, events = flow_of(self.recording), self.recording.events
        hosts = _hosts(self.recording, units)
        found: dict[str, InBranch] = {}
        for number, members in enumerate(units):
            for place, u in enumerate(members):
                for call, sizes in calls_with_cores(flow, u.candidate.host, u.candidate.region, self.known).items():
                    module = events[call].target
                    known = self.names.name(call) and id(module) not in hosts and call not in self.opened
                    if known and tells_its_reads(module):
                        found.setdefault(self.names.name(call), InBranch(number, place, sizes))
        return found

    # -- chains ----------------------------------------------------------------------------------------------------

    def unique(self, search: Search) -> list[list[Placed]]:
        """Chains as lists of placed units; a chain that runs through the same hosts again is the same chain."""
        out: list[list[Placed]] = []
        seen: dict[tuple[str, UnitKey], int] = {}
        for chain in search.chains:
            units = [self.names.place(c) for c in chain]
            identity = [(u.host_path, u.key) for u in units]
            owners = {seen[i] for i in identity if i in seen}
            if not owners:
                seen.update({i: len(out) for i in identity})
                out.append(units)
            elif owners != {next(iter(owners))} or identity != [(u.host_path, u.key) for u in out[next(iter(owners))]]:
                for c in chain:
                    c.reason = USED_TWICE
                    search.rejected.append(c)
        return out

    def chain(self, number: int, units: list[Placed]) -> Chain:
        choice, name = self.options.choice, f"chain {number}"
        couplings = [choice.coupling((u.path, u.host_path), u.pattern) for u in units]
        exact, spacing = choice.arithmetic(f"{name} ({units[0].path} .. {units[-1].path})", couplings)
        largest, most = _magnitudes(self.recording, units)
        chain = Chain(name, couplings, exact=exact, length=len(units), largest=largest, usual=most)
        chain.set_anchors(spacing, adapts=choice.anchors == "auto", tolerance=choice.tolerance)
        return chain

    def mark_last(self, units: list[list[Placed]], chains: list[Chain], plan: Plan) -> None:
        """Let the chain whose backward comes first keep what its last unit saves, where that does not raise the peak.

        What the model saves behind that chain has gone when the unit's backward begins, so it only counts as far as it
        is more than the gradients that the backward makes meanwhile, for which a quarter of the unit's own bytes is
        allowed. Results (logits, say) are there until then, and once more in a loss.
        """
        if not chains:
            return
        ends = [self.recording.values[members[-1].candidate.out].event for members in units]
        last = ends.index(max(ends))
        behind = sum(e.saved for e in self.recording.events[max(ends) + 1 :])
        results = {self.recording.values[r.value].storage for r in refs(self.recording.events[0].out)}
        behind += sum(self.recording.storages.get(s, 0) for s in results)
        own = plan.chains[last].units[-1].saved_bytes
        chains[last].keeps_last = own + behind <= max(own * 5 // 4, *(u.saved_bytes for u in plan.units))

    def slots(self, units: list[list[Placed]], chains: list[Chain]) -> dict[str, list[Slot]]:
        """For each host, its units; a unit through which its chain runs several times has several places."""
        out: dict[str, list[Slot]] = {}
        for chain, members in zip(chains, units, strict=True):
            places: dict[tuple[str, UnitKey], list[int]] = {}
            for index, u in enumerate(members):
                places.setdefault((u.host_path, u.key), []).append(index)
            for first, *later in places.values():
                u = members[first]
                slot = Slot(u.key, len(u.candidate.post), chain, first, u.path, tuple(later))
                out.setdefault(u.host_path, []).append(slot)
        return out

    def failures(self, units: list[list[Placed]], slots: dict[str, list[Slot]]) -> dict[int, str]:
        """Build every host once, from what was observed; what cannot be built stays, with the reason."""
        failed: dict[int, str] = {}
        tried: set[str] = set()
        for u in (u for members in units for u in members):
            if u.host_path in tried:
                continue
            tried.add(u.host_path)
            held = slots[u.host_path]
            try:
                cut = self.recording.of_call(u.candidate.host)
                again, inline = find_units(cut, [(s.key, s.posts) for s in held])
                self.opened |= {u.candidate.host + call for call in inline}
                self.layouts[u.host_path] = layout(cut, again, inline, [s.drops_skip for s in held])
            except CaptureError as error:
                reason = f"{u.host_path or 'the model'} {error}"
                failed.update(
                    {v.candidate.add: reason for members in units for v in members if v.host_path == u.host_path}
                )
        return failed

    # -- the plan --------------------------------------------------------------------------------------------------

    def planned(self, units: list[Placed], chain: Chain) -> PlannedChain:
        streams = _stream_bytes(self.recording, units[0].candidate, chain)
        members = _planned_units(self.recording, units, self.adds)
        bare = PlannedChain(chain.name, members, "", chain.exact, 0, streams, chain.largest or 0.0)
        return with_costs(bare, chain)

    def skipped(self, u: Placed, outside: Outside) -> Skipped:
        """A residual add that stays, with what would help as far as that depends on the whole plan."""
        c = u.candidate
        could = c.host in outside.others and not c.inside and not self.decided
        helps = "; checkpoint='stays' recomputes its block" if could else ""
        line = shown(self.recording.events[c.add].line)
        return Skipped(u.path, f"{c.reason or ''}{helps}", c.computed_shortcut, c.inside, line)


def _candidates(units: list[list[Placed]]) -> list[list[Candidate]]:
    return [[u.candidate for u in several] for several in units]


def _rejected(units: list[list[Placed]], chosen: Iterable[int]) -> list[Candidate]:
    """The units of the chains that are not among the chosen ones, with the reason."""
    kept = set(chosen)
    left = [u.candidate for i, several in enumerate(units) if i not in kept for u in several]
    for c in left:
        c.reason = DOES_NOT_PAY
    return left


def _planned_units(recording: Recording, units: list[Placed], adds: dict[int, Add]) -> tuple[PlannedUnit, ...]:
    def planned(u: Placed) -> PlannedUnit:
        c, events = u.candidate, recording.events
        saved = sum(events[e].saved for e in {*c.region, c.add, *c.post})
        add = (u.host_path, WHOLE_HOST) if c.whole else adds[c.add]
        return PlannedUnit(u.path, u.host_path, u.pattern, tuple(recording.values[c.fork].shape), saved, 0, add=add)

    return tuple(map(planned, units))


def _hosts(recording: Recording, units: list[list[Placed]]) -> set[int]:
    """Ids of the modules that hold units."""
    return {id(recording.events[u.candidate.host].target) for members in units for u in members}


def _magnitudes(recording: Recording, units: list[Placed]) -> tuple[float, float]:
    """The largest magnitude in the states of a chain, and that of most values beside it: by the state where the two are
    farthest apart (0 where none was measured).
    """
    states = [recording.values[v] for u in units for v in (u.candidate.fork, u.candidate.out)]
    largest = max(v.largest for v in states)
    return largest, min((largest * v.usual / v.largest for v in states if v.usual and v.largest), default=0.0)


def _stream_bytes(recording: Recording, first: Candidate, chain: Chain) -> int:
    """Bytes of the two streams of a chain that begins with this unit."""
    x, (_, _, casts), reach = recording.values[first.fork], recording.events[first.add].modes, chain.reach
    branch = next((to for _, on, to in casts if on and x.dtype == torch.float32), x.dtype)
    wide = chain.exact and asks_for_wide(reach.largest, reach.usual, branch)
    return 2 * prod(x.shape) * (8 if x.dtype.itemsize == 8 or wide else 4)


def _refuse_idle_globs(
    recording: Recording, options: Options, units: list[list[Placed]], stay: Iterable[Placed]
) -> None:
    """Raise where a glob of the caller's finds nothing: it has a typing error. ``stay``: what is not rewired."""
    rewired = [name for members in units for u in members for name in u.names]
    options.choice.refuse_idle_globs(rewired)
    _refuse_idle_wholes(options.whole or (), units)
    names = [*rewired, *(name for u in stay for name in u.names)]
    names += (name for several in recording.module_names.values() for name in several)
    for option, globs in (("include", options.include), ("exclude", options.exclude)):
        refuse_idle_globs(option, globs, names, "unit, host or module")


def _refuse_idle_wholes(globs: Iterable[str], units: list[list[Placed]]) -> None:
    """Raise where a glob of ``whole`` made no module one unit."""
    hosts = {u.host_path: u.key == WHOLE for members in units for u in members}
    for glob in globs:
        if not matches([host for host, whole in hosts.items() if whole], [glob]):
            some = ", ".join([repr(host) for host in hosts if host][:5])
            raise idle_glob(
                "whole",
                glob,
                "under which no module can be one unit",
                "modules that lead an input to an output of the same shape by residual adds, at least two in a row; "
                f"such as those that hold units now: {some or 'the model itself'}",
            )
