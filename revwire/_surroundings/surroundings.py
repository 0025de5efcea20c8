"""All that a recompute must reproduce: random state, autocast, settings, context, weights, buffers. It leaves no trace
in global state.

Note [Weights that are exchanged]
    `torch.func.functional_call` lends a module other weights for the time of a forward. A recompute finds the module's
    own again, and takes those that the forward used: the gradients are theirs. A weight that somebody replaced for good
    looks much the same; that is a mistake, and is left for the checks to find. What was lent is no `Parameter`, or one
    that went while a tensor came back that the module had at conversion. Shards and other kinds of tensors are left to
    those who manage them.

Note [Buffers that are read and written]
    The power iteration of a spectral norm begins where the forward before ended, so its recompute needs the buffers as
    the forward found them. Which they are is seen from version counters, module by module: where a forward moved that
    of a floating-point buffer, copies of what it wrote are kept; else none, and from the next forward on none are made.
    (Batch normalisation moves no such counter; its counter of batches is no floating-point number.)

Note [What a caller sets around a forward]
    A backward pass runs after, and perhaps on another thread: autocast, the default dtype and device, the choice of
    kernels (`settings`) and context variables (`context`) may be others by then. They are looked at before each branch,
    as a host may change them around one of its calls, and a recompute finds them as they were there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from revwire._streams.kernels import same_bytes
from revwire._surroundings.context import context_kept
from revwire._surroundings.modes import NOTHING, AutocastState, autocast_state
from revwire._surroundings.randomness import RandomStates, accelerators_of, random_states, set_random_states
from revwire._surroundings.settings import Settings, settings_now, settings_restored


@dataclass(slots=True)
class Surroundings:
    """The state around one evaluation of a branch.

    Attributes:
        devices: the accelerators it runs on.
        randomness: generator states before the branch; emptied by `settle` where the branch drew nothing,
            so that a deterministic branch keeps none (a CPU state has 5 kB).
        autocast: (enabled, dtype) per device type.
        cache_enabled: whether autocast may cache its casts of weights.
        settings, context: see Note [What a caller sets around a forward].
    """

    devices: tuple[torch.device, ...]
    randomness: RandomStates
    autocast: dict[str, AutocastState]
    cache_enabled: bool
    settings: Settings
    context: Context | None

    @classmethod
    def capture(cls, tensors: Iterable[Tensor]) -> Surroundings:
        """The state now, on the CPU and on the devices of ``tensors``."""
        others = [t for t in tensors if not t.is_cpu]
        devices = accelerators_of(others) if others else ()
        autocast = {"cpu": autocast_state("cpu"), **{d.type: autocast_state(d.type) for d in devices}}
        cached = torch.is_autocast_cache_enabled()
        return cls(devices, random_states(devices), autocast, cached, settings_now(bool(devices)), context_kept())

    def settle(self) -> None:
        """After the branch ran: forget the generators it did not draw from.

        At once: who runs next may set a generator back, after which it looks as if nothing had been drawn.
        """
        after = random_states(self.devices)
        if not self.devices:  # as below, in the common case
            if same_bytes(self.randomness[None], after[None]):
                self.randomness = {}
            return
        self.randomness = {d: s for d, s in self.randomness.items() if not same_bytes(s, after[d])}

    def restored(self) -> AbstractContextManager[None]:
        """Run a recompute as the forward ran (but for context variables: see `run_again`); afterwards all is as it was
        before it.
        """
        return _Restored(self)

    def casts(self) -> list[tuple[str, bool, torch.dtype]]:
        """(device type, enabled, dtype) of the casts that a recompute must switch, on or off."""
        return [(kind, *cast) for kind, cast in self.autocast.items() if cast[0] or torch.is_autocast_enabled(kind)]


class _Restored:
    """A run in the surroundings of another one."""

    __slots__ = ("outside", "stack", "surroundings")

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings

    def __enter__(self) -> None:
        there = self.surroundings
        self.outside = random_states(there.devices)
        self.stack: ExitStack | None = None
        try:
            set_random_states(there.randomness)
            casts, settings = there.casts(), settings_restored(there.settings, bool(there.devices))
            if casts or settings is not NOTHING:
                with ExitStack() as stack:
                    stack.enter_context(settings)
                    for kind, enabled, dtype in casts:
                        stack.enter_context(
                            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=there.cache_enabled)
                        )
                    self.stack = stack.pop_all()
        except BaseException:
            set_random_states(self.outside)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            if self.stack is not None:
                self.stack.__exit__(*error)
        finally:
            set_random_states(self.outside)
