"""The fastest forms of the units within a budget.

Note [The search]
    Units are decided in the order of the forward pass. What those before a stretch keep is one number (see Note [Bytes
    by prefix] in `levels`), so partial choices that keep about as many bytes, and leave the open chains in the same
    forms, compare by their seconds alone: the best of each such class goes on. The classes are 1/`_CLASSES` of the
    budget wide; bytes themselves are never rounded. Whether anything fits at all hangs on the choice that keeps least,
    which goes on in any case, so the smallest budget is found with few classes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from revwire._budget.costs import Costs
from revwire._budget.forms import Form

_CLASSES = 256
_FEW = 8
"""Enough to tell whether anything fits: beside the fastest of each class, the one that keeps least goes on."""


_LEAST_KEPT = -(10**12)
"""The class of bytes that holds, instead of the fastest choice, the one that keeps least."""


_MOST = 3000  # partial choices that go on; only chains that run side by side make so many


class _Choice(NamedTuple):
    """A choice of forms for the first units.

    Attributes:
        kept: bytes beyond those of their reversible forms.
        early: those of them that are there in any form until the forward pass ends.
        gain: seconds.
    """

    kept: int
    early: int
    gain: float
    forms: _Linked


_Linked = Any  # None, or (the newest form, those before it in the same way)


_Open = tuple[tuple[int, Form], ...]


def search(costs: Costs, budget: int, classes: int = _CLASSES) -> list[Form] | None:
    """The fastest forms whose predicted peak is at most ``budget``; None if there are none. Few ``classes`` tell soon
    whether there are any.
    """
    states: dict[_Open, list[_Choice]] = {(): [_Choice(0, 0, 0.0, None)]}
    if max(costs.waiting[0]) > budget:
        return None
    for run in range(len(costs.units)):
        states = _grouped(_decided(costs, run, states, budget, max(1, budget // classes)))
        if not states:
            return None
    last = max((c for choices in states.values() for c in choices), key=lambda c: c.gain)
    return _unrolled(last.forms)


def _decided(
    costs: Costs, run: int, states: dict[_Open, list[_Choice]], budget: int, width: int
) -> dict[tuple[_Open, int], _Choice]:
    """The choices that go on, each with a form for one run more: of each class, so many bytes wide, the best that
    fits.
    """
    unit = costs.units[run]
    own = {form: costs.peaks(run, form) for form in Form if form is not Form.SELECTIVE or unit.selective}
    best: dict[tuple[_Open, int], _Choice] = {}
    for open_, choices in states.items():
        others = tuple((c, f) for c, f in open_ if c != unit.chain)
        before = dict(open_).get(unit.chain) if unit.unit else None
        for form in unit.forms(before):
            extra, there, gain = unit.extra(form, before), unit.before_turn(form), unit.seconds(form)
            then: _Open = others if unit.ends else tuple(sorted((*others, (unit.chain, form))))
            for choice in choices:
                kept, early = choice.kept + extra, choice.early + there
                if own[form].over(choice.kept, choice.early) > budget:
                    continue
                if costs.waiting[run + 1].over(kept, early) > budget:
                    continue
                new = _Choice(kept, early, choice.gain + gain, (form, choice.forms))
                for key in ((then, kept // width), (then, _LEAST_KEPT)):
                    old = best.get(key)
                    if old is None or _better(new, old, least=key[1] == _LEAST_KEPT):
                        best[key] = new
    return best


def _better(new: _Choice, old: _Choice, *, least: bool) -> bool:
    if least:
        return (new.kept, -new.gain) < (old.kept, -old.gain)
    return (-new.gain, new.kept) < (-old.gain, old.kept)


def _grouped(best: dict[tuple[_Open, int], _Choice]) -> dict[_Open, list[_Choice]]:
    out: dict[_Open, list[_Choice]] = {}
    items = list(best.items())
    if len(items) > _MOST:
        items = sorted(items, key=lambda item: (item[0][1] >= 0, -item[1].gain))[:_MOST]
    for (open_, _), choice in items:
        out.setdefault(open_, []).append(choice)
    return out


def _unrolled(forms: _Linked) -> list[Form]:
    out: list[Form] = []
    while forms is not None:
        form, forms = forms
        out.append(form)
    return out[::-1]


def least(costs: Costs) -> int:
    """The smallest budget, within a thousandth, that some forms fit."""
    found = _lowered(costs, _FEW)
    return found if search(costs, found) else _lowered(costs, _CLASSES)  # where the fastest took the place of what fits


def fits(costs: Costs, budget: int) -> bool:
    """Whether there are forms whose predicted peak is at most ``budget``."""
    return search(costs, budget, _FEW) is not None


def _lowered(costs: Costs, classes: int) -> int:
    high = min(costs.forecast(costs.uniform(mode))[0] for mode in ("reversible", "stored"))
    low = 0
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        forms = search(costs, middle, classes)
        if forms is None:
            low = middle
        else:
            high = min(middle, costs.forecast(forms)[0])
    return high
