"""Points of a feature pyramid, and what each is trained to predict.

Level l has stride 2^l: its points lie at 0, 2^l, 2·2^l .. steps. Source: ActionFormer (arXiv 2202.07925), after FCOS
(Tian et al., arXiv 1904.01355).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tal.localizers.localizer import Localizer, padded
from benchmarks.tal.localizers.normalizers import over_processes, processes

SIMILAR = 1e-3
"""Segments whose lengths differ by no more (in steps) are equally short."""


@dataclass(frozen=True)
class Points:
    """All points of a pyramid, level after level.

    Attributes:
        position: (points,), in steps.
        low, high: (points,), which distances to the farther end of a segment are this level's.
        stride: (points,), steps between points.
    """

    position: Tensor
    low: Tensor
    high: Tensor
    stride: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], ranges: Sequence[tuple[float, float]], like: Tensor) -> Points:
        """The points of levels with so many points each, in the dtype and on the device of ``like``."""
        columns = [
            torch.stack(
                [torch.arange(count) * 2.0**level, *(torch.full((count,), float(v)) for v in (low, high, 2**level))]
            )
            for level, (count, (low, high)) in enumerate(zip(lengths, ranges, strict=True))
        ]
        return cls(*torch.cat(columns, 1).to(like))

    def segments(self, offsets: Tensor) -> Tensor:
        """Offsets (batch, points, 2), in strides before and after each point, as segments in steps."""
        start = self.position - offsets[..., 0] * self.stride
        end = self.position + offsets[..., 1] * self.stride
        return torch.stack([start, end], -1)

    def targets(self, segments: Tensor, labels: Tensor, classes: int, radius: float | None) -> tuple[Tensor, Tensor]:
        """(classes (points, classes) as 0 or 1, offsets (points, 2) to the segment) for one video; no class:
        background.

        A point belongs to a segment if it is inside of it, within ``radius`` strides of its centre, and the farther end
        is in the level's range. Of several segments the shortest is regressed, and all that are as short count as
        classes.

        Args:
            segments: (n, 2), in steps.
            labels: (n,).
            radius: in strides; None for all points inside.
        """
        if not len(segments):
            return self.position.new_zeros(len(self.position), classes), self.position.new_zeros(len(self.position), 2)
        segments = segments.to(self.position)
        start, end = segments.unbind(1)
        position, stride = self.position[:, None], self.stride[:, None]
        ends = torch.stack([position - start, end - position], -1)
        farthest = ends.amax(-1)
        reach = stride * radius if radius is not None else torch.inf
        centre = 0.5 * (start + end)
        inside = (position > torch.maximum(centre - reach, start)) & (position < torch.minimum(centre + reach, end))
        candidate = inside & (farthest >= self.low[:, None]) & (farthest <= self.high[:, None])
        length = torch.where(candidate, end - start, torch.inf)
        shortest, chosen = length.min(1)
        members = candidate & (length <= shortest[:, None] + SIMILAR)
        of_class = (members.to(segments.dtype) @ F.one_hot(labels, classes).to(segments.dtype)).clamp(max=1)
        offsets = ends[torch.arange(len(ends), device=ends.device), chosen]
        return of_class, offsets / stride


class PointLocalizer(Localizer):
    """Those that classify and regress every point of a pyramid of levels.

    Attributes:
        ranges: of each level, see `Points`.
        multiple: what inputs longer than ``max_steps`` are padded to a multiple of.
        center_radius: see `Points.targets`.
    """

    ranges: list[tuple[float, float]]
    multiple: int
    center_radius: float | None

    def points(self, masks: Sequence[Tensor], like: Tensor) -> Points:
        """The points of a forward pass with such masks of its levels."""
        return Points.of([level.shape[1] for level in masks], self.ranges, like)

    def targets(self, points: Points, segments: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of all videos, see `Points.targets`: (batch, points, classes) and (batch, points, 2)."""
        found = [
            points.targets(s, c, self.num_classes, self.center_radius) for s, c in zip(segments, labels, strict=True)
        ]
        classes, extents = (torch.stack(parts) for parts in zip(*found, strict=True))
        return classes, extents

    def normalizer(self, average: Tensor, positives: Tensor) -> Tensor:
        """In eval mode, of the batch alone."""
        if self.training:
            return super().normalizer(average, positives)
        return over_processes(positives).clamp(min=1 / processes())

    def _padded(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        steps = features.shape[2]
        wanted = max(self.max_steps, steps)
        if steps > self.max_steps:
            wanted += -steps % self.multiple
        return padded(features, mask, wanted)
