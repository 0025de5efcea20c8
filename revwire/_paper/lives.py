"""What is alive in the forward pass of some events, as the code that ran made it and let go of it.

Note [Lives]
    A value is there from the event that makes it until the code lets go of it: a temporary until the call that takes it
    is over, a local variable until the function returns, however late it was used. What autograd keeps stays besides,
    but is there once. Under a checkpoint the events of a call run twice, and nothing is kept the first time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from revwire._capture.recording import Recording
from revwire._structures import refs


class Lives:
    """When each memory that a run makes is there.

    Args:
        recording: of the run.
        sizes: of each storage that is made in it.
    """

    def __init__(self, recording: Recording, sizes: dict[int, int]) -> None:
        self.events, self.sizes = recording.events, sizes
        count = len(recording.events)
        self.made: list[list[int]] = [[] for _ in range(count)]
        self.lost: list[list[int]] = [[] for _ in range(count + 1)]
        born: dict[int, int] = {}
        for value in recording.values:
            if value.storage in sizes:
                born[value.storage] = min(value.event, born.get(value.storage, count))
        given = {recording.values[r.value].storage for r in refs(recording.events[0].out)}
        for storage, event in born.items():
            self.made[event].append(storage)
            self.lost[count if storage in given else recording.released.get(storage, count)].append(storage)

    def passing(self, events: Sequence[int], there: Iterable[int] = ()) -> list[int]:
        """Bytes alive during each of some events (ascending) that they made themselves, and that neither they keep so
        far nor are ``there`` anyway.
        """
        own, kept, here, alive, out = {*events}, {*there}, set[int](), 0, []
        for event in range(events[0], events[-1] + 1):
            gone = self.lost[event]
            if event in own:
                new = [s for s in self.made[event] if s not in kept]
                here.update(new)
                alive += sum(self.sizes[s] for s in new)
                kept.update(self.events[event].keeps)
                gone = [*gone, *self.events[event].keeps]
            for s in gone:
                if s in here:
                    here.remove(s)
                    alive -= self.sizes[s]
            if event in own:
                out.append(alive)
        return out
