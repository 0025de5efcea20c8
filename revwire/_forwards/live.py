"""Hosts whose own code runs in each call; units are what it does between a state and its residual add.

Note [The host's own code runs]
    Reads, effects, random draws and decisions of the code that holds the residual adds are its own, and happen once,
    in each call anew. It is followed meanwhile (`following`): by a `TorchFunctionMode`, which sees its torch calls, and
    by the leaves that it calls (`leaf`), inside of which nothing is followed. Where it uses a state, a unit begins;
    where it adds to the state what came from it, the step of the chain takes the place of the add, and the code is
    handed the next state. The plan says what to expect; a call that goes another way (an early return, a block left
    out, an add more or less) is rewired as far as it goes, and what is left runs as it was written, with ordinary
    gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from revwire._capture.code_names import Read
from revwire._capture.intercept import is_recording
from revwire._errors import CaptureError
from revwire._forwards.base import put_on, standing_forward
from revwire._forwards.cached import MAX_PROGRAMS
from revwire._forwards.following import Following
from revwire._forwards.host import Host, make_leaves
from revwire._forwards.opaque_calls import look_through_checkpoints, make_known
from revwire._forwards.rewired import RewiredForward
from revwire._forwards.straight import is_straight
from revwire._programs.assembly import Program
from revwire._programs.build import input_leaves
from revwire._programs.calls import Slot
from revwire._runtime.cells import kept_from_checkpoint
from revwire._runtime.follower import NOW
from revwire._runtime.run import refuse_transforms
from revwire._search.places import Layout
from revwire._surroundings.modes import exporting
from revwire._torch import disable_dynamo, inside_checkpoint

_PLAIN = frozenset({Tensor, bool, type(None)})


class LiveForward(RewiredForward):
    """The forward of a host whose own code runs; see Note [The host's own code runs].

    Units that run in chunks need their branch before the host's code comes to it: a host that holds such a unit runs
    the program of such a call (`RewiredForward`), if all is known that its code reads; and so does one whose code is a
    straight line.
    """

    def __init__(self, host: nn.Module, path: str, slots: list[Slot], layout: Layout, original: Any = None) -> None:
        super().__init__(host, path, slots, original)
        self.layout = layout
        self.straight = original is None and not layout.opened and not layout.whole and is_straight(host)
        self.code = type(host).forward
        self.host: Host | None = None
        self.whole: set[Any] = set()  # calls whose units run whole, though they were to run in chunks
        look_through_checkpoints()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        look_through_checkpoints()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "host": None, "whole": set()}

    def on_replica(self, replica: nn.Module) -> LiveForward:
        return LiveForward(replica, self.path, self.slots, self.layout)

    # torch.compile breaks its graph around a host; branches that are compiled by themselves stay compiled
    @disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        follower = NOW.follower
        if is_recording() or (follower is not None and follower.expects(args, kwargs)):  # a part of a unit of that host
            return self.plain(*args, **kwargs)
        if all(map(_is_passed, self.slots)):
            return self.plain(*args, **kwargs)
        found = self._program(args, kwargs)
        if found is not None:
            program, leaves = found
            if not inside_checkpoint():
                return program(self.module, leaves)
            with kept_from_checkpoint():
                return program(self.module, leaves)
        if exporting() and torch.is_grad_enabled():
            raise self.cannot_export()
        refuse_transforms(self.path or type(self.module).__name__)
        self.refuse_old_backward_hooks()
        if self.host is None or not self.host.is_current:
            self.note_homes()
            self.host = Host(self.module, self.slots, self.layout)
        if self.layout.opaque:
            make_known()
        follower = Following(self.host, self.plain, self._names_of_arguments)
        with kept_from_checkpoint():
            return follower.closed(args, kwargs) if self.layout.whole else follower.run(args, kwargs)

    def _program(self, args: Any, kwargs: Any) -> tuple[Program, list[Any]] | None:
        """The program by which a call runs, and what it is given; None where the host's code is followed."""
        if self.straight and self._is_plain_call(args, kwargs):
            try:
                return self.program_of(args, kwargs)
            except CaptureError:  # this call is followed, and all others; but an exporter has no values to observe
                self.straight = exporting()
        if not any(map(_runs_by_program, self.slots)):
            return None
        if self.whole and self.signature(args, kwargs, input_leaves((args, kwargs))) in self.whole:
            return None
        try:
            return self.program_of(args, kwargs)
        except CaptureError as error:
            if exporting():
                raise
            self.run_whole(self.signature(args, kwargs, input_leaves((args, kwargs))), error)
            return None

    def reads_of(self, modules: Iterable[nn.Module]) -> list[Read]:
        return [] if self.straight else super().reads_of(modules)  # a straight line reads nothing

    def run_whole(self, call: Any, error: CaptureError) -> None:
        """Let such calls run whole, and warn once that they do, unless revwire only looks at what may be cut."""
        if len(self.whole) >= MAX_PROGRAMS:
            self.whole.clear()
        self.whole.add(call)
        cut = [s for s in self.slots if s.chain.cuts is not None and s.chain.cuts[s.index] is not None]
        if cut and self.path not in cut[0].chain.told:
            cut[0].chain.told.add(self.path)
            warnings.warn(
                f"{self.path or type(self.module).__name__}: its units run whole instead of in chunks, as its code "
                f"{error.__cause__ or error}",
                stacklevel=2,
            )

    def _is_plain_call(self, args: Any, kwargs: Any) -> bool:
        """Whether it is given nothing but plain tensors and flags, and runs the code that is a straight line."""
        for given in (*args, *kwargs.values()) if kwargs else args:
            if type(given) not in _PLAIN:
                return False
        return type(self.module).forward is self.code

    def _names_of_arguments(self) -> tuple[str, ...]:
        original = self.original
        code = getattr(type(self.module).forward if original is None else original, "__code__", None)
        return () if code is None else code.co_varnames[original is None : code.co_argcount]


def _is_passed(slot: Slot) -> bool:
    observer = slot.chain.observer
    return observer is not None and observer.passes(slot.chain, slot.index)


def _runs_by_program(slot: Slot) -> bool:
    chain = slot.chain
    if chain.observer is not None and chain.observer.wants_branch(chain, slot.index):
        return True
    return chain.cuts is not None and chain.cuts[slot.index] is not None


def install_live(host: nn.Module, path: str, slots: list[Slot], layout: Layout) -> LiveForward:
    """Put the live forward on a host."""
    forward = LiveForward(host, path, slots, layout, standing_forward(host))
    put_on(forward)
    if not forward.straight:
        make_leaves(host)
    return forward
