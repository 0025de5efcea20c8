"""What may look on while a chain runs. Observers are told; they are handed what they need as it is, and this file knows
no tape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

Observer = Callable[..., None]
"""Is told of each unit before it runs, and of what it is given."""


class Meter(Protocol):
    """Sees where a unit begins, what its branch saves, where it ends, when a recompute has saved all that its gradient
    needs, and when it is over."""

    def enter(self, chain: Any, unit: Any) -> None: ...

    def seeing(self, pack: Callable[[Tensor], int], record: Any, x: Tensor) -> Callable[[Tensor], int]: ...

    def leave(self, chain: Any, unit: Any, tape: Any, out: Tensor) -> None: ...

    def complete(self, tape: Any, position: int) -> None: ...

    def undone(self, tape: Any, position: int) -> None: ...


class Monitor(Protocol):
    """Sees every state that a tape drops, and every state that it rebuilds."""

    def forward(self, tape: Any, position: int, state: Tensor) -> None: ...

    def backward(self, tape: Any, position: int, state: Tensor) -> None: ...
