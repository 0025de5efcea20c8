"""The forward of a rewired host: it picks the program of each call by its signature, and captures those it lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from revwire._capture.run import record
from revwire._errors import CaptureError, RevwireError
from revwire._forwards.base import standing_forward
from revwire._forwards.cached import ProgramForward
from revwire._programs.assembly import Program
from revwire._programs.build import build_graph, input_leaves
from revwire._programs.calls import Slot
from revwire._runtime.run import refuse_transforms
from revwire._search.units import find_units
from revwire._surroundings.modes import exporting
from revwire._torch import has_old_backward_hooks


class RewiredForward(ProgramForward[Program]):
    """The forward of a rewired host.

    Args:
        host: the module.
        path: its qualified name in the model, for errors.
        slots: the units it holds.
        original: an instance attribute ``forward`` that was there before, or None.
    """

    def __init__(self, host: nn.Module, path: str, slots: list[Slot], original: Any = None) -> None:
        super().__init__(host, path, original)
        self.slots = slots
        self.note_homes()

    def note_homes(self) -> None:
        """Let the chains know the tensors that the host has of its own."""
        for chain in {id(slot.chain): slot.chain for slot in self.slots}.values():
            chain.homes.note(self.module)

    def program_of(self, args: Any, kwargs: Any) -> tuple[Program, list[Any]]:
        """The program for such a call, and what it is given: captured now, if it is the first one.

        Raises:
            CaptureError: there can be none.
        """
        refuse_transforms(self.path or type(self.module).__name__)
        self.refuse_old_backward_hooks()
        one = not kwargs and len(args) == 1 and type(args[0]) is torch.Tensor
        leaves = [args[0]] if one else input_leaves((args, kwargs))
        program = self.program_for(args, kwargs, leaves)
        if (program is None or torch.is_grad_enabled()) and exporting():
            raise self.cannot_export()
        if program is None:
            program = self.capture(args, kwargs)
            self.keep(program, args, kwargs, leaves)
        return program, leaves

    def cannot_export(self) -> CaptureError:
        """The error that says that an exporter, which has no values to observe, can only write down a call that was met
        before.
        """
        return CaptureError(
            f"{self.path or type(self.module).__name__}: got a call by an exporter that was not met before, or one "
            "with gradients; expected a call that was; call the model on the example first, as it is to be exported: "
            "model.eval(), then both inside of `with torch.no_grad():`; or export revwire.revert(model)"
        )

    def refuse_old_backward_hooks(self) -> None:
        """`register_backward_hook` shows the gradients of the last operation in a module, which is another one in a
        rewired module.
        """
        if has_old_backward_hooks(self.module) and torch.is_grad_enabled():
            raise CaptureError(
                f"{self.path or type(self.module).__name__}: got a hook of register_backward_hook, which is called "
                "with the gradients of the module's last operation; expected full backward hooks on a rewired module; "
                f"use register_full_backward_hook, or exclude it: convert(..., exclude=[{self.path + '*'!r}])"
            )

    def capture(self, args: Any, kwargs: Any) -> Program:
        """Observe the original forward on copies of the arguments, and build the program of this signature.

        Without gradients a module may take another path (a fused kernel) in which the units cannot be seen; then the
        path that it takes with gradients serves.

        Raises:
            CaptureError: it cannot be captured, or does not have the units it had at conversion.
        """
        try:
            if any(isinstance(t, torch.Tensor) and t.is_nested for t in input_leaves((args, kwargs))):
                raise CaptureError("is given a nested tensor; pad it, or switch off what makes it")
            try:
                return self.observe(args, kwargs, torch.is_grad_enabled())
            except CaptureError:
                if torch.is_grad_enabled():
                    raise
                return self.observe(args, kwargs, True)
        except RevwireError as error:
            raise CaptureError(
                f"{self.path or type(self.module).__name__}: called as it was not at conversion, and {error}; call it "
                "as in the example, give convert() an example of this call, or exclude it: convert(..., "
                f"exclude=[{self.path + '*'!r}])"
            ) from error

    def observe(self, args: Any, kwargs: Any, gradients: bool) -> Program:
        """One attempt of `capture`."""
        self.note_homes()
        recording = record(self.module, args, kwargs, forward=self.plain, gradients=gradients)
        followed = {place for place, s in enumerate(self.slots) if max((s.index, *s.later)) + 1 < s.chain.length}
        following = {place for place, s in enumerate(self.slots) if s.index > 0}
        units, inline = find_units(recording, [(s.key, s.posts) for s in self.slots], followed, following)
        return Program.of(build_graph(recording, inline), units, self.slots)


def rewired_of(module: nn.Module) -> RewiredForward | None:
    """The rewired forward of a module, if it has one."""
    forward = standing_forward(module)
    return forward if isinstance(forward, RewiredForward) else None
