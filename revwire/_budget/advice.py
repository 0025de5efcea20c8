"""What would serve as well as what was planned: chains that may as well be stored; and what a budget leaves out."""

from __future__ import annotations

import torch

from revwire._budget.costs import Costs
from revwire._plan.plan import Plan
from revwire.measure.sizes import spelled


def idle(plan: Plan, costs: Costs) -> tuple[str, ...]:
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
                f"{chain.name}: reversible gains nothing here: stored, the peak of a step is {spelled(other)} instead "
                f"of {spelled(peak)}, in {faster / seconds:.0%} of the time"
            )
    return tuple(out)


def reserved(device: torch.device) -> tuple[str, ...]:
    """Where an allocator holds more than it hands out: say so."""
    if device.type == "cpu":
        return ()
    return (f"bytes of tensors on {device}: its allocator reserves more (mostly a tenth), as freed blocks do not fit",)
