"""Forwards that run programs: graphs of their module, one for each signature of a call.

Note [Programs and signatures]
    A module keeps one program per *signature*: what Python could have decided on, apart from tensor values: the kinds
    of the arguments and the constants among them, training flags, the submodules, the constants among the attributes of
    the opened modules, autocast, whether gradients are enabled, and (only where the opened code looked at a shape) all
    shapes and strides, and all else that the code reads, as its source tells (Note [Reads] in `code_reads`). A call
    with a new signature is captured anew and kept beside the others, so a program never runs on a decision it has not
    seen. Code of which it is not known what it reads has no program.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

from revwire._capture.code_names import Read, identity
from revwire._capture.code_reads import reads_of, values_of
from revwire._forwards.base import InstanceForward, plain_forward
from revwire._forwards.guards import Standing, StandingGuard
from revwire._forwards.signature import call_signature, details

MAX_PROGRAMS = 64


_MAX_FAILURES = 16


class _Guarded(Protocol):
    """A program, and what it holds for: all shapes or those of its capture, and the modules whose attributes its code
    depends on.
    """

    @property
    def shape_dependent(self) -> bool: ...

    @property
    def guarded(self) -> tuple[nn.Module, ...]: ...


P = TypeVar("P", bound=_Guarded)


class ProgramForward(InstanceForward, Generic[P]):
    """A forward that has a program for each signature; see Note [Programs and signatures]."""

    def __init__(self, module: nn.Module, path: str, original: Any = None) -> None:
        super().__init__(module, path, original)
        self.programs: dict[Any, P] = {}
        self.by_shape: set[Any] = set()
        self.guarded: dict[int, nn.Module] = {id(module): module}
        self.guard: StandingGuard | None = None
        self.reads: tuple[Read, ...] = ()
        self.failures = 0  # in a row that showed a change
        self.last: tuple[Any, Standing, Any, P] | None = (
            None  # the signature, what the modules were, what was read, and the program of the last call
        )

    def __getstate__(self) -> dict[str, Any]:
        """Programs are compiled code for this module: a copy captures its own."""
        nothing: dict[str, Any] = {
            "programs": {},
            "by_shape": set(),
            "reads": (),
            "guarded": None,
            "guard": None,
            "last": None,
        }
        return {**self.__dict__, **nothing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.guarded = {id(self.module): self.module}

    def program_for(self, args: Any, kwargs: Any, leaves: list[Any]) -> P | None:
        """The program for such a call, if there is one."""
        signature, standing, read = call_signature(args, kwargs, leaves), self.standing(), values_of(self.reads)
        last = self.last
        if last is not None and last[1] is standing and last[0] == signature and last[2] == read:  # as below, unhashed
            return last[3]
        key = self.keyed((signature, standing, read), leaves)
        program = self.programs.get(key)
        if program is not None and not program.shape_dependent:
            self.last = signature, standing, read, program
        return program

    def key(self, args: Any, kwargs: Any, leaves: list[Any]) -> Any:
        """The signature of a call, with shapes where a program of that signature looks at them."""
        return self.keyed(self.signature(args, kwargs, leaves), leaves)

    def signature(self, args: Any, kwargs: Any, leaves: list[Any]) -> Any:
        """What tells calls apart, but for shapes."""
        return call_signature(args, kwargs, leaves), self.standing(), values_of(self.reads)

    def keyed(self, signature: Any, leaves: list[Any]) -> Any:
        return (signature, details(self.module, leaves)) if signature in self.by_shape else signature

    def note_shapes(self, args: Any, kwargs: Any, leaves: list[Any]) -> None:
        """Let calls of such a signature be told apart by their shapes."""
        self.last = None
        self.by_shape.add(self.signature(args, kwargs, leaves))

    def standing(self) -> Standing:
        """What the modules are now; mostly, what they were at the last call."""
        guard = self.guard
        if guard is not None and guard.count == len(self.guarded) and guard.holds():
            self.failures = 0
            return guard.standing
        guarded = (*self.guarded.values(),)
        standing = Standing(self.module, guarded)
        self.guard = None
        if self.failures < _MAX_FAILURES:  # else something changes at every call
            self.failures += 1
            with suppress(TypeError):
                self.guard = StandingGuard(standing, self.module, guarded)
        return standing

    def keep(self, program: P, args: Any, kwargs: Any, leaves: list[Any]) -> None:
        """Store a program under its signature.

        Raises:
            CaptureError: it is not known what its code reads.
        """
        self.last = None
        reads = self.reads_of((self.module, *program.guarded))
        new = {id(m): m for m in program.guarded if id(m) not in self.guarded}
        if new or reads:  # from now on signatures hold these modules' attributes too, so no older one can be met again
            self.reads = (*self.reads, *reads)
            self.guarded.update(new)
            self.guard = None
            self.programs.clear()
            self.by_shape.clear()
        while len(self.programs) >= MAX_PROGRAMS:
            self.programs.pop(next(iter(self.programs)))
        if program.shape_dependent:
            self.note_shapes(args, kwargs, leaves)
        self.programs[self.key(args, kwargs, leaves)] = program

    def reads_of(self, modules: Iterable[nn.Module]) -> list[Read]:
        """What the code of these modules reads, and is not in the signatures yet."""
        known = {identity(read) for read in self.reads}
        found = reads_of(modules, lambda m: self.before if m is self.module else plain_forward(m))
        return [read for read in found if identity(read) not in known]
