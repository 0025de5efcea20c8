"""The generators around the calls of a branch; see Note [Random numbers of a replay] in `replay`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from revwire._runtime.replay import Call
from revwire._streams.kernels import same_bytes
from revwire._surroundings.randomness import RandomStates, random_states

_GENERATOR = torch.default_generator


class Draws:
    """What calls draw, as far as the generators of the CPU and of some devices tell.

    Args:
        quiet: the calls of this branch were seen to draw nothing: they are looked at only before and after all.

    Attributes:
        drew: whether anything was drawn since the first call, by the calls or between them.
    """

    __slots__ = ("_sets_back", "_states", "devices", "drew", "quiet")

    def __init__(self, devices: Sequence[torch.device], *, quiet: bool) -> None:
        self.devices, self.quiet, self.drew = devices, quiet, False
        self._states = self._now() if quiet else {}
        self._sets_back = False

    def _now(self) -> RandomStates:
        return random_states(self.devices) if self.devices else {None: _GENERATOR.get_state()}

    def before(self, call: Call, *, sets_back: bool) -> None:
        """A call is about to be made, which may set generators back itself: then what it drew does not show."""
        self._sets_back = sets_back
        if not self.quiet:
            self._look()
            call.randomness = self._states
        elif sets_back:
            call.randomness = self._now()

    def after(self, call: Call) -> None:
        """It was made, by a branch that is not quiet. (Code may set a generator back before its next call: what a call
        drew is only seen here.)
        """
        if not (self._look() or self._sets_back):
            call.randomness = None

    def _look(self) -> bool:
        """Whether anything was drawn since the last look."""
        before, now = self._states, self._now()
        drew = not all(map(same_bytes, before.values(), now.values()))  # of the same devices, in one order, if any
        if drew or not before:
            self._states = now
        self.drew |= drew
        return drew

    def settle(self) -> bool:
        """After the last call: whether it is known what each of them drew."""
        if self.quiet:
            return all(map(same_bytes, self._states.values(), self._now().values()))
        self._look()
        return True
