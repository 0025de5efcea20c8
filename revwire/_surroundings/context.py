"""Context variables: a run may have a context of its own, so that nobody sees what it sets."""

from __future__ import annotations

from contextvars import Context, copy_context
from copy import copy
from typing import Any


def context_of_its_own() -> Context:
    """A copy of the present context, with copies of the containers among its variables: what hooks collect there in a
    run is not seen.
    """
    context = copy_context()
    for variable, value in list(context.items()):
        if isinstance(value, (list, dict, set)):
            context.run(variable.set, _copied(value))
    return context


def _copied(container: Any) -> Any:
    """A container, and the containers in it, copied; what else they hold is the same."""
    out = copy(container)
    items = out.items() if isinstance(out, dict) else enumerate(out) if isinstance(out, list) else ()
    for key, item in list(items):
        if isinstance(item, (list, dict, set)):
            out[key] = _copied(item)
    return out
