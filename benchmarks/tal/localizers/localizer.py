"""What every localizer is: features of a video in, scored segments out, trained on true segments."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.tal.localizers.normalizers import moved, processes
from benchmarks.tal.segments.detections import Detections, Selection


class Localizer(nn.Module):
    """Features (batch, channels, steps) and mask (batch, steps) -> what `losses` and `propose` need.

    Args:
        num_classes: 1 for class-agnostic detection.
        max_steps: shorter inputs are padded to it.
        momentum: of the moving averages of the numbers of positives, by which losses are divided.
        selection: which of the proposals become detections.
    """

    def __init__(self, num_classes: int, max_steps: int, momentum: float, selection: Selection) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.max_steps = max_steps
        self.momentum = momentum
        self.selection = selection

    @abstractmethod
    def losses(self, features: Tensor, mask: Tensor, segments: list[Tensor], labels: list[Tensor]) -> dict[str, Tensor]:
        """Losses by name; their sum is minimised.

        Args:
            segments: of each video (n, 2), in steps.
            labels: of each video (n,), int64.
        """

    @abstractmethod
    def propose(self, features: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Segments (places, 2) in steps, or (places, classes, 2), and scores (places, classes) of each video."""

    @torch.no_grad()
    def decode(self, features: Tensor, mask: Tensor) -> list[Detections]:
        """The detections of each video, in steps, before suppression."""
        return [self.selection(segments, scores) for segments, scores in self.propose(features, mask)]

    def normalizer(self, average: Tensor, positives: Tensor) -> Tensor:
        """What a loss of this process is divided by: the moving average, after this batch has moved it. In eval mode
        the batch counts too, but the average stays.
        """
        after = moved(average, positives, self.momentum)
        if self.training:
            average.copy_(after)  # in place, as DDP keeps hold of buffers
        return after / processes()


def padded(features: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Both with invalid steps at the end, ``steps`` in all."""
    missing = steps - features.shape[2]
    return F.pad(features, (0, missing)), F.pad(mask, (0, missing))
