"""What one process of a group has found, in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from revwire._errors import RevwireError

T = TypeVar("T")


def of_first(find: Callable[[], T]) -> T | None:
    """What ``find`` gives in the first process of a group, in all of them; None where there is no group.

    An error of revwire's there is raised in all of them, so that none waits for the others.
    """
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return None
    several: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            several = [find()]
        except RevwireError as error:
            several = [error]
    distributed.broadcast_object_list(several)
    if isinstance(several[0], RevwireError):
        raise several[0]
    found: T = several[0]
    return found
