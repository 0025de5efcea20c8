"""ActionFormer: a pyramid of transformer blocks with local windows, and one head that classifies and regresses every
point of it.

Source: Zhang, Wu, Li, "ActionFormer: Localizing Moments of Actions with Transformers" (arXiv 2202.07925). Parameters
are named as in OpenTAD, so that its weights load by key; its conventions (in which step a point lies, what padding
does) are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from benchmarks.tal.localizers.losses import diou_loss
from benchmarks.tal.localizers.points import PointLocalizer
from benchmarks.tal.localizers.pyramid import PRIOR, Norms, Pyramid, Scale, doubling, through
from benchmarks.tal.localizers.transformer import Block, ConvUnit
from benchmarks.tal.segments.detections import Selection

SMALLEST_LOSS = 0.01
"""Of regression, where the loss of classification is its measure."""


@dataclass(frozen=True)
class PointOutputs:
    """Of each level of the pyramid.

    Attributes:
        logits: (batch, classes, points)
        offsets: (batch, 2, points), distances to start and end in strides, not negative.
        masks: (batch, points), True where a point is valid.
    """

    logits: list[Tensor]
    offsets: list[Tensor]
    masks: list[Tensor]

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Levels one after the other, at least in float32: logits (batch, points, classes), offsets (batch, points, 2),
        mask.
        """
        logits, offsets = (torch.cat(parts, 2).transpose(1, 2) for parts in (self.logits, self.offsets))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits.to(dtype), offsets.to(dtype), torch.cat(self.masks, 1)


class ActionFormer(PointLocalizer):
    """Features (batch, channels, steps) and mask (batch, steps) -> classes and extents of the points of a pyramid.

    Args:
        in_channels: of the features.
        num_classes: 1 for class-agnostic detection.
        channels: inside.
        embed_layers, stem_layers, levels, head_layers: convolutions before the transformer, its blocks before the
            pyramid, levels of the pyramid (each has half the points of the one before), and convolutions before each
            prediction.
        heads: of the attention.
        window: steps that a step attends to, on all levels or one number per level; 1 or less for all.
        positions: whether a sinusoid is added to the embedded features.
        max_steps: shorter inputs are padded to it.
        ranges: for each level, the distances from a point to the farther end of its segment, in steps; by default the
            first is (0, 4), and each begins where the one before ends and ends at twice of it.
        center_radius: points within so many strides of a segment's centre are trained on it; None for all points
            inside.
        label_smoothing: share of a class target that goes to all classes alike.
        regression_weight: of that loss; 0 or less to make it as large as the other one.
        loss_normalizer, momentum: losses are divided by a moving average of the number of positive points; its first
            value.
        drop_path, dropout: rates. input_dropout: share of the features' channels that a training step goes without.
        min_score, most: which points become detections, see `Selection`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        embed_layers: int = 2,
        stem_layers: int = 2,
        levels: int = 6,
        head_layers: int = 2,
        heads: int = 4,
        window: int | Sequence[int] = 19,
        positions: bool = False,
        max_steps: int = 2304,
        ranges: Sequence[Sequence[float]] | None = None,
        center_radius: float | None = 1.5,
        label_smoothing: float = 0.0,
        regression_weight: float = 1.0,
        loss_normalizer: float = 100.0,
        momentum: float = 0.9,
        drop_path: float = 0.1,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        min_score: float = 0.001,
        most: int = 2000,
    ) -> None:
        super().__init__(num_classes, max_steps, momentum, Selection(min_score, most))
        windows = [window] * levels if isinstance(window, int) else list(window)
        self.ranges = doubling(levels) if ranges is None else [(low, high) for low, high in ranges]
        if not levels == len(windows) == len(self.ranges):
            raise ValueError(
                f"ActionFormer: got {len(windows)} windows and {len(self.ranges)} ranges; expected one for each of "
                f"{levels} levels"
            )
        self.multiple = max(2**level * max(2 * (w // 2), 1) for level, w in enumerate(windows))
        self.center_radius = center_radius
        self.label_smoothing = label_smoothing
        self.input_dropout = input_dropout
        self.regression_weight = regression_weight
        self.projection = Pyramid(
            in_channels,
            channels,
            embed_layers,
            (Block(channels, heads, windows[0], 1, drop_path, dropout) for _ in range(stem_layers)),
            (Block(channels, heads, window, 2, drop_path, dropout) for window in windows[1:]),
            positions,
            max_steps,
        )
        self.neck = Norms(channels, levels)
        self.rpn_head = Head(channels, num_classes, levels, head_layers, loss_normalizer)

    def forward(self, features: Tensor, mask: Tensor) -> PointOutputs:
        features, mask = self._padded(F.dropout1d(features, self.input_dropout, self.training), mask)
        pyramid, masks = self.projection(features, mask)
        logits, offsets = self.rpn_head(self.neck(pyramid), masks)
        return PointOutputs(logits, offsets, masks)

    def losses(self, features: Tensor, mask: Tensor, segments: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """Focal loss of all valid points, and DIoU loss of the positive ones."""
        outputs = self(features, mask)
        logits, offsets, valid = outputs.joined()
        points = self.points(outputs.masks, logits)
        classes, extents = self.targets(points, segments, labels)
        positive = (classes.sum(-1) > 0) & valid
        count = self.normalizer(self.rpn_head.loss_normalizer, positive.sum())
        smooth = classes[valid] * (1 - self.label_smoothing) + self.label_smoothing / (self.num_classes + 1)
        classification = sigmoid_focal_loss(logits[valid], smooth, alpha=0.25, gamma=2, reduction="sum")
        regression = diou_loss(points.segments(offsets)[positive], points.segments(extents)[positive]).sum()
        return {
            "classification": classification / count,
            "regression": self._weighted(regression / count, classification / count),
        }

    def propose(self, features: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Those of the valid points."""
        outputs = self(features, mask)
        logits, offsets, valid = outputs.joined()
        segments = self.points(outputs.masks, logits).segments(offsets)
        return [(s[v], p[v]) for s, p, v in zip(segments, logits.sigmoid(), valid, strict=True)]

    def _weighted(self, regression: Tensor, classification: Tensor) -> Tensor:
        weight = self.regression_weight
        return regression * (
            weight if weight > 0 else classification.detach() / regression.detach().clamp(min=SMALLEST_LOSS)
        )


class Head(nn.Module):
    """Class logits and offsets of every point; all levels share it, but for a scale of the offsets."""

    def __init__(self, channels: int, num_classes: int, levels: int, layers: int, loss_normalizer: float) -> None:
        super().__init__()
        self.cls_convs = nn.ModuleList(ConvUnit(channels, channels) for _ in range(layers))
        self.reg_convs = nn.ModuleList(ConvUnit(channels, channels) for _ in range(layers))
        self.cls_head = nn.Conv1d(channels, num_classes, 3, padding=1)
        self.reg_head = nn.Conv1d(channels, 2, 3, padding=1)
        self.scale = nn.ModuleList(Scale() for _ in range(levels))
        self.register_buffer("loss_normalizer", torch.tensor(float(loss_normalizer)))
        nn.init.constant_(self.cls_head.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, levels: list[Tensor], masks: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = [], []
        for x, mask, scale in zip(levels, masks, self.scale, strict=True):
            logits.append(self.cls_head(through(self.cls_convs, x, mask)))
            offsets.append(F.relu(scale(self.reg_head(through(self.reg_convs, x, mask)))))
        return logits, offsets
