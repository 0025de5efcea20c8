"""The parts of a forward pass that reentrant checkpointing runs twice.

Note [Regions]
    Reentrant checkpointing runs a function without a graph, and again in the backward pass, on what was handed to it.
    Of a chain that reaches beyond the function that is not enough: it would need both streams. So a tape holds within
    one run of such a function (a region) only, and the chain begins anew where it is entered, and where it is left:
    both runs are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class _Here(threading.local):
    region: object = None


HERE = _Here()
"""The region that runs on this thread, None outside of all; see Note [Regions]."""


def as_region(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of which each run is a region; see Note [Regions]."""

    def run(*args: Any, **kwargs: Any) -> Any:
        outer, HERE.region = HERE.region, object()
        try:
            return function(*args, **kwargs)
        finally:
            HERE.region = outer

    return run
