"""What units are called: by the host, and the part of it that is the branch."""

from __future__ import annotations

from dataclasses import dataclass

from revwire._capture.recording import Recording
from revwire._plan.outside import name_of
from revwire._programs.assembly import pattern_of
from revwire._search.residuals import Candidate
from revwire._search.units import UnitKey, unit_keys


@dataclass
class Placed:
    """A unit of the search, named and placed."""

    candidate: Candidate
    host_path: str
    key: UnitKey
    path: str
    pattern: str

    @property
    def names(self) -> tuple[str, str]:
        """By which globs find it."""
        return self.path, self.host_path


class Names:
    """The names of the units of a recording."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.keys: dict[int, dict[int, UnitKey]] = {}
        self.found: dict[int, Placed] = {}

    def name(self, call: int) -> str:
        return name_of(self.recording, call)

    def place(self, c: Candidate) -> Placed:
        if c.add not in self.found:
            key, pattern = self.key(c), pattern_of(c, self.recording.events)
            self.found[c.add] = Placed(c, self.name(c.host), key, self.path(c, key), pattern)
        return self.found[c.add]

    def key(self, c: Candidate) -> UnitKey:
        """Which of the residual adds of its host it is."""
        if c.host not in self.keys:
            self.keys[c.host] = unit_keys(self.recording.of_call(c.host))
        return self.keys[c.host].get(c.add - c.host, ((), -1))

    def path(self, c: Candidate, key: UnitKey) -> str:
        """The host's name and that of its largest child in the branch (or the number of the add in it)."""
        sizes: dict[str, int] = {}
        for number in sorted(c.region):
            around = self.recording.calls_around(number)
            if c.host in around and around[-1] != c.host:
                child = self.recording.events[around[around.index(c.host) + 1]].target
                name = next(iter(self.recording.module_names.get(id(child), ())), "")
                if name and name not in sizes:
                    sizes[name] = max(1, sum(p.numel() for p in child.parameters()))
        return max(sizes, key=lambda n: sizes[n]) if sizes else f"{self.name(c.host)}#{key[1]}"
