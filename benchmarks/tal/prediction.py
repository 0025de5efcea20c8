"""From detections of clips, in steps, to detections of videos, in seconds: merged over windows and processes, thinned
out, scored.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from benchmarks.tal.annotations import Annotations
from benchmarks.tal.clips import Batch
from benchmarks.tal.evaluation import Result, evaluate
from benchmarks.tal.recall import means_at
from benchmarks.tal.segments.detections import Detections
from benchmarks.tal.suppression import Suppression, fuse

Fused = Callable[[str], Sequence[tuple[int, float]]]
"""Video id -> (label, score) of its likeliest classes."""


class Scorer:
    """Collects detections of clips; makes results of them, and figures.

    Args:
        truth: what is tested, with its true classes. None: nothing is scored.
        classes: names of the labels in the results.
        suppress: thins out the detections of a video.
        fused: classes of each video, for a localizer that knows only where an action is; None: detections have classes
            of their own.
        thresholds: tIoU. recall: for each k here, recall by the best k x segments detections is a figure, too.
        path: where results are written as JSON, or None.
    """

    def __init__(
        self,
        truth: Annotations | None,
        classes: Sequence[str],
        suppress: Suppression,
        fused: Fused | None,
        thresholds: Sequence[float],
        path: Path | None = None,
        recall: Sequence[int] = (),
    ) -> None:
        self.recall = recall
        self.truth = truth
        self.classes = classes
        self.suppress = suppress
        self.fused = fused
        self.thresholds = thresholds
        self.path = path
        self.result: Result | None = None
        self.clear()

    def clear(self) -> None:
        """Forget what was collected."""
        self.found: dict[str, dict[float, Detections]] = defaultdict(dict)

    def add(self, batch: Batch, detections: Sequence[Detections]) -> None:
        """Take the detections of a batch of test clips, in steps."""
        for video, timing, found in zip(batch.video_ids, batch.timings, detections, strict=True):
            segments = timing.to_seconds(found.segments.float())
            parts = (part.detach().cpu() for part in (segments, found.scores.float(), found.labels))
            self.found[video][timing.offset] = Detections(*parts)

    def results(self) -> dict[str, list[dict[str, Any]]]:
        """Video -> its detections, best first; over all processes, each of which gets the same."""
        merged: dict[str, dict[float, Detections]] = defaultdict(dict)
        for part in _gathered(dict(self.found)):
            for video, clips in part.items():
                merged[video] |= clips  # a clip that two processes were given to even out their numbers counts once
        return {
            video: self.video(video, list(clips.values())).as_results(self.classes)
            for video, clips in sorted(merged.items())
        }

    def video(self, video: str, clips: Sequence[Detections]) -> Detections:
        """The detections of one video, from those of its clips."""
        kept = self.suppress(*(torch.cat(parts) for parts in zip(*clips, strict=True)))
        return kept if self.fused is None else fuse(kept.segments, kept.scores, self.fused(video))

    def score(self) -> dict[str, float]:
        """Figures by name, after writing the results: ``mAP`` and ``mAP@0.50`` and so on, between 0 and 1."""
        results = self.results()
        if self.path is not None and not (distributed.is_initialized() and distributed.get_rank()):
            write(results, self.path)
        if self.truth is None:
            return {}
        self.result = evaluate(self.truth, results, self.thresholds)
        figures = {"mAP": self.result.average} | {
            f"mAP@{t:.2f}": float(m) for t, m in zip(self.result.tious, self.result.map, strict=True)
        }
        return figures | means_at(self.truth, results, self.thresholds, self.recall)


def write(results: Mapping[str, Any], path: Path) -> None:
    """Results as a file in ActivityNet's form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"version": "VERSION 1.3", "results": results, "external_data": {}}) + "\n", encoding="utf-8"
    )


def _gathered(mine: Any) -> list[Any]:
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [mine]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    return parts
