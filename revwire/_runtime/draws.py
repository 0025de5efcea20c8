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
    """

    __slots__ = ("_latest", "_states", "devices", "quiet")

    def __init__(self, devices: Sequence[torch.device], *, quiet: bool) -> None:
        self.devices, self.quiet = devices, quiet
        self._states = self._now() if quiet else {}
        self._latest: Call | None = None

    def _now(self) -> RandomStates:
        return random_states(self.devices) if self.devices else {None: _GENERATOR.get_state()}

    def before(self, call: Call) -> None:
        """A call is about to be made."""
        if not self.quiet:
            self._look()
            call.randomness, self._latest = self._states, call

    def _look(self) -> None:
        """Forget the states before the latest call, where nothing was drawn since."""
        now, latest = self._now(), self._latest
        if latest is not None and _same(self._states, now):
            latest.randomness = None
        self._states = now

    def settle(self) -> bool:
        """After the last call: whether it is known what each of them drew."""
        if self.quiet:
            return _same(self._states, self._now())
        self._look()
        return True


def _same(before: RandomStates, now: RandomStates) -> bool:
    return all(same_bytes(state, now[device]) for device, state in before.items())
