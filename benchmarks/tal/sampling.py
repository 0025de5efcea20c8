"""Which frames of a video make a clip, on which grid of steps, and what happens in them.

A clip is ``frames`` sampled frames on ``steps`` steps of a localizer's time axis, frames / steps frames a step. Two
ways to sample, as in the field: the whole video as a fixed number of frames (:class:`Resize`, ActivityNet), or every so
many frames, cut at random for training (:class:`Truncate`) and covered by overlapping windows for testing
(:class:`Windows`, THUMOS). Step s begins at frame ``offset + s · stride`` of the video; :class:`Timing` goes between
steps and seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.tal.annotations import Video
from benchmarks.tal.schema import ConfigError
from benchmarks.tal.segments.overlap import intersection, lengths

Array = NDArray[np.float64]
Times = TypeVar("Times", float, Tensor)
Key = int | tuple[int, int]
"""An item's index, or (pass over the data, index): what its random choices are made from."""


def choices(key: Key, seed: int) -> tuple[int, np.random.SeedSequence]:
    """(index of an item, what its random choices are made from)."""
    turn, number = (0, key) if isinstance(key, int) else key
    return number, np.random.SeedSequence([seed, turn, number])


@dataclass(frozen=True)
class Timing:
    """Where a clip's steps lie in time: step s at (offset + s · stride) / fps seconds.

    ``fps`` frames per second, ``stride`` frames from a step to the next, ``offset`` the frame of step 0, ``duration``
    the video's seconds.
    """

    fps: float
    stride: float
    offset: float
    duration: float

    @property
    def start(self) -> float:
        """Seconds at which the clip begins."""
        return self.to_seconds(0.0)

    def to_seconds(self, steps: Times) -> Times:
        """Steps → seconds, cut to the video."""
        seconds = (steps * self.stride + self.offset) / self.fps
        return seconds.clamp(0, self.duration) if isinstance(seconds, Tensor) else min(max(seconds, 0.0), self.duration)

    def to_steps(self, seconds: Times) -> Times:
        """Seconds → steps, not cut to the clip."""
        return (seconds * self.fps - self.offset) / self.stride


@dataclass(frozen=True, eq=False)
class Plan:
    """What to read for a clip: ``numbers`` (frames,) of the video's frames, of which ``valid`` steps are not padding;
    and what it shows.
    """

    numbers: NDArray[np.int64]
    valid: int
    segments: Array
    labels: NDArray[np.int64]
    timing: Timing

    def targets(self) -> tuple[Tensor, Tensor]:
        """Its actions as tensors: (n, 2) float and (n,) long."""
        return torch.from_numpy(self.segments).float().reshape(-1, 2), torch.from_numpy(self.labels)


class Sampling(Protocol):
    """A way to cut clips out of a video."""

    frames: int
    steps: int

    def count(self, length: int) -> int:
        """How many clips there are of a video with so many frames."""

    def plan(self, video: Video, length: int, fps: float, part: int, rng: np.random.Generator) -> Plan:
        """The ``part``-th clip of a video with ``length`` frames. Random choices come from ``rng``."""


@dataclass(frozen=True)
class Resize:
    """The whole video as ``frames`` frames, evenly spread, each in the middle of its share.

    Actions shorter than the share ``shortest`` of their video, too short for the grid, are not learned from.
    """

    frames: int = 768
    steps: int = 192
    shortest: float = 0.01

    def count(self, length: int) -> int:
        """One clip."""
        return 1

    def plan(self, video: Video, length: int, fps: float, part: int, rng: np.random.Generator) -> Plan:
        """See :class:`Sampling`. Steps are shares of the annotated duration, whatever the file's frame rate."""
        share = length / self.frames
        numbers = np.round((np.arange(self.frames) + 0.5) * share - 0.5).astype(np.int64).clip(0, length - 1)
        duration = video.duration if math.isfinite(video.duration) else length / fps
        spans, labels = _actions(video)
        spans = spans.clip(0, duration)
        kept = (spans[:, 1] - spans[:, 0]) > self.shortest * duration
        timing = Timing(length / duration, length / self.steps, 0.0, duration)
        return Plan(numbers, self.steps, spans[kept] / duration * self.steps, labels[kept], timing)


@dataclass(frozen=True)
class Truncate:
    """Every ``stride``-th frame, ``frames`` of them from a random place at which some action is there by at least the
    share ``keep``.

    Of actions that are cut, those of which ``keep`` is left are learned from. A video that is shorter than a clip is
    cut to a random share between ``crop``, and padded.
    """

    frames: int = 1024
    steps: int = 512
    stride: int = 2
    keep: float = 0.75
    crop: tuple[float, float] = (0.9, 1.0)
    tries: int = 200

    def count(self, length: int) -> int:
        """One clip, a different one each time."""
        return 1

    def plan(self, video: Video, length: int, fps: float, part: int, rng: np.random.Generator) -> Plan:
        """See :class:`Sampling`."""
        grid = _Grid(self.frames, self.steps, self.stride)
        there = math.ceil(length / self.stride)
        taken = self.frames
        if there <= self.frames:
            taken = int(rng.integers(max(round(self.crop[0] * there), 1), max(round(self.crop[1] * there), 1) + 1))
        spans, _ = _actions(video)
        start = self._start(spans * fps / self.stride, there - taken, taken, rng)
        return grid.plan(video, length, fps, start, min(start + taken, there), self.keep)

    def _start(self, spans: Array, last: int, taken: int, rng: np.random.Generator) -> int:
        """A place, in sampled frames, between 0 and ``last``."""
        starts = rng.integers(0, last + 1, self.tries)
        left = _left(spans[None], starts[:, None], starts[:, None] + taken) if len(spans) else np.zeros((self.tries, 0))
        good = np.flatnonzero((left >= self.keep).any(1))
        if len(good) or not len(spans):
            return int(starts[good[0]] if len(good) else starts[0])
        # No luck, or no action fits into a clip: the middle of one of them.
        middle = spans[rng.integers(len(spans))].mean()
        return int(np.clip(round(middle - taken / 2), 0, last))


@dataclass(frozen=True)
class Windows:
    """Every ``stride``-th frame, in windows of ``frames`` that overlap by the share ``overlap``; the last one ends with
    the video.

    With ``keep``, actions of which less is in a window are not in its clip.
    """

    frames: int = 1024
    steps: int = 512
    stride: int = 2
    overlap: float = 0.5
    keep: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"sampling.overlap: windows overlap by a share from 0 to below 1, got {self.overlap}")

    def count(self, length: int) -> int:
        """As many as it takes to reach the end."""
        grid = _Grid(self.frames, self.steps, self.stride)
        return 1 + math.ceil(max(grid.available(length) - self.steps, 0) / self._hop)

    @property
    def _hop(self) -> int:
        return max(1, int(self.steps * (1 - self.overlap)))

    def plan(self, video: Video, length: int, fps: float, part: int, rng: np.random.Generator) -> Plan:
        """See :class:`Sampling`."""
        grid = _Grid(self.frames, self.steps, self.stride)
        start = min(part * self._hop, max(grid.available(length) - self.steps, 0)) * grid.per_step
        return grid.plan(video, length, fps, start, start + self.frames, self.keep)


@dataclass(frozen=True)
class _Grid:
    """``frames`` sampled frames, one of every ``stride``, on ``steps`` steps."""

    frames: int
    steps: int
    stride: int

    def __post_init__(self) -> None:
        if self.frames % self.steps:
            raise ConfigError(
                f"sampling.frames: expected a whole number of frames per step, got {self.frames} frames on "
                f"{self.steps} steps"
            )

    @property
    def per_step(self) -> int:
        """Sampled frames per step."""
        return self.frames // self.steps

    def available(self, length: int) -> int:
        """Steps that a video of so many frames fills, the last one perhaps in part."""
        return math.ceil(length / (self.stride * self.per_step))

    def plan(self, video: Video, length: int, fps: float, start: int, end: int, keep: float) -> Plan:
        """The clip of sampled frames ``start`` to ``end`` of a video, padded with its last one."""
        numbers = np.arange(start, end) * self.stride
        numbers = numbers[numbers < length]
        valid = max(1, len(numbers) // self.per_step)
        stop = start + len(numbers)
        numbers = np.pad(numbers, (0, self.frames - len(numbers)), mode="edge")
        # An annotated duration may be wrong; what is found up to the file's end counts.
        duration = max(video.duration, length / fps) if math.isfinite(video.duration) else length / fps
        timing = Timing(fps, float(self.stride * self.per_step), float(start * self.stride), duration)
        spans, labels = _actions(video)
        kept = _left(spans * fps / self.stride, start, stop) >= keep
        segments = (spans[kept] * fps - timing.offset) / timing.stride
        return Plan(numbers, valid, segments.clip(0, (stop - start) / self.per_step), labels[kept], timing)


def _actions(video: Video) -> tuple[Array, NDArray[np.int64]]:
    """Segments (n, 2) in seconds and labels (n,); of repeated ones, one."""
    distinct = dict.fromkeys((s.start, s.end, s.label) for s in video.segments)
    table = np.array(list(distinct), dtype=np.float64).reshape(-1, 3)
    return table[:, :2], table[:, 2].astype(np.int64)


def _left(spans: Array, start: int | NDArray[np.int64], end: int | NDArray[np.int64]) -> Array:
    """Which share of each segment (…, n, 2) lies between ``start`` and ``end``."""
    return intersection(spans, np.stack([start, end], -1)) / np.maximum(lengths(spans), 1e-6)
