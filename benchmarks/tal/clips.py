"""Clips for a localizer: which frames of a video, on which grid of steps, and what happens in them.

A clip is ``frames`` sampled frames on ``steps`` steps of a localizer's time axis, frames / steps frames a step. Two
ways to sample, as in the field: the whole video as a fixed number of frames (:class:`Resize`, ActivityNet), or every so
many frames, cut at random for training (:class:`Truncate`) and covered by overlapping windows for testing
(:class:`Windows`, THUMOS). Step s begins at frame ``offset + s · stride`` of the video; :class:`Timing` goes between
steps and seconds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from benchmarks.tal import videos
from benchmarks.tal.annotations import Annotations, Video
from benchmarks.tal.videos import VideoError, VideoWarning

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of ImageNet's pixels between 0 and 255, red, green and blue: what published video backbones were trained with."""

Array = NDArray[np.float64]
Times = TypeVar("Times", float, Tensor)
Key = int | tuple[int, int]
"""An item's index, or (pass over the data, index): what its random choices are made from."""


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


@dataclass(frozen=True)
class Clip:
    """One item. Either ``frames`` or ``features`` is there."""

    video_id: str
    frames: Tensor | None
    """(3, frames, height, width), normalised float, or uint8 where that was asked for."""
    mask: Tensor
    """(steps,) bool: false where the clip is padded beyond its video's end."""
    segments: Tensor
    """(n, 2) float: actions as [start, end] in steps."""
    labels: Tensor
    """(n,) long."""
    timing: Timing
    features: Tensor | None = None
    """(channels, steps) float."""


@dataclass(frozen=True)
class Batch:
    """Clips together: tensors stacked, actions listed."""

    video_ids: tuple[str, ...]
    frames: Tensor | None
    """(batch, 3, frames, height, width)"""
    mask: Tensor
    """(batch, steps) bool"""
    segments: tuple[Tensor, ...]
    """Of each clip (n, 2)."""
    labels: tuple[Tensor, ...]
    """Of each clip (n,)."""
    timings: tuple[Timing, ...]
    features: Tensor | None = None
    """(batch, channels, steps)"""

    def __len__(self) -> int:
        return len(self.video_ids)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor passed through a function."""
        return replace(
            self,
            frames=None if self.frames is None else function(self.frames),
            features=None if self.features is None else function(self.features),
            mask=function(self.mask),
            segments=tuple(map(function, self.segments)),
            labels=tuple(map(function, self.labels)),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; data loaders call it."""
        return self.map(Tensor.pin_memory)


def collate(clips: Sequence[Clip]) -> Batch:
    """Clips of equal shapes as a batch."""
    frames = [clip.frames for clip in clips if clip.frames is not None]
    features = [clip.features for clip in clips if clip.features is not None]
    return Batch(
        tuple(clip.video_id for clip in clips),
        torch.stack(frames) if frames else None,
        torch.stack([clip.mask for clip in clips]),
        tuple(clip.segments for clip in clips),
        tuple(clip.labels for clip in clips),
        tuple(clip.timing for clip in clips),
        torch.stack(features) if features else None,
    )


# -- sampling ----------------------------------------------------------------------------------------------------------


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
            raise ValueError(f"windows overlap by a share from 0 to below 1, got {self.overlap}")

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
            raise ValueError(
                f"expected a whole number of frames per step, got {self.frames} frames on {self.steps} steps"
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
    inside = np.minimum(spans[..., 1], end) - np.maximum(spans[..., 0], start)
    return inside.clip(0) / np.maximum(spans[..., 1] - spans[..., 0], 1e-6)


# -- pixels ------------------------------------------------------------------------------------------------------------

Transform = Callable[[Tensor], Tensor]
"""Frames uint8 (frames, 3, height, width) → the same, of the size that the backbone gets; one random choice for all
frames of a clip.
"""


def augmentation(
    size: int, *, scale: tuple[float, float] | None = (0.08, 1.0), flip: bool = True, jitter: float = 0.0
) -> Transform:
    """For training: a random part of the picture (``scale``: its share of the area; None: a random square) scaled to
    ``size`` pixels.

    ``flip`` mirrors half of the clips, ``jitter`` changes brightness, contrast and saturation by up to this share.
    """
    cut: v2.Transform = (
        v2.RandomCrop(size) if scale is None else v2.RandomResizedCrop(size, scale=scale, antialias=True)
    )
    steps: list[v2.Transform] = [cut]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if jitter:
        steps.append(v2.ColorJitter(jitter, jitter, jitter))
    return v2.Compose(steps)


def centre(size: int) -> Transform:
    """For testing: the square of ``size`` pixels in the middle."""
    return v2.CenterCrop(size)


# -- the data set ------------------------------------------------------------------------------------------------------


class Clips(Dataset[Clip]):
    """The clips of videos.

    An item's random choices come from ``seed``, the pass over the data and the item's index, not from global
    generators: an item is the same in any process and after a restart. A data loader whose sampler yields (pass, index)
    gets other choices in each pass; with plain indices every pass is pass 0.

    Args:
        annotations: of the videos to use.
        files: the file of each id, as :func:`videos.find` or an audit gives them; videos without one are left out
            (:attr:`missing`), those whose file cannot be opened too, with a warning (:attr:`unreadable`).
        sampling: how clips are cut.
        transform: of pixels.
        short_side: pixels to which decoded frames are scaled; None leaves them as they are.
        training: leave out videos without actions, and put another clip in the place of one that cannot be read.
            Otherwise such a clip is black and masked but for its first step.
        normalize: (mean, std) of pixels between 0 and 255; None: frames stay uint8.
        seed: of random choices.
        threads: of each decoder.
        keep: hold each video in memory, whole and scaled, once it is decoded.

    Raises:
        ValueError: no video is left.
    """

    def __init__(
        self,
        annotations: Annotations,
        files: Mapping[str, Path],
        sampling: Sampling,
        transform: Transform,
        *,
        short_side: int | None = None,
        training: bool = False,
        normalize: tuple[Sequence[float], Sequence[float]] | None = (MEAN, STD),
        seed: int = 0,
        threads: int = 1,
        keep: bool = False,
    ) -> None:
        self.kept: dict[Path, Tensor] | None = {} if keep else None
        self.files, self.sampling, self.transform = files, sampling, transform
        self.short_side, self.training, self.normalize, self.seed, self.threads = (
            short_side,
            training,
            normalize,
            seed,
            threads,
        )
        self.missing = tuple(video.id for video in annotations.videos if video.id not in files)
        self.unreadable: dict[str, str] = {}
        wanted = [v for v in annotations.videos if v.id in files and (v.segments or not training)]
        self.items = [(video, part) for video in wanted for part in range(self._count(video))]
        if self.unreadable:
            reasons = "\n  ".join(self.unreadable.values())
            warnings.warn(f"{len(self.unreadable)} videos are left out:\n  {reasons}", VideoWarning, stacklevel=2)
        if not self.items:
            left = f"{len(self.missing)} have no file, {len(self.unreadable)} cannot be opened"
            raise ValueError(f"no clips: of {len(annotations.videos)} videos {left}, and the others have no action")

    def _count(self, video: Video) -> int:
        try:
            return self.sampling.count(videos.header(self.files[video.id]).frames)
        except VideoError as error:
            self.unreadable[video.id] = str(error)
            return 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> Clip:
        turn, number = (0, key) if isinstance(key, int) else key
        seeds = np.random.SeedSequence([self.seed, turn, number])
        for attempt in range(len(self.items)):
            video, part = self.items[(number + attempt) % len(self.items)]
            try:
                return self._clip(video, part, seeds)
            except VideoError as error:
                what = "another is taken" if self.training else "the clip is left black"
                warnings.warn(f"video {video.id!r} cannot be read, {what}: {error}", VideoWarning, stacklevel=2)
                if not self.training:
                    return self._black(video)
        raise RuntimeError(f"none of {len(self.items)} clips can be read")

    def _clip(self, video: Video, part: int, seeds: np.random.SeedSequence) -> Clip:
        path = self.files[video.id]
        where = videos.index(path)
        said = videos.header(path).frames
        # A truncated file keeps its grid: the frames that it lacks are replaced, and actions stay where they are.
        length = max(where.frames, said) if where.frames < said - videos.SLACK * where.fps else where.frames
        plan = self.sampling.plan(video, length, where.fps, part, np.random.default_rng(seeds))
        pixels = self._pixels(path, plan.numbers, length)
        return self._made(video, plan, self._transformed(pixels, seeds))

    def _pixels(self, path: Path, numbers: NDArray[np.int64], length: int) -> Tensor:
        """Frames (n, 3, height, width) of these numbers, of a file that should have ``length``."""

        def read(wanted: NDArray[np.int64]) -> Tensor:
            return videos.read(path, wanted, short_side=self.short_side, lenient=True, threads=self.threads)

        if self.kept is None:
            return read(numbers)
        if path not in self.kept:
            self.kept[path] = read(np.arange(length))
        return self.kept[path][torch.from_numpy(numbers)]

    def _transformed(self, pixels: Tensor, seeds: np.random.SeedSequence) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seeds.generate_state(2, np.uint64)[1]) % 2**63)
            return self.transform(pixels)

    def _made(self, video: Video, plan: Plan, pixels: Tensor) -> Clip:
        frames = pixels.transpose(0, 1).contiguous()
        if self.normalize is not None:
            mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in self.normalize)
            frames = frames.float().sub_(mean).div_(std)
        return Clip(video.id, frames, torch.arange(self.sampling.steps) < plan.valid, *targets(plan), plan.timing)

    def _black(self, video: Video) -> Clip:
        """A clip of a video that cannot be read: nothing to see, one step valid."""
        side = self.short_side or 1
        pixels = self.transform(torch.zeros(self.sampling.frames, 3, side, side, dtype=torch.uint8))
        timing = Timing(1.0, 1.0, 0.0, video.duration)
        return self._made(
            video, Plan(np.zeros(0, np.int64), 1, np.zeros((0, 2)), np.zeros(0, np.int64), timing), pixels
        )


def targets(plan: Plan) -> tuple[Tensor, Tensor]:
    """A plan's actions as tensors: (n, 2) float and (n,) long."""
    return torch.from_numpy(plan.segments).float().reshape(-1, 2), torch.from_numpy(plan.labels)
