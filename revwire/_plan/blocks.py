"""Which modules a user would wrap in `torch.utils.checkpoint`, one by one: every block of a network.

Note [What a block is]
    A block is a module that holds a residual add whose branch multiplies by a matrix or convolves: rewired or not, with
    a computed shortcut or without. Modules of its class that hold none (a block that changes shape, say) are blocks,
    too. Where such modules lie in each other, the outermost is the whole block (a layer around its attention, whose
    output is added inside of it), but for one that holds a stack of blocks: then the blocks of the stack are meant. The
    model itself is never a block. Where the adds stand in the code of the module that runs a stack, what they add is
    one. A network without residual adds has the entries of its stacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from revwire._capture.recording import Recording
from revwire._plan.outside import name_of
from revwire._search.dataflow import flow_of
from revwire._search.residuals import Candidate, residual_adds

_STACKS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def every_block(recording: Recording) -> tuple[str, ...]:
    """Names of the blocks of the model that was recorded, in the order in which they ran, none of them in another. See
    Note [What a block is].
    """
    calls = _Calls(recording)
    chosen = calls.blocks(0) or calls.of(_entries(recording.root)) or calls.of(recording.root.children())
    kinds = {type(recording.events[call].target) for call in chosen if call in calls.adds}
    chosen = calls.apart([*chosen, *calls.of(m for m in recording.root.modules() if type(m) in kinds)])
    return tuple(dict.fromkeys(calls.name(call) for call in sorted(chosen)))


class _Calls:
    """The calls of modules in a recording, and the residual adds in the own code of each."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.events = recording, recording.events
        self.adds: dict[int, list[Candidate]] = {}
        for c in residual_adds(flow_of(recording)):
            if any(self.events[e].is_product for e in c.region):
                self.adds.setdefault(self.registered(c.host), []).append(c)

    def name(self, call: int) -> str:
        return name_of(self.recording, call)

    def registered(self, call: int) -> int:
        """The innermost call around it, or itself, of a module that has a name."""
        around = (call, *reversed(self.recording.calls_around(call)))
        return next((c for c in around if self.name(c)), 0)

    def of(self, modules: Iterable[nn.Module]) -> list[int]:
        """The outermost calls of these modules, or of what is in them, that have weights."""
        wanted = {id(inner) for m in modules for inner in m.modules() if next(inner.parameters(), None) is not None}
        return self.apart(e.number for e in self.events[1:] if e.is_module and id(e.target) in wanted)

    def apart(self, calls: Iterable[int]) -> list[int]:
        """Those with a name that do not lie in, or around, one that comes before them."""
        out: list[int] = []
        for call in filter(self.name, dict.fromkeys(calls)):
            if not any(call < c < self.events[call].end or c < call < self.events[c].end for c in out):
                out.append(call)
        return out

    def blocks(self, call: int) -> list[int]:
        """The blocks in a call that is none itself."""
        out: list[int] = []
        for host in self.apart(sorted(self.inside(call))):
            out += (self.holds_a_stack(host) and self.blocks(host)) or [host]
        return self.apart([*out, *self.branches(call)])

    def inside(self, call: int) -> list[int]:
        """The calls in it that hold adds."""
        return [c for c in self.adds if call < c < self.events[call].end]

    def holds_a_stack(self, call: int) -> bool:
        """Whether the blocks are what it holds, not itself."""
        carried = [c for c in self.inside(call) if not all(add.computed_shortcut for add in self.adds[c])]
        entries: dict[str, set[str]] = {}
        for stack, entry in (pair for host in carried for pair in self.stacks(call, host)):
            entries.setdefault(stack, set()).add(entry)
        return any(len(several) > 1 for several in entries.values()) or len(self.branches(call)) > 2

    def branches(self, call: int) -> list[int]:
        """The calls, in its own code, of entries of a stack: for each of its adds the one that saves most."""
        out: set[int] = set()
        for add in self.adds.get(call, ()):
            around = (self.recording.calls_around(number) for number in add.region)
            below = {calls[calls.index(call) + 1] for calls in around if call in calls[:-1]}
            out.update(sorted((c for c in below if any(self.stacks(call, c))), key=self.saved)[-1:])
        return sorted(out)

    def saved(self, call: int) -> int:
        return sum(e.saved for e in self.events[call : self.events[call].end])

    def stacks(self, call: int, inner: int) -> Iterator[tuple[str, str]]:
        """(its name, the entry) of each stack between one call and another in it, by the names of their modules."""
        parts = self.name(inner).split(".")
        for i in range(len(self.name(call).split(".")) if self.name(call) else 0, len(parts)):
            if isinstance(self.recording.root.get_submodule(".".join(parts[:i])), _STACKS):
                yield ".".join(parts[:i]), parts[i]


def _entries(module: nn.Module) -> list[nn.Module]:
    """The entries of the innermost stacks that hold several modules of one class, made of others; or else of the
    outermost stacks.
    """
    return _repeated(module) or _outermost(module)


def _repeated(module: nn.Module) -> list[nn.Module]:
    made = [type(m) for m in module.children() if not isinstance(m, _STACKS) and any(True for _ in m.children())]
    if isinstance(module, _STACKS) and len(made) > len(set(made)):
        return list(module.children())
    return [entry for child in module.children() for entry in _repeated(child)]


def _outermost(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, _STACKS):
        return list(module.children())
    return [entry for child in module.children() for entry in _outermost(child)]
