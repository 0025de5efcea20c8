"""Seconds of what a chain does to its streams, beside the branches of its units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from revwire._streams.base import stream_dtype
from revwire._streams.fixed import FixedStreams
from revwire.couplings.base import Coupling
from revwire.measure.timing import seconds_of


def arithmetic_seconds(coupling: Coupling, x: Tensor, calls: int = 2000) -> tuple[float, float]:
    """Seconds that a coupling's fixed-point arithmetic takes for one unit on states of the shape of ``x``: (forward,
    backward).

    Forward is one step of the streams, backward the value of a state and one step back. The fastest of five runs of
    ``calls`` calls.

    Args:
        coupling: one that has an exact form.
        x: a float tensor, of any shape and device.

    Example:
        >>> from revwire import Re2TAL
        >>> forward, backward = arithmetic_seconds(Re2TAL(), torch.randn(8, 8), calls=10)
        >>> forward > 0 and backward > 0
        True
    """
    x = x.detach()
    streams = FixedStreams.for_range(8.0, stream_dtype(x.dtype), device=x.device)
    state, f = streams.enter(x.to(stream_dtype(x.dtype))), torch.zeros_like(x)
    value = streams.read(state)
    rule = coupling.rule("residual", state)
    done = streams.step(state, value, f, rule)

    def back() -> None:
        streams.unstep(done.state, streams.read(state), f, rule, done.bits)

    return _fastest(lambda: streams.step(state, value, f, rule), calls, x.device), _fastest(back, calls, x.device)


def _fastest(call: Callable[[], object], calls: int, device: torch.device) -> float:
    def run() -> None:
        for _ in range(calls):
            call()

    return min(seconds_of(run, device) for _ in range(5)) / calls
