"""VSGN: anchors on a cross-scale graph pyramid, classified and regressed, then refined at their ends.

Source: Zhao, Thabet, Ghanem, "Video Self-Stitching Graph Network for Temporal Action Localization" (arXiv 2011.14598);
the localizer that Re2TAL (arXiv 2211.14053) trains end to end. Parameters are named as in OpenTAD, so that its weights
load by key; its
conventions are kept, also where they are odd: see `boundary_targets`, and a segment that overlaps no box makes all
boxes positive that overlap nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from benchmarks.tal.localizers.anchors import Matches, anchors, boxes_of
from benchmarks.tal.localizers.graph_pyramid import Decoder, Encoder
from benchmarks.tal.localizers.localizer import Localizer, padded
from benchmarks.tal.localizers.losses import giou_loss
from benchmarks.tal.localizers.normalizers import over_processes, processes
from benchmarks.tal.segments.detections import Selection

GROUPS = 32
"""Of the norms in the towers."""

BOUNDARY = 1.5
"""Steps on either side of an end that count as that end."""


@dataclass(frozen=True)
class AnchorOutputs:
    """Of a forward pass; columns are 1 for one class, else background and the classes.

    Attributes:
        logits: of each level, (batch, anchors · columns, positions).
        offsets: of each level, (batch, anchors · 2, positions).
        proposals: (batch, boxes, 2), the boxes of the first stage, in steps.
        refined: (batch, boxes, 2), those of the second.
        boundaries: (batch, 3, steps), logits that a step is a start, an end, inside of an action.
    """

    logits: list[Tensor]
    offsets: list[Tensor]
    proposals: Tensor
    refined: Tensor
    boundaries: Tensor

    def joined_logits(self, columns: int) -> Tensor:
        """(batch, boxes, columns), at least in float32."""
        return _float(_by_box(self.logits, columns))


class VSGN(Localizer):
    """Features (batch, channels, steps) and mask (batch, steps) -> classes and extents of anchors.

    Args:
        in_channels: of the features.
        num_classes: 1 for class-agnostic detection.
        channels: inside, a multiple of 32.
        strides: steps per position of each level; each is twice the one before, and the first is even.
        max_steps: length of the sequence; shorter inputs are padded to it, longer ones refused.
        scales: lengths of the anchors at each position, in strides.
        layers: convolutions before each prediction.
        neighbours: of each step in the graph; None for a pyramid of convolutions alone.
        match_iou, refine_iou: overlap from which a box is trained on a segment, in the first stage and in the second.
        corner: length of a proposal / distance of the features that are looked at on either side of its ends.
        focal_alpha, focal_gamma: of the focal loss, for one class.
        loss_normalizer, momentum: losses are divided by moving averages of the numbers of positive boxes; their first
            value.
        min_score, most: which boxes become detections, see `Selection`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        strides: Sequence[int] = (2, 4, 8, 16, 32),
        max_steps: int = 256,
        scales: Sequence[float] = (7.0, 7.5),
        layers: int = 4,
        neighbours: int | None = 10,
        match_iou: float = 0.6,
        refine_iou: float = 0.7,
        corner: float = 8.0,
        focal_alpha: float = 0.35,
        focal_gamma: float = 2.0,
        loss_normalizer: float = 100.0,
        momentum: float = 0.9,
        min_score: float = 0.001,
        most: int = 2000,
    ) -> None:
        super().__init__(num_classes, max_steps, momentum, Selection(min_score, most))
        if strides[0] % 2 or any(s != strides[0] * 2**level for level, s in enumerate(strides)):
            raise ValueError(
                f"VSGN: got strides {list(strides)}; expected an even number, and each further one twice the one before"
            )
        self.columns = 1 if num_classes == 1 else 1 + num_classes
        self.match_iou = match_iou
        self.refine_iou = refine_iou
        self.focal = {"alpha": focal_alpha, "gamma": focal_gamma}
        self.projection = Encoder(in_channels, channels, len(strides), strides[0], neighbours)
        self.neck = Decoder(channels, len(strides))
        self.rpn_head = AnchorHead(channels, len(scales), self.columns, layers)
        self.roi_head = CornerHead(channels, strides[0], max_steps, corner)
        self.register_buffer("anchors", anchors(strides, max_steps, scales), persistent=False)
        for name in ("classification", "regression", "refinement"):
            self.register_buffer(f"loss_normalizer_{name}", torch.tensor(float(loss_normalizer)))
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, mask: Tensor) -> AnchorOutputs:
        features, mask = self._padded(features, mask)
        levels, masks = self.projection(features, mask)
        levels = self.neck(levels, masks)
        logits, offsets = self.rpn_head(levels)
        boundaries = self.rpn_head.tem_head(F.interpolate(levels[0], self.max_steps, mode="linear", align_corners=True))
        proposals = boxes_of(_float(_by_box(offsets, 2)), self.anchors)
        return AnchorOutputs(logits, offsets, proposals, self.roi_head(levels[0], proposals), _float(boundaries))

    def losses(self, features: Tensor, mask: Tensor, segments: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """Of boundaries, of the classes and extents of anchors, and of the refined extents."""
        outputs = self(features, mask)
        proposals = outputs.proposals
        by_anchor = Matches.of(self.anchors.expand_as(proposals), segments, labels, self.match_iou)
        by_proposal = Matches.of(proposals, segments, labels, self.match_iou)
        by_refined = Matches.of(proposals, segments, labels, self.refine_iou)
        return {
            "boundaries": boundary_loss(outputs.boundaries, boundary_targets(segments, outputs.boundaries)),
            "regression": self._overlap_loss("regression", proposals, by_anchor),
            "classification": self._class_loss(outputs.joined_logits(self.columns), by_proposal),
            "refinement": self._overlap_loss("refinement", outputs.refined, by_refined),
        }

    def propose(self, features: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The refined boxes; their scores are those of the first stage, where both ends look like ends."""
        outputs = self(features, mask)
        segments = outputs.refined.clamp(0, self.max_steps - 1)
        start, end, _ = outputs.boundaries.sigmoid().unbind(1)
        at_ends = between(start, segments[..., 0]) * between(end, segments[..., 1])
        scores = self.scores(outputs) * at_ends.unsqueeze(-1)
        actions = scores if self.num_classes == 1 else scores[..., 1:]
        return list(zip(segments, actions, strict=True))

    def scores(self, outputs: AnchorOutputs) -> Tensor:
        """(batch, boxes, columns), probabilities by the first stage."""
        logits = outputs.joined_logits(self.columns)
        return logits.sigmoid() if self.num_classes == 1 else logits.softmax(-1)

    def _overlap_loss(self, name: str, boxes: Tensor, matches: Matches) -> Tensor:
        loss = giou_loss(boxes[matches.positive], matches.segments[matches.positive]).sum()
        return loss / self.normalizer(self.get_buffer(f"loss_normalizer_{name}"), matches.positive.sum())

    def _class_loss(self, logits: Tensor, matches: Matches) -> Tensor:
        """Focal loss for one class; else cross entropy, averaged over actions and over background."""
        count = self.normalizer(self.loss_normalizer_classification, matches.positive.sum())
        if self.num_classes == 1:
            return (
                sigmoid_focal_loss(logits[..., 0], matches.positive.to(logits.dtype), reduction="sum", **self.focal)
                / count
            )
        loss = F.cross_entropy(logits.flatten(0, 1), matches.labels.flatten(), reduction="none").view_as(matches.labels)
        return _mean_where(matches.positive, loss) + _mean_where(~matches.positive, loss)

    def _padded(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if features.shape[2] > self.max_steps:
            raise ValueError(f"VSGN: got {features.shape[2]} steps; expected at most max_steps, {self.max_steps}")
        return padded(features, mask, self.max_steps)


class AnchorHead(nn.Module):
    """Logits and offsets of the anchors at every position, shared by all levels; and the head of boundaries."""

    def __init__(self, channels: int, anchors: int, columns: int, layers: int) -> None:
        super().__init__()
        self.cls_tower = nn.Sequential(*(_tower(channels) for _ in range(layers)))
        self.reg_tower = nn.Sequential(*(_tower(channels) for _ in range(layers)))
        self.cls_head = nn.Conv1d(channels, anchors * columns, 3, padding=1)
        self.reg_head = nn.Conv1d(channels, anchors * 2, 3, padding=1)
        self.tem_head = BoundaryHead(channels)

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.cls_head(self.cls_tower(x)) for x in levels], [self.reg_head(self.reg_tower(x)) for x in levels]


def _tower(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, channels), nn.ReLU()
    )


class BoundaryHead(nn.Module):
    """Logits (batch, 3, steps) of starts, ends and actions, each from a branch of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tem = nn.ModuleList(nn.ModuleList([_Conv(channels, channels, 3), _Conv(channels, 1, 1)]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([last(F.relu(first(x))) for first, last in self.tem], 1)


class _Conv(nn.Module):
    def __init__(self, incoming: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(incoming, channels, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class CornerHead(nn.Module):
    """Moves the ends of each proposal by what the finest level shows around them (boundary adjustment)."""

    def __init__(self, channels: int, stride: int, steps: int, corner: float) -> None:
        super().__init__()
        self.start_conv = _corner(channels)
        self.end_conv = _corner(channels)
        self.stride = stride
        self.steps = steps
        self.corner = corner

    def forward(self, finest: Tensor, proposals: Tensor) -> Tensor:
        """Refined proposals (batch, boxes, 2), from the finest level (batch, channels, positions). Gradients reach
        both.
        """
        columns = self.look(finest, proposals)
        moves = [
            conv(side.flatten(0, 1))[:, 0, 0]
            for conv, side in zip((self.start_conv, self.end_conv), columns.unbind(2), strict=True)
        ]
        return proposals + _float(torch.stack(moves, -1)).view_as(proposals)

    def look(self, finest: Tensor, proposals: Tensor) -> Tensor:
        """Features before, at and after both ends: (batch, boxes, 2 ends, channels, 3)."""
        index = self.places(proposals.detach(), finest.shape[2]).flatten(1)
        found = finest.transpose(1, 2).gather(1, index.unsqueeze(2).expand(-1, -1, finest.shape[1]))
        return found.view(*proposals.shape, 3, -1).transpose(3, 4)

    def places(self, proposals: Tensor, positions: int) -> Tensor:
        """Positions on the finest level before, at and after both ends: (batch, boxes, 2, 3)."""
        ends = proposals.clamp(0, self.steps - 1)
        aside = (ends[..., 1:] - ends[..., :1] + 1) / self.corner
        around = torch.stack([ends - aside, ends, ends + aside], -1)
        return (around / self.stride).trunc().long().clamp(0, positions - 1)


def _corner(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(channels, channels, 3, 2), nn.ReLU(), nn.Conv1d(channels, 1, 1))


def boundary_targets(segments: Sequence[Tensor], like: Tensor) -> Tensor:
    """(batch, 3, steps), bool: cells of a step that lie wholly near a start, near an end, inside of an action; in the
    shape of ``like``.

    The published network is trained with cells that are covered in part counted as not covered, as their share was
    rounded down.
    """
    cell = torch.arange(like.shape[2], device=like.device, dtype=like.dtype)
    out = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    for target, of_video in zip(out, segments, strict=True):
        start, end = of_video.to(like).unbind(1)
        for row, (low, high) in zip(
            target, ((start - BOUNDARY, start + BOUNDARY), (end - BOUNDARY, end + BOUNDARY), (start, end)), strict=True
        ):
            row |= ((low[:, None] <= cell) & (cell + 1 <= high[:, None])).any(0)
    return out


def boundary_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each of the three rows, in which positive and negative steps weigh the same, summed; BSN (arXiv
    1806.02964).
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    return sum((_balanced(loss[:, row], targets[:, row]) for row in range(loss.shape[1])), loss.new_zeros(()))


def _balanced(loss: Tensor, positive: Tensor) -> Tensor:
    counts = [over_processes(side.sum()) for side in (positive, ~positive)]
    both = _mean_where(positive, loss) / 2 + _mean_where(~positive, loss) / 2
    return torch.where(torch.stack(counts).amin() > 0, both, loss.mean())


def _mean_where(chosen: Tensor, loss: Tensor) -> Tensor:
    """The mean over what is chosen, of all processes; 0 if nothing is."""
    return (loss * chosen).sum() / over_processes(chosen.sum()).clamp(min=1 / processes())


def between(values: Tensor, positions: Tensor) -> Tensor:
    """The mean of the two values (batch, steps) around each position (batch, n)."""
    return (values.gather(1, positions.floor().long()) + values.gather(1, positions.ceil().long())) / 2


def _by_box(levels: list[Tensor], width: int) -> Tensor:
    """Levels (batch, anchors · width, positions) -> (batch, boxes, width)."""
    return torch.cat(levels, 2).transpose(1, 2).reshape(levels[0].shape[0], -1, width)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
