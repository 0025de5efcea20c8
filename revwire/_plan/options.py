"""The options of `plan` and `convert`, checked: couplings and arithmetic, anchors, chunks, budgets, globs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from revwire._errors import BudgetError, ConversionError, CouplingError
from revwire._plan.globs import first_match, refuse_idle_globs
from revwire.couplings import BY_PATTERN, DEFAULT, coupling_from
from revwire.couplings.base import FLOAT_TOLERANCE, Coupling, is_number
from revwire.measure.sizes import parsed

Patterns = str | Sequence[str] | None


Budget = int | str | None


LEAST = "least"


def parse_budget(budget: Budget) -> int | None:
    """A budget in bytes; None for ``"least"``.

    Raises:
        BudgetError: it is no number of bytes.
    """
    if budget == LEAST:
        return None
    size = budget if type(budget) is int else parsed(budget) if isinstance(budget, str) else None
    if size is None or size <= 0:
        raise BudgetError(
            f"memory_budget: got {budget!r}; expected a positive number of bytes, '6GiB', '512MiB' or the like, or "
            "'least'"
        )
    return size


Couplings = str | Coupling | Mapping[str, str | Coupling]
"""One coupling for all units, or one for each glob over the names of units and hosts; the first that matches counts."""


Anchors = int | Literal["auto"] | None


@dataclass(frozen=True)
class Choice:
    """The caller's wishes for the runtime side.

    Attributes:
        globs: (glob, coupling), the first that matches counts.
        default: the coupling of the other units; None: `BY_PATTERN`.
        exact: fixed-point streams (True), float streams (False), or what the couplings need (None).
        anchors: keep the true state every so many units; "auto": as often as the tolerance needs; None: never.
        tolerance: the largest relative error of a rebuilt state in float streams.
    """

    globs: tuple[tuple[str, Coupling], ...]
    default: Coupling | None
    exact: bool | None = None
    anchors: Anchors = None
    tolerance: float = FLOAT_TOLERANCE

    @classmethod
    def of(
        cls,
        couplings: Couplings,
        exact: bool | None = None,
        anchors: Anchors = None,
        tolerance: float = FLOAT_TOLERANCE,
    ) -> Choice:
        """What the caller wrote, checked.

        Raises:
            CouplingError: no such coupling, arithmetic, anchors or tolerance.
        """
        if not (exact is None or isinstance(exact, bool)):
            raise CouplingError(
                f"exact: got {exact!r}; expected True (fixed-point streams), False (float streams), or None (what the "
                "coupling needs)"
            )
        if not (anchors in (None, "auto") or (type(anchors) is int and anchors > 0)):
            raise CouplingError(f"anchors: got {anchors!r}; expected a number of units from 1, 'auto', or None")
        if not is_number(tolerance) or not 0 < tolerance < 1:
            raise CouplingError(f"tolerance: got {tolerance!r}; expected a relative error between 0 and 1")
        if isinstance(couplings, Mapping):
            refuse_no_globs("coupling", couplings)
            globs = tuple((glob, coupling_from(spec)) for glob, spec in couplings.items())
            return cls(globs, None, exact, anchors, tolerance)
        return cls((), None if couplings == DEFAULT else coupling_from(couplings), exact, anchors, tolerance)

    def coupling(self, names: tuple[str, ...], pattern: str) -> Coupling:
        """The coupling of the unit that goes by these names, and has this pattern."""
        chosen = first_match(names, self.globs, self.default)
        return BY_PATTERN[pattern] if chosen is None else chosen

    @property
    def asks_for_all(self) -> bool:
        """Whether the caller chose couplings that mean a network of their own, or anchors in chains."""
        chosen = [coupling for _, coupling in self.globs] + ([self.default] if self.default else [])
        return self.anchors is not None or any(not c.keeps_function for c in chosen)

    def refuse_idle_globs(self, names: Iterable[str]) -> None:
        """`refuse_idle_globs` for those of the couplings."""
        refuse_idle_globs("coupling", [glob for glob, _ in self.globs], names)

    def arithmetic(self, where: str, couplings: Sequence[Coupling]) -> tuple[bool, int | None]:
        """(fixed-point streams?, units between anchors) of a chain with these couplings; ``where`` names it in errors.

        Raises:
            CouplingError: it cannot be inverted in that arithmetic.
        """
        moving = {c.move is not None: c.name for c in couplings}
        if len(moving) > 1:
            raise CouplingError(
                f"{where}: got couplings {moving[True]!r} and {moving[False]!r} in one chain; expected all of its "
                "units under 'innovation', whose two streams mean something else than those of other couplings, or none"
            )
        spacing = self._spacing(couplings)
        run = len(couplings) if spacing is None else min(spacing, len(couplings))
        worst = max((_float_error(couplings[i : i + run]), i) for i in range(0, len(couplings), run))
        exact = self.exact
        if exact is None:
            exact = all(c.has_exact_form for c in couplings) or worst[0] > self.tolerance
        if exact:
            for coupling in couplings:
                _ = coupling.kept_bits  # raises where there is no exact form
        elif worst[0] > self.tolerance:
            names = " + ".join(dict.fromkeys(repr(c.name) for c in couplings))
            raise CouplingError(
                f"{where}: got exact=False for coupling {names} over {run} units, which would rebuild a state with a "
                f"relative error of about {worst[0]:.1g}; expected at most {self.tolerance:g}; pass exact=True, "
                "anchors='auto', or another coupling"
            )
        return exact, spacing

    def _spacing(self, couplings: Sequence[Coupling]) -> int | None:
        if self.anchors != "auto":
            return self.anchors
        worst = max(couplings, key=lambda c: c.error_growth)
        spacing = 1
        while spacing < len(couplings) and _float_error([worst] * (spacing + 1)) <= self.tolerance / 10:
            spacing += 1
        return spacing


def _float_error(couplings: Sequence[Coupling]) -> float:
    """Expected relative error after undoing these units in float32."""
    return max(couplings, key=lambda c: c.error_growth).float_error(len(couplings))


Chunks = int | Mapping[str, int]
"""How many chunks: for all units, or for each glob over the names of units and hosts; the first that matches counts."""


def refuse_no_chunks(chunks: Any) -> None:
    """Raise where this is no number of chunks.

    Raises:
        ConversionError: says what was got.
    """
    if isinstance(chunks, Mapping):
        refuse_no_globs("chunks", chunks)
    for count in chunks.values() if isinstance(chunks, Mapping) else (chunks,):
        if type(count) is not int or count < 1:
            raise ConversionError(
                f"chunks: got {count!r}; expected a number of chunks from 1, or a dict from globs to such numbers"
            )


def refuse_no_globs(option: str, table: Mapping[Any, Any]) -> None:
    """Raise where a table is by something else than globs.

    Raises:
        ConversionError: says what was got.
    """
    for glob in table:
        if not isinstance(glob, str):
            raise ConversionError(f"{option}: got the key {glob!r}; expected globs over the names of units and hosts")


def wanted(chunks: Chunks, names: tuple[str, ...]) -> int:
    """The number of chunks of the unit that goes by these names."""
    if isinstance(chunks, int):
        return chunks
    return first_match(names, chunks.items(), 1)


AUTO: Literal["auto"] = "auto"


STAYS = "stays"


Rewire = Literal["leanest", "everywhere"] | None
"""Which chains: those that lower the peak of a step, or all. None: as the other options say (`options_of`)."""


@dataclass(frozen=True)
class Options:
    """What the caller of `plan` or `convert` wants."""

    choice: Choice
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    strict: bool = False
    chunks: Chunks | None = None
    budget: Budget = None
    whole: tuple[str, ...] | Literal["auto"] | None = ()  # None: every host that can be
    checkpoint: tuple[str, ...] | None = None  # None: what lowers the peak; or what stays, if a budget asks for it
    everywhere: bool = True

    @property
    def spends_less(self) -> bool:
        """Whether units may run in chunks, or in other modes than reversible."""
        return self.chunks not in (None, 1) or self.budget is not None


def options_of(
    choice: Choice,
    include: Patterns,
    exclude: Patterns,
    whole: Patterns,
    strict: bool = False,
    chunks: Chunks | None = None,
    checkpoint: Patterns = None,
    budget: Budget = None,
    rewire: Rewire = None,
) -> Options:
    """What the caller wrote, checked. Where it says which units are wanted, or that the network of a paper is, all are
    rewired unless ``rewire`` says otherwise.

    Raises:
        ConversionError: what is no glob, no number of chunks, neither True nor False, or no way to rewire.
        BudgetError: what is no budget.
    """
    if not isinstance(strict, bool):
        raise ConversionError(f"strict: got {strict!r}; expected True (raise if a residual add stays) or False")
    if chunks is not None:
        refuse_no_chunks(chunks)
    if budget is not None:
        parse_budget(budget)

    def listed(name: str, patterns: Patterns) -> tuple[str, ...]:
        found: tuple[Any, ...] = (
            (patterns,) if isinstance(patterns, str) or not isinstance(patterns, Iterable) else tuple(patterns)
        )
        if patterns is None or not found or patterns == "":
            return ()
        if not all(isinstance(glob, str) for glob in found):
            raise ConversionError(f"{name}: got {patterns!r}; expected a glob over qualified names, or several")
        return found

    globs = listed("whole", whole)
    wish = AUTO if globs == (AUTO,) else globs
    if wish == AUTO and budget is None:
        raise ConversionError(
            "whole: got 'auto' without a memory_budget; expected a budget to choose by, or globs over names of modules"
        )
    kept = None if checkpoint is None else listed("checkpoint", checkpoint)
    wanted = listed("include", include)
    asks = wanted or wish or strict or budget is not None or chunks not in (None, 1) or choice.asks_for_all
    everywhere = _everywhere(rewire, bool(asks))
    return Options(choice, wanted, listed("exclude", exclude), strict, chunks, budget, wish, kept, everywhere)


def _everywhere(rewire: Rewire, asks: bool) -> bool:
    if rewire not in (None, "leanest", "everywhere"):
        raise ConversionError(
            f"rewire: got {rewire!r}; expected 'leanest' (the chains that lower the peak of a step), 'everywhere', or "
            "None (the leanest, unless other options ask for units)"
        )
    return asks if rewire is None else rewire == "everywhere"
