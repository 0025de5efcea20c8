"""TriDet: a pyramid of convolutional blocks that keep features apart, and a head that finds each end of a segment as an
expectation over bins around it.

Source: Shi, Zhong, Cao, Ma, Li, Tao, "TriDet: Temporal Action Detection with Relative Boundary Modeling" (arXiv
2303.07347). Parameters are named as in OpenTAD, so that its weights load by key; its conventions (what padding does, by
what losses are divided) are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from benchmarks.tal.localizers.losses import EPSILON, diou_loss
from benchmarks.tal.localizers.normalizers import processes
from benchmarks.tal.localizers.points import PointLocalizer
from benchmarks.tal.localizers.pyramid import PRIOR, Norms, Pyramid, Scale, doubling, through
from benchmarks.tal.localizers.transformer import ChannelNorm, ConvUnit, ScaledPath
from benchmarks.tal.segments.detections import Selection
from benchmarks.tal.segments.overlap import iou

GROUPS = 16
"""Of the norm before an MLP."""

SMALLEST_IOU = 1e-6
"""Below it a prediction's overlap does not weigh its class: the slope of a root there has no end."""


@dataclass(frozen=True)
class TridentOutputs:
    """Of each level of the pyramid.

    Attributes:
        logits, starts, ends: (batch, classes, points)
        bins: (batch, 2 (bins + 1), points), not negative; those of the start, then those of the end.
        masks: (batch, points), True where a point is valid.
    """

    logits: list[Tensor]
    starts: list[Tensor]
    ends: list[Tensor]
    bins: list[Tensor]
    masks: list[Tensor]

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Levels one after the other, at least in float32: logits (batch, points, classes), offsets (batch, classes,
        points, 2) in strides, mask (batch, points).
        """
        logits = torch.cat(self.logits, 2).transpose(1, 2)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        levels = zip(self.starts, self.ends, self.bins, strict=True)
        offsets = torch.cat([expected(*(part.to(dtype) for part in level)) for level in levels], 2)
        return logits.to(dtype), offsets, torch.cat(self.masks, 1)


def expected(starts: Tensor, ends: Tensor, bins: Tensor) -> Tensor:
    """Offsets of a level, (batch, classes, points, 2): how many points before each its segment starts, and after it
    ends, each the mean over 0 to n points with the softmax of what the point and the boundary say.
    """
    most = bins.shape[1] // 2 - 1
    before = F.pad(starts, (most, 0)).unfold(2, most + 1, 1)  # (batch, classes, points, bins + 1)
    after = F.pad(ends, (0, most)).unfold(2, most + 1, 1)
    own = bins.unflatten(1, (2, 1, most + 1)).transpose(3, 4)  # (batch, 2, 1, points, bins + 1)
    distance = torch.arange(most + 1, dtype=starts.dtype, device=starts.device)
    left = (before + own[:, 0]).softmax(3) @ distance.flip(0)
    right = (after + own[:, 1]).softmax(3) @ distance
    return torch.stack([left, right], 3)


class TriDet(PointLocalizer):
    """Features (batch, channels, steps) and mask (batch, steps) -> classes and extents of the points of a pyramid.

    In training, inputs are taken as long as they are; else they are padded to ``max_steps``.

    Args:
        in_channels: of the features.
        num_classes: 1 for class-agnostic detection.
        channels: inside. hidden: of the MLPs.
        embed_layers, stem_layers, levels, head_layers: convolutions before the blocks, blocks before the pyramid,
            levels of the pyramid (each has half the points of the one before), and convolutions before each prediction.
        window: steps that a block's convolution sees, on all levels or one number per level, odd; the blocks before the
            pyramid see one.
        wide: how many times as many (and as many again) its wide convolution sees.
        positions: whether a sinusoid is added to the embedded features.
        max_steps: see above.
        bins: farthest end of a segment that a point can say, in strides.
        boundary_kernel: of the convolutions that find starts and ends.
        ranges: for each level, the distances from a point to the farther end of its segment, in steps; by default the
            first is (0, 4), and each begins where the one before ends and ends at twice of it.
        center_radius: points within so many strides of a segment's centre are trained on it; None for all points
            inside.
        label_smoothing: share of a class target that goes to all classes alike.
        iou_power: the loss of a true class is weighted by this power of the overlap of what is predicted there.
        loss_normalizer, momentum: losses are divided by a moving average of the number of positive points; its first
            value.
        drop_path: rate. noise: standard deviation of what is added to the features in training.
        weight_std: of the first weights of the blocks' convolutions in each channel; at 0, which the published recipe
            for THUMOS-14 has, their gradients are 0 too, so that they stay 0.
        min_score, most: which points become detections, see `Selection`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        hidden: int = 768,
        embed_layers: int = 2,
        stem_layers: int = 2,
        levels: int = 6,
        head_layers: int = 2,
        window: int | Sequence[int] = 1,
        wide: float = 5.0,
        positions: bool = False,
        max_steps: int = 2304,
        bins: int = 16,
        boundary_kernel: int = 3,
        ranges: Sequence[Sequence[float]] | None = None,
        center_radius: float | None = 1.5,
        label_smoothing: float = 0.0,
        iou_power: float = 0.2,
        loss_normalizer: float = 100.0,
        momentum: float = 0.9,
        drop_path: float = 0.1,
        noise: float = 0.0,
        weight_std: float = 0.2,
        min_score: float = 0.001,
        most: int = 2000,
    ) -> None:
        super().__init__(num_classes, max_steps, momentum, Selection(min_score, most))
        windows = [window] * levels if isinstance(window, int) else list(window)
        self.ranges = doubling(levels) if ranges is None else [(low, high) for low, high in ranges]
        if not levels == len(windows) == len(self.ranges) or not all(w % 2 for w in windows) or channels % GROUPS:
            raise ValueError(
                f"TriDet: got windows {windows}, {len(self.ranges)} ranges and {channels} channels; expected an odd "
                f"window and a range for each of {levels} levels, and a multiple of {GROUPS} channels"
            )
        self.multiple = max(2**level * w for level, w in enumerate(windows))
        self.center_radius = center_radius
        self.label_smoothing = label_smoothing
        self.iou_power = iou_power
        self.noise = noise
        self.projection = Pyramid(
            in_channels,
            channels,
            embed_layers,
            (Granular(channels, hidden, 1, wide, 1, 0.0, weight_std) for _ in range(stem_layers)),
            (Granular(channels, hidden, w, wide, 2, drop_path, weight_std) for w in windows[1:]),
            positions,
            max_steps,
        )
        self.neck = Norms(channels, levels)
        self.rpn_head = Trident(channels, num_classes, levels, head_layers, bins, boundary_kernel, loss_normalizer)

    def forward(self, features: Tensor, mask: Tensor) -> TridentOutputs:
        if not self.training:
            features, mask = self._padded(features, mask)
        elif self.noise > 0:
            features = features + self.noise * torch.randn_like(features)
        pyramid, masks = self.projection(features, mask)
        return self.rpn_head(self.neck(pyramid), masks)

    def losses(self, features: Tensor, mask: Tensor, segments: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """Focal loss of all valid points, true classes weighted by overlap, and DIoU loss of each positive point for
        each of its classes.
        """
        outputs = self(features, mask)
        logits, offsets, valid = outputs.joined()
        points = self.points(outputs.masks, logits)
        classes, extents = self.targets(points, segments, labels)
        pairs = (classes > 0) & valid[..., None]  # (batch, points, classes)
        average, positives = self.rpn_head.loss_normalizer, pairs.any(2).sum()
        count = self.normalizer(average, positives)
        predicted = points.segments(offsets).transpose(1, 2)[pairs]
        target = points.segments(extents)[:, :, None].expand(*pairs.shape, 2)[pairs]
        smooth = classes * (1 - self.label_smoothing) + self.label_smoothing / (self.num_classes + 1)
        classification = sigmoid_focal_loss(logits, smooth, alpha=0.25, gamma=2, reduction="none")
        weight = iou(predicted, target, EPSILON).clamp(min=SMALLEST_IOU) ** self.iou_power
        total = classification[valid].sum() + (classification[pairs] * (weight - 1)).sum()
        return {
            # by the average, in eval mode too
            "classification": total / (count if self.training else average / processes()),
            "regression": diou_loss(predicted, target).sum() / count,
        }

    def propose(self, features: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Those of all points, (points, classes, 2), as each class has extents of its own; invalid ones score 0."""
        outputs = self(features, mask)
        logits, offsets, valid = outputs.joined()
        segments = self.points(outputs.masks, logits).segments(offsets).transpose(1, 2)
        return list(zip(segments, logits.sigmoid() * valid[..., None], strict=True))


class Granular(nn.Module):
    """Scalable granularity perception, a block over a sequence: what is at an instant, in a window, in a wide window
    and in all steps, each channel by itself; then an MLP. With stride 2, half as many steps come out.

    What comes out at invalid steps is not 0, and the mean over all steps counts them, as in the reference.
    """

    def __init__(
        self, channels: int, hidden: int, window: int, wide: float, stride: int, drop_path: float, weight_std: float
    ) -> None:
        super().__init__()
        self.stride = stride
        self.ln = ChannelNorm(channels)
        self.gn = nn.GroupNorm(GROUPS, channels)
        widest = round((window + 1) * wide)
        kernels = {"psi": window, "fc": 1, "convw": window, "convkw": widest + (widest + 1) % 2, "global_fc": 1}
        for name, kernel in kernels.items():
            conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
            nn.init.normal_(conv.weight, std=weight_std)
            self.add_module(name, conv)
        self.mlp = nn.Sequential(nn.Conv1d(channels, hidden, 1), nn.GELU(), nn.Conv1d(hidden, channels, 1))
        self.drop_path_out = ScaledPath(channels, drop_path) if drop_path else nn.Identity()
        self.drop_path_mlp = ScaledPath(channels, drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self.stride > 1:
            x, mask = F.max_pool1d(x, self.stride + 1, self.stride, self.stride // 2), mask[:, :: self.stride]
        out = self.ln(x)
        everywhere = F.relu(self.global_fc(out.mean(2, keepdim=True)))
        out = self.fc(out) * everywhere + (self.convw(out) + self.convkw(out)) * self.psi(out) + out
        x = x * mask.unsqueeze(1).to(x.dtype) + self.drop_path_out(out)
        return x + self.drop_path_mlp(self.mlp(self.gn(x))), mask


class Trident(nn.Module):
    """Class logits, bins, and logits of a start and an end at every point; all levels share it, but for a scale of the
    bins. What finds starts and ends does not train what comes before.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        levels: int,
        layers: int,
        bins: int,
        boundary_kernel: int,
        loss_normalizer: float,
    ) -> None:
        super().__init__()
        branches = {"cls": (num_classes, 3), "reg": (2 * (bins + 1), 3)}
        branches |= dict.fromkeys(("cls_start", "cls_end"), (num_classes, boundary_kernel))
        for name, (out, kernel) in branches.items():
            self.add_module(f"{name}_convs", nn.ModuleList(ConvUnit(channels, channels, kernel) for _ in range(layers)))
            self.add_module(f"{name}_head", nn.Conv1d(channels, out, kernel, padding=kernel // 2))
        self.scale = nn.ModuleList(Scale() for _ in range(levels))
        self.register_buffer("loss_normalizer", torch.tensor(float(loss_normalizer)))
        nn.init.constant_(self.cls_head.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, levels: list[Tensor], masks: list[Tensor]) -> TridentOutputs:
        def predict(name: str, x: Tensor, mask: Tensor) -> Tensor:
            return self.get_submodule(f"{name}_head")(through(self.get_submodule(f"{name}_convs"), x, mask))

        both = list(zip(levels, masks, strict=True))
        return TridentOutputs(
            [predict("cls", x, mask) for x, mask in both],
            [predict("cls_start", x.detach(), mask) for x, mask in both],
            [predict("cls_end", x.detach(), mask) for x, mask in both],
            [F.relu(scale(predict("reg", x, mask))) for scale, (x, mask) in zip(self.scale, both, strict=True)],
            masks,
        )
