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
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revwire._capture.intercept import is_recording
from revwire._errors import CaptureError
from revwire._forwards.base import put_on, standing_forward
from revwire._forwards.following import Following, Planned
from revwire._forwards.leaf import is_leaf, make_leaf
from revwire._forwards.own_checkpoints import look_through_checkpoints
from revwire._forwards.rewired import RewiredForward
from revwire._forwards.straight import is_straight
from revwire._programs.calls import Slot
from revwire._runtime.cells import kept_cell, opened_cell
from revwire._runtime.chain import Chain
from revwire._runtime.run import refuse_transforms
from revwire._runtime.segment import About
from revwire._runtime.unit import Unit
from revwire._search.places import Layout
from revwire._surroundings.holdings import Known
from revwire._surroundings.modes import NOTHING, exporting
from revwire._torch import disable_dynamo, inside_checkpoint

_FLAGS = frozenset({bool, type(None)})

_BY_IDENTITY = frozenset(
    {
        "planned",
        "at",
        "chains",
        "by_call",
        "names",
        "opened",
        "users",
        "assigned",
        "heavy",
        "known",
        "passing",
        "tables",
    }
)


class LiveForward(RewiredForward):
    """The forward of a host whose own code runs; see Note [The host's own code runs].

    Units that run in chunks need their branch before the host's code comes to it: a host that holds such a unit runs
    the program of its example (`RewiredForward`), and so does one that an exporter writes down.
    """

    def __init__(self, host: nn.Module, path: str, slots: list[Slot], layout: Layout, original: Any = None) -> None:
        super().__init__(host, path, slots, original)
        self.layout = layout
        self.told: set[str] = set()
        self.straight = original is None and not layout.opened and not layout.whole and is_straight(host)
        self.code = type(host).forward
        self._resolve()

    def _resolve(self) -> None:
        """What is looked up by identity."""
        self.planned = [Planned(i, s, p) for i, (s, p) in enumerate(zip(self.slots, self.layout.places, strict=True))]
        self.chains = {
            id(p.slot.chain): [q for q in self.planned if q.slot.chain is p.slot.chain] for p in self.planned
        }
        self.at = {(id(p.slot.chain), i): p for p in self.planned for i in (p.slot.index, *p.slot.later)}
        self.by_call: dict[tuple[str, int], list[Planned]] = {}
        for p in self.planned:
            if p.place.origin is not None and p.place.origin.call is not None:
                self.by_call.setdefault((p.place.origin.call, p.place.origin.number), []).append(p)
        self.ready = False

    def _make_ready(self) -> None:
        """Learn the modules of the host: at the first call, as copies come with other ones."""
        look_through_checkpoints()
        self.names: dict[int, str] = {}
        for name, module in self.module.named_modules():
            self.names[id(module)] = f".{name}"
            if module is not self.module:
                make_leaf(module)
        at = {name[1:]: i for i, name in self.names.items()}
        self.opened = {at[name] for name in self.layout.opened if name in at}
        opened = [self.module, *(self.module.get_submodule(n) for n in self.layout.opened if n in at)]
        self.tables = [m._modules for m in opened if m._modules]  # what their code may call is a leaf, or made one
        self.users: dict[int, set[int]] = {}
        self.assigned: dict[int, list[tuple[nn.Module, str]]] = {}
        for p in self.planned:
            for name in p.place.modules:
                self.users.setdefault(at.get(name, -1), set()).add(p.number)
            for called, name, attribute in p.place.assigned:
                if called in at and name in at:
                    found = self.assigned.setdefault(at[called], [])
                    pair = self.module.get_submodule(name), attribute
                    if pair not in found:
                        found.append(pair)
        self.heavy = {id(m) for m in self.module.modules() if next(m.parameters(), None) is not None}
        self.known: dict[int, About] = {}
        self.passing: dict[int, bool] = {}
        self.ready = True

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**{k: v for k, v in state.items() if k not in _BY_IDENTITY}, "ready": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.planned = []

    def on_replica(self, replica: nn.Module) -> LiveForward:
        return LiveForward(replica, self.path, self.slots, self.layout)

    # torch.compile breaks its graph around a host; branches that are compiled by themselves stay compiled
    @disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_recording():
            return self.plain(*args, **kwargs)
        if not self.planned:
            self._resolve()
        if exporting() or any(map(_runs_by_program, self.planned)):
            return super().__call__(*args, **kwargs)
        if self.straight and self._is_plain_call(args, kwargs):
            try:
                program, leaves = self.program_of(args, kwargs)
            except CaptureError:  # this call is followed, and all others
                self.straight = False
            else:
                return program(self.module, leaves)
        refuse_transforms(self.path or type(self.module).__name__)
        self.refuse_old_backward_hooks()
        if not (self.ready and all(is_leaf(m) for table in self.tables for m in table.values() if m is not None)):
            self.note_homes()
            self._make_ready()
        follower = Following(self)
        # `torch.utils.checkpoint` would run this call again, which it must not with a part of a chain: what the host's
        # code saves is kept from it
        with saved_tensors_hooks(kept_cell, opened_cell) if inside_checkpoint() else NOTHING:
            return follower.closed(args, kwargs) if self.layout.whole else follower.run(args, kwargs)

    def _is_plain_call(self, args: Any, kwargs: Any) -> bool:
        """Whether it is given nothing but plain tensors and flags, and runs the code that is a straight line."""
        given = (*args, *kwargs.values()) if kwargs else args
        return type(self.module).forward is self.code and all(type(a) is Tensor or type(a) in _FLAGS for a in given)

    def passes(self, module: nn.Module) -> bool:
        """Whether a module holds units of the same chains: a state that it is given goes on inside."""
        found = self.passing.get(id(module))
        if found is None:
            forwards = (standing_forward(m) for m in module.modules())
            found = any(isinstance(f, RewiredForward) and self._shares_chain(f) for f in forwards)
            self.passing[id(module)] = found
        return found

    def _shares_chain(self, other: RewiredForward) -> bool:
        return any(id(slot.chain) in self.chains for slot in other.slots)

    def about(self, module: nn.Module) -> About:
        """What is known of a module that its code calls."""
        found = self.known.get(id(module))
        if found is None:
            found = self.known[id(module)] = Known(), self.assigned.get(id(module), ())
        return found

    def is_light(self, function: Any) -> bool:
        """Whether what is called has no weights."""
        return id(function) not in self.heavy

    def next_unit(self, chain: Chain, position: int, module: nn.Module | None) -> Planned | None:
        """The unit of a chain that comes first behind a position: of those that call ``module``, if there are any."""
        users = self.users.get(id(module), ()) if module is not None else ()
        expected = self.at.get((id(chain), position))
        if expected is not None and (not users or expected.number in users):
            return expected
        found = [(place, p) for p in self.chains.get(id(chain), ()) if (place := p.unit.place(position)) is not None]
        return min(found, key=lambda f: (bool(users) and f[1].number not in users, f[0]), default=(0, None))[1]

    def tell(self, unit: Unit, what: str) -> None:
        """Warn, once for each unit."""
        if unit.path not in self.told:
            self.told.add(unit.path)
            warnings.warn(f"{unit.path}: {what}", stacklevel=2)


def _runs_by_program(p: Planned) -> bool:
    chain = p.slot.chain
    if chain.observer is not None and chain.observer.wants_branches:
        return True
    return chain.cuts is not None and chain.cuts[p.slot.index] is not None


def install_live(host: nn.Module, path: str, slots: list[Slot], layout: Layout) -> LiveForward:
    """Put the live forward on a host."""
    forward = LiveForward(host, path, slots, layout, standing_forward(host))
    put_on(forward)
    if not forward.straight:
        for module in host.modules():
            if module is not host:
                make_leaf(module)
    return forward
