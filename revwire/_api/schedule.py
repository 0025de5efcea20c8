"""`set_coupling` and `CouplingSchedule`: change the coupling of a converted model while it trains. Nothing is
rebuilt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import cos, pi
from typing import Any, Literal

from torch import nn

from revwire._api.config import warn_of_lost_function
from revwire._errors import CouplingError
from revwire._forwards.converted import converted
from revwire._forwards.first_call import FirstCall
from revwire._forwards.rewired import rewired_of
from revwire._plan.options import Choice, Couplings
from revwire._plan.plan import PlannedChain
from revwire._runtime.chain import Chain
from revwire.couplings import coupling_from
from revwire.couplings.base import Coupling, is_number

Shape = Literal["linear", "cosine", "step"]


def set_coupling(model: nn.Module, coupling: Couplings, *, exact: bool | None = None) -> None:
    """Give the chains of a converted model another coupling, from its next forward on.

    A forward that waits for its backward keeps the coupling it ran with. Anchors and their tolerance stay as they are.

    Args:
        model: a converted model.
        coupling: as for `convert`: a coupling, or a dict from globs to couplings. Units that no glob matches keep
            theirs.
        exact: fixed-point streams (True), float streams (False), or what the couplings need (None).

    Warns:
        FunctionLostWarning: the weights were trained under a coupling of another kind, which does not keep the function
            of the original network.

    Raises:
        CouplingError: no such coupling, or no such arithmetic for it; nothing is changed then.
        ConversionError: the model is not converted (or waits for its first call), or a glob matches no unit.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> net = revwire.convert(net, torch.randn(1, 4, 16))
        >>> revwire.set_coupling(net, "bdia:1/4")
        >>> revwire.report(net).chains[0].coupling
        'bdia:1/4'
    """
    state = converted(model)
    names = [name for planned in state.plan.chains for u in planned.units for name in (u.path, u.host)]
    choices = [_choice(coupling, chain, exact) for chain in state.chains] or [Choice.of(coupling, exact)]
    choices[0].refuse_idle_globs(names)
    found = [
        _couplings(choice, planned, chain, isinstance(coupling, Mapping))
        for choice, planned, chain in zip(choices, state.plan.chains, state.chains, strict=False)
    ]
    warn_of_lost_function(model, "that coupling", [c for couplings, _, _ in found for c in couplings])
    _set(model, found)


def _choice(coupling: Couplings, chain: Chain, exact: bool | None) -> Choice:
    anchors = "auto" if chain.adapts else chain.spacing
    return Choice.of(coupling, exact, anchors, chain.tolerance)  # type: ignore[arg-type]


def _couplings(
    choice: Choice, planned: PlannedChain, chain: Chain, by_glob: bool
) -> tuple[list[Coupling], bool, int | None]:
    """(the coupling of each unit, whether exact, units between anchors)."""
    couplings = [
        (replace(choice, default=old) if by_glob else choice).coupling((u.path, u.host), u.pattern).in_place_of(old)
        for u, old in zip(planned.units, chain.couplings, strict=True)
    ]
    return couplings, *choice.arithmetic(chain.name, couplings)


def _set(model: nn.Module, found: Sequence[tuple[Sequence[Coupling], bool, int | None]]) -> None:
    state = converted(model)
    moved = False
    for chain, (couplings, exact, spacing) in zip(state.chains, found, strict=True):
        moved = moved or any(a.drops_skip != b.drops_skip for a, b in zip(couplings, chain.couplings, strict=True))
        chain.couplings, chain.exact = tuple(couplings), exact
        chain.set_anchors(spacing, adapts=chain.adapts, tolerance=chain.tolerance)
    recosted(model)
    if moved:  # whether a post-activation block drops its skip stands in the programs
        for module in model.modules():
            rewired = rewired_of(module)
            if rewired is not None:
                rewired.programs.clear()


def recosted(model: nn.Module) -> None:
    """Let the plan tell of the couplings that the chains have now; its peaks hold where units keep as
    much as before.
    """
    state = converted(model)
    before, now = state.plan, state.present_plan()
    same = [u.kept_bytes for u in before.units] == [u.kept_bytes for u in now.units]
    state.plan = now if same else replace(now, peaks=None)


class CouplingSchedule:
    """Moves the coupling of a converted model to a target, a share at each step, as a learning-rate scheduler moves a
    rate.

    The parameters go from those the chains have now to those of the target. In exact streams the parameter that sets
    |b| goes in powers of two. Source of the idea: DR2Net (arXiv 2401.04105), which moves (α, β) from the pretrained
    network to the reversible one.

    Args:
        model: a converted model; all its units have one coupling, of the target's kind.
        target: the coupling at the end.
        total: number of calls of `step` after which it is reached: optimizer steps or epochs, whichever `step` is
            called by.
        shape: ``"linear"``, ``"cosine"`` (slow at both ends), or ``"step"``: at each of ``milestones``.
        milestones: with ``"step"``, ascending counts of `step` at which an equal part of the way is taken.

    Raises:
        CouplingError: the model's coupling is of another kind, or total or milestones make no sense.
        ConversionError: the model is not converted.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> net = revwire.convert(net, torch.randn(1, 4, 16), coupling="dr2net:1,1/16")
        >>> schedule = revwire.CouplingSchedule(net, "dr2net:0,1", total=2)
        >>> schedule.step()
        >>> schedule.coupling.name
        'dr2net:1/2,1/2'
    """

    def __init__(
        self,
        model: nn.Module,
        target: str | Coupling,
        *,
        total: int | None = None,
        shape: Shape = "linear",
        milestones: Sequence[int] = (),
    ) -> None:
        if isinstance(vars(model).get("forward"), FirstCall):
            raise CouplingError(
                "CouplingSchedule: got a model that waits for its first call; expected one that was called, or had an "
                "example"
            )
        self.model = model
        self.target = coupling_from(target)
        self.start = self._now()
        self.shape = shape
        self.milestones = tuple(milestones)
        self.total = self._checked(total)
        self.exact = all(chain.exact for chain in converted(model).chains)
        self.count = 0
        self.start.between(self.target, 0.0, exact=self.exact)  # raises where the kinds differ

    @property
    def coupling(self) -> Coupling:
        """The coupling after the steps so far."""
        return self.start.between(self.target, self.share, exact=self.exact)

    @property
    def share(self) -> float:
        """The share of the way that is done, from 0 to 1."""
        if self.shape == "step":
            return sum(self.count >= m for m in self.milestones) / len(self.milestones)
        done = min(1.0, self.count / self.total)
        return done if self.shape == "linear" else (1 - cos(pi * done)) / 2

    def step(self) -> None:
        """Call it after each optimizer step, or after each epoch."""
        self.count += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here: plain data."""
        return {
            "start": self.start.name,
            "target": self.target.name,
            "total": self.total,
            "shape": self.shape,
            "milestones": list(self.milestones),
            "count": self.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there: the model gets the coupling of that count.

        Raises:
            CouplingError: the state is of another schedule.
        """
        keys = self.state_dict().keys()
        if set(state) != set(keys):
            raise CouplingError(
                f"CouplingSchedule: got a state with {sorted(state)}; expected {sorted(keys)}, as state_dict() gives"
            )
        self.start, self.target = coupling_from(state["start"]), coupling_from(state["target"])
        self.total, self.shape, self.milestones = int(state["total"]), state["shape"], tuple(state["milestones"])
        self.count = int(state["count"])
        self._apply()

    def _apply(self) -> None:
        if any(c.bare != self.coupling for chain in converted(self.model).chains for c in chain.couplings):
            set_coupling(self.model, self.coupling, exact=self.exact)

    def _now(self) -> Coupling:
        found = {c.bare for chain in converted(self.model).chains for c in chain.couplings}
        if len(found) != 1:
            names = ", ".join(sorted(c.name for c in found)) or "no chain"
            raise CouplingError(f"CouplingSchedule: got a model with {names}; expected one coupling for all units")
        return next(iter(found))

    def _checked(self, total: int | None) -> int:
        if self.shape not in ("linear", "cosine", "step"):
            raise CouplingError(f"CouplingSchedule: got shape {self.shape!r}; expected 'linear', 'cosine' or 'step'")
        if self.shape == "step":
            counts = all(map(is_number, self.milestones))
            if not self.milestones or not counts or list(self.milestones) != sorted(set(self.milestones)):
                raise CouplingError(
                    f"CouplingSchedule: got milestones {list(self.milestones)}; expected ascending counts of steps"
                )
            return self.milestones[-1]
        if total is None or not is_number(total) or total < 1:
            raise CouplingError(
                f"CouplingSchedule: got total={total!r}; expected the number of steps after which the target is reached"
            )
        return total
