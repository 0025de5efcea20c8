"""What would serve better than the budget that was asked for."""

from __future__ import annotations

from collections import Counter

from revwire._budget.costs import Costs
from revwire._plan.plan import Plan, Point

_UNITS_OF_A_BLOCK = 8


def _blocks(plan: Plan, costs: Costs) -> list[int] | None:
    """The block of each run: a host's units that run one after the other. None where a host holds too many to be a
    block.
    """
    units = [plan.chains[u.chain].units[u.unit] for u in costs.units]
    if max(Counter(u.host for u in plan.units).values()) > _UNITS_OF_A_BLOCK:
        return None
    numbers: list[int] = []
    here: set[str] = set()  # the units of the block so far
    for i, (run, unit) in enumerate(zip(costs.units, units, strict=True)):
        goes_on = (
            i > 0 and costs.units[i - 1].chain == run.chain and units[i - 1].host == unit.host and unit.path not in here
        )
        here = {*here, unit.path} if goes_on else {unit.path}
        numbers.append((numbers[-1] if numbers else -1) + (0 if goes_on else 1))
    return numbers


def _rival(size: int | None, planned: Point, checkpoint: Point | None) -> tuple[str, ...]:
    """Where plain checkpointing is estimated to be clearly better than what was planned: smaller, or within a budget
    faster.
    """
    if checkpoint is None:
        return ()
    name = "torch.utils.checkpoint around the same blocks of the original network"
    if size is None and checkpoint.peak_bytes < 0.97 * planned.peak_bytes:
        return (
            f"{name} would need less, about {checkpoint.peak_bytes / 1e6:.1f} MB: where the peak is a wide stage of "
            "few blocks, the two "
            "states of its chain cost more than the few inputs that checkpointing keeps; consider that instead, or "
            "chunks",
        )
    if size is not None and checkpoint.peak_bytes <= size and checkpoint.seconds < 0.97 * planned.seconds:
        return (
            f"{name} would fit as well, in about {checkpoint.seconds / planned.seconds:.0%} of the time; consider "
            "that instead",
        )
    return ()


def _idle(plan: Plan, costs: Costs) -> tuple[str, ...]:
    """Chains that may as well be stored: where all others are reversible, the peak stays within 2 % of the least."""
    forms = costs.uniform("reversible")
    peak, seconds = costs.forecast(forms)
    out = []
    for number, chain in enumerate(plan.chains):
        stored = [
            s if u.chain == number else r for u, r, s in zip(costs.units, forms, costs.uniform("stored"), strict=True)
        ]
        if stored == forms:
            continue
        other, faster = costs.forecast(stored)
        if other <= peak * 1.02:
            out.append(
                f"{chain.name}: reversible gains nothing here: stored, the peak of a step is {other / 1e6:.1f} MB "
                "instead of "
                f"{peak / 1e6:.1f} MB, in {faster / seconds:.0%} of the time"
            )
    return tuple(out)


def _rounded_up(size: int) -> str:
    mebibyte = 2**20
    return f"{-(-size * 10 // mebibyte) / 10} MiB"
