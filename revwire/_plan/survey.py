"""From a recording to the plan: chains of units with their names, what is to be installed where, and what stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from revwire._capture.recording import Recording
from revwire._errors import CaptureError, ConversionError
from revwire._plan.costed import with_costs
from revwire._plan.options import STAYS, Options
from revwire._plan.plan import Plan, PlannedChain, PlannedUnit, Skipped, _elements
from revwire._programs.assembly import Program, pattern_of
from revwire._programs.build import build_graph
from revwire._programs.calls import Slot
from revwire._runtime.chain import Chain
from revwire._search.chains import CALLER, Search, find_chains
from revwire._search.dataflow import Flow
from revwire._search.places import Layout, UnseenError, layout
from revwire._search.residuals import Candidate, can_run_twice
from revwire._search.units import WHOLE, UnitKey, find_units, unit_keys
from revwire._splitting.core_relations import Known
from revwire._splitting.core_search import Sizes, calls_with_cores


@dataclass
class _Found:
    """A unit of the search, named and placed."""

    candidate: Candidate
    host_path: str
    key: UnitKey
    path: str
    pattern: str


class InBranch(NamedTuple):
    """A core, in the branch of the unit at a place of a chain."""

    chain: int
    place: int
    sizes: Sizes


class Prepared(NamedTuple):
    """What is to be installed: the slots of each host, the modules with cores in branches, by name; and what is known
    of calls.
    """

    plan: Plan
    chains: list[Chain]
    hosts: dict[str, list[Slot]]
    layouts: dict[str, Layout]
    cores: dict[str, InBranch]
    known: Known


class Planner:
    """From a recording to the plan, the chains, and the slots of each host."""

    def __init__(self, recording: Recording, options: Options) -> None:
        self.recording = recording
        self.options = options
        self.banned: dict[int, str] = {}
        self.keys: dict[int, dict[int, UnitKey]] = {}
        self.found: dict[int, _Found] = {}
        self.known: Known = {}
        self.layouts: dict[str, Layout] = {}
        self.opened: set[int] = set()  # calls inside of hosts whose code is in the host's program

    def run(self) -> Prepared:
        while True:
            self.found = {}
            search = find_chains(self.recording, self.refuse, whole=self.whole)
            units = self.unique(search)
            chains = [self.chain(i, chain) for i, chain in enumerate(units)]
            slots = self.slots(units, chains)
            failed = self.failures(units, slots)
            if not failed:
                self.options.choice.refuse_idle_globs([(u.path, u.host_path) for members in units for u in members])
                self.refuse_idle_wholes(units)
                plan = Plan(
                    type(self.recording.root).__name__, tuple(map(self.planned, units, chains)), self.skipped(search)
                )
                self.mark_last(units, chains, plan)
                names, left = self.checkpointed(search, units)
                plan = replace(plan, checkpointed=names, left_bytes=left)
                return Prepared(plan, chains, slots, self.layouts, self.cores(units), self.known)
            self.banned.update(failed)

    # -- names -----------------------------------------------------------------------------------------------------

    def name(self, call: int) -> str:
        names = self.recording.module_names.get(id(self.recording.events[call].target), ())
        return names[0] if names else ""

    def place(self, c: Candidate) -> _Found:
        if c.add not in self.found:
            if c.host not in self.keys:
                self.keys[c.host] = unit_keys(self.recording.cut(c.host))
            key = self.keys[c.host].get(c.add - c.host, ((), -1))
            self.found[c.add] = _Found(
                c, self.name(c.host), key, self.path(c, key), pattern_of(c, self.recording.events)
            )
        return self.found[c.add]

    def path(self, c: Candidate, key: UnitKey) -> str:
        """The host's name and that of its largest child in the branch (or the number of the add in it)."""
        sizes: dict[str, int] = {}
        for number in c.region:
            around = self.recording.calls_around(number)
            if c.host in around and around[-1] != c.host:
                child = self.recording.events[around[around.index(c.host) + 1]].target
                name = next(iter(self.recording.module_names.get(id(child), ())), "")
                if name:
                    sizes[name] = max(1, sum(p.numel() for p in child.parameters()))
        return max(sizes, key=lambda n: sizes[n]) if sizes else f"{self.name(c.host)}#{key[1]}"

    def refuse(self, c: Candidate) -> str | None:
        if c.add in self.banned:
            return self.banned[c.add]
        path, host = self.path(c, ((), 0)), self.name(c.host)
        if any(fnmatchcase(n, p) for p in self.options.exclude for n in (path, host)):
            return "excluded by the caller"
        if self.options.include and not any(fnmatchcase(n, p) for p in self.options.include for n in (path, host)):
            return "excluded: not among the caller's include patterns"
        return (
            None
            if self.recording.module_names.get(id(self.recording.events[c.host].target))
            else "its host is not registered below the model"
        )

    def whole(self, c: Candidate) -> list[int]:
        """The calls around a residual add that the caller would have as one unit, the outermost first."""
        wish = self.options.whole
        if wish is None:
            return [c.host]
        calls = self.recording.calls_around(c.add) if wish else ()
        return [call for call in calls if any(fnmatchcase(self.name(call), glob) for glob in wish)]

    def checkpointed(self, search: Search, units: list[list[_Found]]) -> tuple[tuple[str, ...], int]:
        """(names of the modules outside of chains that are to be checkpointed, or may be; bytes that other blocks keep
        which could be).

        Raises:
            ConversionError: a glob finds none that can be.
        """
        wish = self.options.checkpoint
        if wish is None and self.options.budget is not None and units:
            wish = (STAYS,)
        flow, events = Flow(self.recording), self.recording.events
        hosts = {id(events[u.candidate.host].target) for members in units for u in members}
        rewired = [e.number for e in events if e.is_module and id(e.target) in hosts]
        around = {call for number in rewired for call in self.recording.calls_around(number)}

        def free(call: int) -> bool:
            calls = {call, *self.recording.calls_around(call)}
            return (
                bool(self.name(call)) and call not in around and calls.isdisjoint(rewired) and can_run_twice(flow, call)
            )

        left = [c.host for c in search.rejected if not c.inside and not (c.reason or "").startswith(CALLER)]
        found: dict[str, None] = {}
        for glob in wish or ():
            calls = (
                left
                if glob == STAYS
                else [e.number for e in events if e.is_module and fnmatchcase(self.name(e.number), glob)]
            )
            good = [call for call in sorted(set(calls)) if free(call)]
            if not good and glob != STAYS:
                raise ConversionError(
                    f"checkpoint: got {glob!r}, under which no module can be checkpointed; expected modules that the "
                    "example ran, "
                    "outside of chains and holding none, which draw or keep nothing beside tensors"
                )
            found.update({self.name(call): None for call in good})
        names = tuple(n for n in found if not any(n.startswith(f"{other}.") for other in found))
        others = {call for call in left if units and free(call) and self.name(call) not in names}
        return names, sum(e.saved for call in others for e in events[call : events[call].end])

    def cores(self, units: list[list[_Found]]) -> dict[str, InBranch]:
        """The modules in the branches of units whose cores may run in parts; looked for where chunks may be wanted."""
        if self.options.chunks == 1 or (self.options.chunks is None and self.options.budget is None):
            return {}
        flow, events = Flow(self.recording), self.recording.events
        hosts = {id(events[u.candidate.host].target) for members in units for u in members}
        found: dict[str, InBranch] = {}
        for number, members in enumerate(units):
            for place, u in enumerate(members):
                for call, sizes in calls_with_cores(flow, u.candidate.host, u.candidate.region, self.known).items():
                    if self.name(call) and id(events[call].target) not in hosts and call not in self.opened:
                        found.setdefault(self.name(call), InBranch(number, place, sizes))
        return found

    def refuse_idle_wholes(self, units: list[list[_Found]]) -> None:
        """Raise where a glob of ``whole`` made no module one unit."""
        hosts = {u.host_path: u.key == WHOLE for members in units for u in members}
        for glob in self.options.whole or ():
            if not any(whole and fnmatchcase(host, glob) for host, whole in hosts.items()):
                some = ", ".join([repr(host) for host in hosts if host][:5])
                raise ConversionError(
                    f"whole: got {glob!r}, under which no module can be one unit; expected modules that lead an "
                    "input to an output of the "
                    "same shape by residual adds, at least two in a row; such as those that hold units now: "
                    f"{some or 'the model itself'}"
                )

    # -- chains ----------------------------------------------------------------------------------------------------

    def unique(self, search: Search) -> list[list[_Found]]:
        """Chains as lists of placed units; a chain that runs through the same hosts again is the same chain."""
        out: list[list[_Found]] = []
        seen: dict[tuple[str, UnitKey], int] = {}
        for chain in search.chains:
            units = [self.place(c) for c in chain]
            identity = [(u.host_path, u.key) for u in units]
            owners = {seen[i] for i in identity if i in seen}
            if not owners:
                seen.update({i: len(out) for i in identity})
                out.append(units)
            elif owners != {next(iter(owners))} or identity != [(u.host_path, u.key) for u in out[next(iter(owners))]]:
                for c in chain:
                    c.reason = "its module is used a second time, in another chain"
                    search.rejected.append(c)
        return out

    def chain(self, number: int, units: list[_Found]) -> Chain:
        choice, name = self.options.choice, f"chain {number}"
        couplings = [choice.coupling((u.path, u.host_path), u.pattern) for u in units]
        exact, spacing = choice.arithmetic(f"{name} ({units[0].path} .. {units[-1].path})", couplings)
        chain = Chain(name, couplings, exact=exact, length=len(units), largest=self.largest(units))
        chain.set_anchors(spacing, adapts=choice.anchors == "auto", tolerance=choice.tolerance)
        return chain

    def mark_last(self, units: list[list[_Found]], chains: list[Chain], plan: Plan) -> None:
        """Let the chain whose backward comes first keep what its last unit saves, where that does not raise the peak.

        What the model saves behind that chain has gone when the unit's backward begins, so it only counts as far as it
        is more than the gradients that the backward makes meanwhile, for which a quarter of the unit's own bytes is
        allowed.
        """
        if not chains:
            return
        ends = [self.recording.values[members[-1].candidate.out].event for members in units]
        last = ends.index(max(ends))
        behind = sum(e.saved for e in self.recording.events[max(ends) + 1 :])
        own = plan.chains[last].units[-1].saved_bytes
        chains[last].keeps_last = own + behind <= max(own * 5 // 4, *(u.saved_bytes for u in plan.units))

    def largest(self, units: list[_Found]) -> float:
        values = self.recording.values
        return max(max(values[v].largest for v in (u.candidate.fork, u.candidate.out)) for u in units)

    def slots(self, units: list[list[_Found]], chains: list[Chain]) -> dict[str, list[Slot]]:
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

    def failures(self, units: list[list[_Found]], slots: dict[str, list[Slot]]) -> dict[int, str]:
        """Build every host once, from what was observed; what cannot be built stays, with the reason."""
        failed: dict[int, str] = {}
        tried: set[str] = set()
        for u in (u for members in units for u in members):
            if u.host_path in tried:
                continue
            tried.add(u.host_path)
            held = slots[u.host_path]
            try:
                cut = self.recording.cut(u.candidate.host)
                again, inline = find_units(cut, [(s.key, s.posts) for s in held])
                self.opened |= {u.candidate.host + call for call in inline}
                drops = [s.chain.couplings[s.index].drops_skip for s in held]
                try:
                    self.layouts[u.host_path] = layout(cut, again, inline, drops)
                except UnseenError:
                    self.layouts.pop(u.host_path, None)
                    Program.of(build_graph(cut, inline), again, held)
            except CaptureError as error:
                reason = f"{u.host_path or 'the model'} {error}"
                failed.update(
                    {v.candidate.add: reason for members in units for v in members if v.host_path == u.host_path}
                )
        return failed

    # -- the plan --------------------------------------------------------------------------------------------------

    def planned(self, units: list[_Found], chain: Chain) -> PlannedChain:
        first = self.recording.values[units[0].candidate.fork]
        width = 8 if first.dtype.itemsize == 8 else 4
        streams = 2 * _elements(first.shape) * width
        bare = PlannedChain(
            chain.name, tuple(map(self.planned_unit, units)), "", chain.exact, 0, streams, chain.largest or 0.0
        )
        return with_costs(bare, chain)

    def planned_unit(self, u: _Found) -> PlannedUnit:
        c, events = u.candidate, self.recording.events
        saved = sum(events[e].saved for e in {*c.region, c.add, *c.post})
        return PlannedUnit(u.path, u.host_path, u.pattern, self.recording.values[c.fork].shape, saved, 0)

    def skipped(self, search: Search) -> tuple[Skipped, ...]:
        rejected = sorted(search.rejected, key=lambda c: c.add)
        return tuple(Skipped(self.place(c).path, c.reason or "", c.computed_shortcut, c.inside) for c in rejected)
