"""What the units of a plan keep, in bytes."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from revwire._plan.plan import PlannedChain, PlannedUnit
from revwire._runtime.chain import Chain
from revwire._runtime.chunks import Cut


def with_costs(planned: PlannedChain, chain: Chain) -> PlannedChain:
    """The plan of a chain with the coupling, the arithmetic, the anchors and the cuts that it has now, and what they
    keep.
    """
    bits = [c.kept_bits if chain.exact else 0 for c in chain.couplings]
    if chain.couplings[-1].move is not None:  # what keeps bits there comes between two units
        bits[-1] = 0
    cuts = chain.cuts or (None,) * chain.length
    units = tuple(
        replace(
            u, kept_bytes=_kept(u, planned, chain, i, bits[i]), chunks=chunks_of(u, chain, i), scheme=coupling, cut=cut
        )
        for i, (u, coupling, cut) in enumerate(zip(planned.units, chain.couplings, cuts, strict=True))
    )
    return replace(
        planned,
        units=units,
        coupling=chain.coupling_name,
        exact=chain.exact,
        bits=max(bits),
        anchors=chain.spacing,
        adapts=chain.adapts,
        tolerance=chain.tolerance,
        keeps_last=chain.keeps_last,
    )


def _kept(u: PlannedUnit, planned: PlannedChain, chain: Chain, place: int, bits: int) -> int:
    if chain.stores(place):
        return u.saved_bytes
    if chain.anchored(place):
        return planned.stream_bytes // 2 if chain.exact else planned.stream_bytes
    return prod(u.shape) * bits // 8


def chunks_of(u: PlannedUnit, chain: Chain, place: int) -> int:
    """Into how many chunks a unit is cut, with the shape of the example."""
    return pieces_of(None if chain.cuts is None else chain.cuts[place], u)


def pieces_of(cut: Cut | None, u: PlannedUnit) -> int:
    """Into how many chunks a cut cuts a unit, with the shape of the example."""
    return 1 if cut is None else max(1, len(cut.chunks_of(u.shape)))
