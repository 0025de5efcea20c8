"""The rival of a plan: `torch.utils.checkpoint` around each block of the original network.

Note [Checkpointing each block]
    What it would need is estimated from the same measurement, for the blocks that have units. A step holds the inputs
    of the blocks so far (that of the last one is an activation of its first unit); in the backward of a block, the
    activations of all of its units, and one gradient. What was measured around a unit holds instead the kept bits of
    the units so far, two states of its chain, and a gradient of each; in its forward, the two states, the third that it
    makes, and the float tensor that carries the gradient of x_{k-1}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from revwire._budget.costs import Costs
from revwire._plan.plan import Plan, Point
from revwire.measure.sizes import spelled

_UNITS_OF_A_BLOCK = 8


def blocks_of(plan: Plan, costs: Costs) -> list[int] | None:
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


def checkpointing(costs: Costs, blocks: Sequence[int]) -> Point:
    """What checkpointing around each block would cost, estimated; ``blocks`` numbers the block of each run, ascending.

    See Note [Checkpointing each block].
    """
    peak, bits, inputs, seconds = max(costs.waiting[0]), 0, 0, costs.seconds
    chains: dict[tuple[int, int], int] = {}  # two states of each chain so far, each time that it ran
    times, place = dict[int, int](), dict[int, int]()
    inside = 0  # activations of the units of the same block that ran before
    for i, (unit, at) in enumerate(zip(costs.units, costs.levels, strict=True)):
        first = i == 0 or blocks[i] != blocks[i - 1]
        inside = 0 if first else inside
        inputs += unit.state if first else 0
        if unit.unit <= place.get(unit.chain, -1):
            times[unit.chain] = times.get(unit.chain, 0) + 1
        place[unit.chain] = unit.unit
        key = unit.chain, times.get(unit.chain, 0)
        others = sum(chains.values()) - chains.get(key, 0)  # of chains that wait, the states are there too
        around = inputs - bits - others - 4 * unit.state
        whole = unit.run.saved - unit.run.held  # where it was measured in chunks
        peak = max(peak, at.forward + around, at.backward + around + inside + whole)
        chains[key] = 2 * unit.state
        bits += unit.kept
        inside += unit.run.saved
        peak = max(peak, max(costs.waiting[i + 1]) + inputs - bits - sum(chains.values()))
        last = i + 1 == len(costs.units) or blocks[i + 1] != blocks[i]
        seconds -= unit.relief if last else unit.run.arithmetic.both  # it, too, stops early, once for each block
    return Point(peak, seconds)


def rival(size: int | None, planned: Point, checkpoint: Point | None) -> tuple[str, ...]:
    """Where plain checkpointing is estimated to be clearly better than what was planned: smaller, or within a budget
    faster.
    """
    if checkpoint is None:
        return ()
    name = "torch.utils.checkpoint around the same blocks of the original network"
    if size is None and checkpoint.peak_bytes < 0.97 * planned.peak_bytes:
        return (
            f"{name} would need less, about {spelled(checkpoint.peak_bytes)}: where the peak is a wide stage of few "
            "blocks, the two states of its chain cost more than the few inputs that checkpointing keeps; consider that "
            "instead, or chunks",
        )
    if size is not None and checkpoint.peak_bytes <= size and checkpoint.seconds < 0.97 * planned.seconds:
        return (
            f"{name} would fit as well, in about {checkpoint.seconds / planned.seconds:.0%} of the time; consider that "
            "instead",
        )
    return ()
