"""Which host's own code runs on this thread: the modules that it calls are told from those further inside."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import nn


class Follower(Protocol):
    """Follows the own code of one host."""

    def module_call(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call of a module by the host's own code."""

    def opaque_call(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call that shows nothing of what it does inside."""

    def expects(self, args: Any, kwargs: Any) -> bool:
        """Whether one of these arguments of a module that is opened is a part of a unit of the host, or begins one."""


class _Now(threading.local):
    follower: Follower | None = None


NOW = _Now()
