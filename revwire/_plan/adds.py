"""Where a residual add stands in a model, told in a way that holds for every run of it."""

from __future__ import annotations

from collections import Counter

from revwire._capture.recording import Recording
from revwire._plan.outside import name_of
from revwire._search.dataflow import flow_of
from revwire._search.residuals import residual_adds

Add = tuple[str, int]
"""The name of the innermost module that makes a residual add, and which of those made there it is; `WHOLE`: the module
is one unit, whatever adds it holds.
"""


WHOLE = -1


def adds_of(recording: Recording) -> dict[int, Add]:
    """All residual adds of a run, by their event numbers."""
    counts: Counter[str] = Counter()
    found: dict[int, Add] = {}
    for c in residual_adds(flow_of(recording)):
        name = name_of(recording, recording.calls_around(c.add)[-1])
        found[c.add] = name, counts[name]
        counts[name] += 1
    return found
