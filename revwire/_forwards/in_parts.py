"""The forward of a module in the branch of a unit whose core runs in parts; see Note [Cores in parts]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revwire._capture.arguments import fresh_arguments
from revwire._capture.intercept import is_recording
from revwire._capture.run import record
from revwire._errors import CaptureError
from revwire._forwards.base import put_on, standing_forward
from revwire._forwards.cached import MAX_PROGRAMS, ProgramForward
from revwire._programs.build import input_leaves
from revwire._runtime.chain import Chain
from revwire._splitting.core_function import Parting, parts_of
from revwire._splitting.core_program import CoreProgram, core_program
from revwire._splitting.core_relations import Known
from revwire._splitting.core_search import Sizes, which
from revwire._streams.samples import alike
from revwire._structures import tensors_in
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.context import context_of_its_own
from revwire._surroundings.modes import exporting, nothing_compiled, transformed
from revwire._surroundings.randomness import accelerators_of, random_states
from revwire._torch import disable_dynamo


class PartedForward(ProgramForward[CoreProgram]):
    """The forward of a module whose core runs in parts. A call that cannot be captured, or holds no core, runs as it
    would have.

    Args:
        module: the module.
        path: its qualified name in the model, for errors.
        parting: into how many parts; it may change.
        sizes: of the dimensions along which its core may be cut, on the example.
        known: what is known of calls, for all modules of a model.
        original: an instance attribute ``forward`` that was there before, or None.
    """

    def __init__(
        self, module: nn.Module, path: str, parting: Parting, sizes: Sizes, known: Known, original: Any = None
    ) -> None:
        super().__init__(module, path, original)
        self.parting = parting
        self.sizes = sizes
        self.known = known
        self.whole: set[Any] = set()  # signatures of calls without a core
        self.largest = 0  # elements of what it was given with gradients

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "known": {}, "whole": set()}

    @property
    def count(self) -> int:
        """In how many parts its core is to run."""
        return self.parting.count

    @property
    def parts(self) -> int:
        """In how many it runs on the example."""
        return self.parts_in(self.count)

    def parts_in(self, count: int) -> int:
        """In how many it would run there, of so many that are wanted."""
        return len(parts_of(self.sizes[which(self.sizes, count)], count))

    def cut(self, count: int) -> None:
        """Run its core in so many parts from now on."""
        if count != self.count:
            self.parting.count = count
            self.programs.clear()
            self.whole.clear()

    @disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.count == 1 or self.parting.chain.original or is_recording() or exporting() or transformed():
            return self.plain(*args, **kwargs)
        leaves = input_leaves((args, kwargs))
        if self.is_small(leaves):
            return self.plain(*args, **kwargs)
        key = self.key(args, kwargs, leaves)
        program = self.programs.get(key)
        if program is None and key not in self.whole:
            program = self.captured(args, kwargs, leaves)
        return self.plain(*args, **kwargs) if program is None else program(self.module, leaves)

    def captured(self, args: Any, kwargs: Any, leaves: list[Any]) -> CoreProgram | None:
        """The program for such a call; None, which is remembered, where there is none."""
        try:
            recording = record(self.module, args, kwargs, forward=self.plain, gradients=torch.is_grad_enabled())
            program = core_program(recording, self.path, self.parting, self.known)
            if self.agrees(program, args, kwargs):
                self.keep(program, args, kwargs, leaves)
                return program
        except CaptureError:
            pass
        self.keep_whole(args, kwargs, leaves)
        return None

    def is_small(self, leaves: list[Any]) -> bool:
        """Whether a call without gradients is smaller than those with: what a step has room for, it has; and generation
        has many shapes.
        """
        size = sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
        if torch.is_grad_enabled():
            self.largest = max(self.largest, size)
            return False
        return size < self.largest

    def agrees(self, program: CoreProgram, args: Any, kwargs: Any) -> bool:
        """Whether the core in parts gives, in this call, what it gives whole; as far as that can be told where it draws
        random numbers.
        """
        devices = accelerators_of([*tensors_in((args, kwargs)), *self.module.parameters()])
        outs: list[Any] = []
        for run in (
            lambda given: self.plain(*given[0], **given[1]),
            lambda given: program(self.module, input_leaves(given)),
        ):
            with torch.no_grad(), left_as_found(self.module, (args, kwargs)), nothing_compiled():
                before = random_states(devices)
                outs.append(context_of_its_own().run(run, fresh_arguments((args, kwargs))))
                if not all(torch.equal(state, before[device]) for device, state in random_states(devices).items()):
                    return True
        whole, parts = (list(tensors_in(out)) for out in outs)
        return len(whole) == len(parts) and all(map(alike, parts, whole))

    def keep_whole(self, args: Any, kwargs: Any, leaves: list[Any]) -> None:
        """Remember that such a call, of these shapes, has no program."""
        if len(self.whole) >= MAX_PROGRAMS:
            self.whole.clear()
        self.note_shapes(args, kwargs, leaves)
        self.whole.add(self.key(args, kwargs, leaves))

    def on_replica(self, replica: nn.Module) -> PartedForward:
        return PartedForward(replica, self.path, self.parting, self.sizes, self.known)


def install_parts(module: nn.Module, path: str, chain: Chain, sizes: Sizes, known: Known) -> PartedForward:
    """Put such a forward on a module; it runs whole until it is cut."""
    forward = PartedForward(module, path, Parting(chain), sizes, known, standing_forward(module))
    put_on(forward)
    return forward
