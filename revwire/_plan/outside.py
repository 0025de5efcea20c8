"""Modules outside of chains: which may be checkpointed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from revwire._capture.recording import Recording
from revwire._plan.globs import idle_glob, matches
from revwire._plan.options import STAYS
from revwire._search.chains import CALLER
from revwire._search.dataflow import Flow, flow_of
from revwire._search.residuals import Candidate, can_run_twice


class Outside(NamedTuple):
    """What lies outside of chains: the names of the modules that are to be checkpointed, and the calls of other blocks
    that could be.
    """

    names: tuple[str, ...]
    others: frozenset[int]


def outside_of_chains(
    recording: Recording, wish: Iterable[str], rejected: Sequence[Candidate], hosts: set[int]
) -> Outside:
    """What lies outside of the chains of some hosts.

    Args:
        recording: of the example.
        wish: globs over the names of modules, or `STAYS`.
        rejected: the residual adds that stay.
        hosts: ids of the modules that hold units.

    Raises:
        ConversionError: a glob finds no module that can be checkpointed.
    """
    calls = _Calls(recording, hosts)
    left = [c.host for c in rejected if not c.inside and not (c.reason or "").startswith(CALLER)]
    found: dict[str, None] = {}
    for glob in wish:
        wanted = left if glob == STAYS else calls.under(glob)
        good = [call for call in sorted(set(wanted)) if calls.can_be_checkpointed(call)]
        if not good and glob != STAYS:
            raise idle_glob(
                "checkpoint",
                glob,
                "under which no module can be checkpointed",
                "modules that the example ran, outside of chains and holding none, which draw or keep nothing beside "
                "tensors",
            )
        found.update({name_of(recording, call): None for call in good})
    names = _outermost(found)
    others = {c for c in left if calls.can_be_checkpointed(c) and name_of(recording, c) not in names}
    return Outside(names, frozenset(others))


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    names = tuple(names)
    return tuple(n for n in names if not any(n.startswith(f"{other}.") for other in names))


class _Calls:
    """The calls of modules in a recording, and where the rewired ones are."""

    def __init__(self, recording: Recording, hosts: set[int]) -> None:
        self.recording, self.flow = recording, flow_of(recording)
        self.rewired = [e.number for e in recording.events if e.is_module and id(e.target) in hosts]
        self.around = {call for number in self.rewired for call in recording.calls_around(number)}

    def under(self, glob: str) -> list[int]:
        """Those of modules whose name matches."""
        events = self.recording.events
        return [e.number for e in events if e.is_module and matches([name_of(self.recording, e.number)], [glob])]

    def can_be_checkpointed(self, call: int) -> bool:
        """Whether it has a name, holds no chain and lies in none, and gives the same when it runs again."""
        calls = {call, *self.recording.calls_around(call)}
        if call in self.around or not calls.isdisjoint(self.rewired):
            return False
        return can_be_checkpointed(self.flow, call)


def can_be_checkpointed(flow: Flow, call: int) -> bool:
    """Whether the module of a call has a name, and gives the same when it runs again."""
    return bool(name_of(flow.recording, call)) and can_run_twice(flow, call)


def name_of(recording: Recording, call: int) -> str:
    """The first name of the module of a call; "" where it has none, or is the model itself."""
    names = recording.module_names.get(id(recording.events[call].target), ())
    return names[0] if names else ""
