"""A plan, found again in a model: the same chains of the same units, and the plan's choices for them.

Note [The plan decides]
    The model is run once on an example, as the places of units in the code must be known. Of all residual adds, only
    those of the plan may be units, so that sizes, modes and measurements decide nothing: processes with other data, or
    another clock, come to the same layout. What is found must then be what the plan says, by names, patterns, hosts and
    counts; shapes may be others.
"""

from __future__ import annotations

from collections.abc import Iterable
from glob import escape
from itertools import zip_longest

from revwire._capture.recording import Recording
from revwire._errors import ConversionError
from revwire._plan.adds import WHOLE
from revwire._plan.names import Placed
from revwire._plan.options import Choice, Options
from revwire._plan.outside import Outside
from revwire._plan.plan import Plan, PlannedUnit
from revwire._plan.survey import InBranch, Planner, Prepared
from revwire._runtime.chain import Chain
from revwire._runtime.range import Reach
from revwire._search.chains import CALLER, Search
from revwire._search.residuals import Candidate
from revwire.couplings import Coupling

_OTHERS = f"{CALLER}: not a unit of the plan"


class Again(Planner):
    """Finds what a plan says in another run of its model; see Note [The plan decides].

    Args:
        recording: of an example.
        plan: what is to be found.
    """

    def __init__(self, recording: Recording, plan: Plan) -> None:
        super().__init__(recording, _options(plan))
        self.plan = plan
        self.wanted = {u.add for u in plan.units}

    def run(self) -> Prepared:
        """What is to be installed.

        Raises:
            ConversionError: the model is not that of the plan; names the first difference.
        """
        self._refuse_strangers(self.plan.hosts, "has units in")
        self._refuse_strangers(self.plan.checkpointed, "checkpoints")
        return super().run()._replace(plan=self.plan)

    def refuse(self, c: Candidate) -> str | None:
        if c.add in self.banned:
            return self.banned.reason(c.add, self.names.name(c.host) or "the model")
        add = (self.names.name(c.host), WHOLE) if c.whole else self.adds[c.add]
        return None if add in self.wanted else _OTHERS

    def whole(self, c: Candidate) -> list[int]:
        return [call for call in self.recording.calls_around(c.add) if (self.names.name(call), WHOLE) in self.wanted]

    def unique(self, search: Search) -> list[list[Placed]]:
        chains = super().unique(search)
        for i, (planned, found) in enumerate(zip_longest(self.plan.chains, chains)):
            units = () if planned is None else planned.units
            for k, (u, f) in enumerate(zip_longest(units, found or ())):
                if u is None or f is None or (u.path, u.host, u.pattern) != (f.path, f.host_path, f.pattern):
                    here = "nothing" if f is None else _named(f.path, f.host_path, f.pattern)
                    there = "nothing" if u is None else _named(u.path, u.host, u.pattern)
                    raise self._other(f"chain {i}, unit {k}: the plan has {there}, this model {here}{self._why(u)}")
        known = {*(s.path for s in self.plan.skipped), *(u.path for u in self.plan.units)}
        for c in search.rejected:
            if not c.inside and self.names.place(c).path not in known:
                raise self._other(f"the plan says nothing of {self.names.place(c).path}, a residual add of this model")
        return chains

    def chain(self, number: int, units: list[Placed]) -> Chain:
        """A chain as the plan has it, scaled for the larger of the two examples."""
        planned, chain = self.plan.chains[number], super().chain(number, units)
        chain.couplings, chain.exact = tuple(map(_scheme, planned.units)), planned.exact
        chain.set_anchors(planned.anchors, adapts=planned.adapts, tolerance=planned.tolerance)
        chain.reach = Reach(max(planned.largest, chain.largest or 0.0), chain.reach.usual)
        chain.keeps_last = planned.keeps_last
        modes, cuts = tuple(u.mode for u in planned.units), tuple(u.cut for u in planned.units)
        chain.modes = modes if any(mode != "reversible" for mode in modes) else None
        chain.cuts = cuts if any(cuts) else None
        return chain

    def mark_last(self, units: list[list[Placed]], chains: list[Chain], plan: Plan) -> None:
        """Nothing is left to decide."""

    def outside(self, search: Search, units: list[list[Placed]]) -> Outside:
        try:
            return super().outside(search, units)
        except ConversionError as error:
            raise self._other(f"the plan checkpoints what cannot be checkpointed here ({error})") from None

    def cores(self, units: list[list[Placed]]) -> dict[str, InBranch]:
        found = super().cores(units)
        wanted = [path for u in self.plan.units for path, _ in u.cores]
        for path in wanted:
            if path not in found:
                raise self._other(f"the plan runs the core of {path} in parts, and this model has none there")
        return {path: found[path] for path in found if path in wanted}

    def _refuse_strangers(self, names: Iterable[str], what: str) -> None:
        """Raise where the model has no module of one of these names."""
        modules = {name for several in self.recording.module_names.values() for name in several}
        for name in names:
            if name and name not in modules:
                raise self._other(f"the plan {what} {name}, and this model has no module of that name")

    def _why(self, u: PlannedUnit | None) -> str:
        """Why a unit cannot be one here, where that is known."""
        adds = [number for number, add in self.adds.items() if u is not None and add == u.add]
        reason = next((self.banned[number] for number in adds if number in self.banned), None)
        return f" (there, {reason})" if reason else ""

    def _other(self, difference: str) -> ConversionError:
        model = type(self.recording.root).__name__
        return ConversionError(
            f"{model}: got the plan of another {self.plan.model}: {difference}; expected a plan of this model, as "
            "revwire.plan(model, example_inputs) makes it"
        )


def _options(plan: Plan) -> Options:
    chunks = 2 if any(u.cores for u in plan.units) else 1  # parts of cores are looked for where chunks are wanted
    return Options(Choice((), None), (), (), chunks=chunks, checkpoint=tuple(map(escape, plan.checkpointed)))


def _named(path: str, host: str, pattern: str) -> str:
    """A unit in a message, with what else may tell it apart."""
    return f"{path} ({pattern}, in {host or 'the model'})"


def _scheme(u: PlannedUnit) -> Coupling:
    assert u.scheme is not None, "a plan that was made has one for each unit"
    return u.scheme
