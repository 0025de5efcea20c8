"""What ends the stream on either side of a residual add that stands alone, with the line of the code that does it."""

from __future__ import annotations

from collections.abc import Container, Sequence

from revwire._capture.lines import shown
from revwire._capture.recording import Event
from revwire._search.dataflow import Flow
from revwire._search.residuals import Candidate


def what_ends_it(flow: Flow, c: Candidate, candidates: Sequence[Candidate]) -> str:
    """In words: what lies before the add and after it, where a chain would go on; "" where nothing more is known."""
    sums = {other.result for other in candidates if other is not c}
    before = _above(flow, c.fork, sums)
    after = next((other for other in candidates if flow.is_ancestor(c.result, other.fork)), None)
    if after is None:
        behind = "no other add comes after it" if before else ""
    else:
        behind = _above(flow, after.fork, {c.result})
        behind = f"after it, {behind}" if behind else ""
    return "; ".join(part for part in (f"before it, {before}" if before else "", behind) if part)


def _above(flow: Flow, value: int, sums: Container[int]) -> str:
    """What makes the stream anew on the way up from a value to the sum that it comes from; "" where nothing does."""
    while value not in sums:
        event = flow.event_of(value)
        if event is None:
            return "the stream is an input"
        if event.is_product:
            return f"the stream is made anew{_at(flow, event)}"
        hop = flow.hop_up(value)
        if hop is None:
            return f"several tensors are joined{_at(flow, event)}"
        products = [e for v in hop[1] if (e := flow.event_of(v)) is not None and e.is_product]
        if products:
            return f"the stream is made anew{_at(flow, products[0])}"
        above = flow.recording.values[hop[0]].shape
        if above != flow.recording.values[value].shape:
            return f"its shape changes{_at(flow, event)}"
        value = hop[0]
    return ""


def _at(flow: Flow, event: Event) -> str:
    """The line of the call, or the module around it where the code is PyTorch's own."""
    module = flow.recording.events[max(event.parent, 0)].target
    names = flow.recording.module_names.get(id(module), ())
    line = shown(event.line)
    return f" by {names[0]}" if names and names[0] and line.startswith("torch/") else f" at {line}" if line else ""
