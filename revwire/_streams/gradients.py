"""Gradients of streams: multiples of one, in one pass where that is possible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from revwire._streams import fused
from revwire.couplings.base import Factor

Wanted = tuple[Factor, torch.dtype]


def multiples(g: Tensor, wanted: Sequence[Wanted | None]) -> list[Tensor | None]:
    """For each factor (a number, or one number per sample) and dtype that is wanted: that multiple of ``g``.

    None for those that are not wanted, or zero; ``g`` itself where nothing is to be done.
    """
    out: list[Tensor | None] = [None] * len(wanted)
    made: list[tuple[int, float, torch.dtype]] = []
    for i, want in enumerate(wanted):
        if want is None:
            continue
        factor, dtype = want
        if isinstance(factor, Tensor):
            out[i] = (g * factor).to(dtype)
        elif factor == 1:
            out[i] = g.to(dtype)
        elif factor:
            made.append((i, factor, dtype))
    if not made:
        return out
    found = fused.multiples(g, [(factor, dtype) for _, factor, dtype in made])
    if found is None:
        found = [(g.to(torch.promote_types(g.dtype, dtype)) * factor).to(dtype) for _, factor, dtype in made]
    for (i, _, _), t in zip(made, found, strict=True):
        out[i] = t
    return out
