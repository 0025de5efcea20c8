"""Clips of videos for a localizer, alone and in batches; how they are cut out is said in `sampling`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.tal import videos
from benchmarks.tal.annotations import Annotations, Video
from benchmarks.tal.errors import EmptyError
from benchmarks.tal.normalization import MEAN, STD
from benchmarks.tal.pixels import Transform, transformed
from benchmarks.tal.sampling import Key, Plan, Sampling, Timing, choices
from benchmarks.tal.videos import VideoError, VideoWarning


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
        EmptyError: no video is left.
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
        self.short_side, self.training, self.normalize = short_side, training, normalize
        self.seed, self.threads = seed, threads
        self.missing = tuple(video.id for video in annotations.videos if video.id not in files)
        self.unreadable: dict[str, str] = {}
        wanted = [v for v in annotations.videos if v.id in files and (v.segments or not training)]
        self.items = [(video, part) for video in wanted for part in range(self._count(video))]
        if self.unreadable:
            reasons = "\n  ".join(self.unreadable.values())
            warnings.warn(f"{len(self.unreadable)} videos are left out:\n  {reasons}", VideoWarning, stacklevel=2)
        if not self.items:
            left = f"{len(self.missing)} have no file, {len(self.unreadable)} cannot be opened"
            raise EmptyError(f"no clips: of {len(annotations.videos)} videos {left}, and the others have no action")

    def _count(self, video: Video) -> int:
        try:
            return self.sampling.count(videos.header(self.files[video.id]).frames)
        except VideoError as error:
            self.unreadable[video.id] = str(error)
            return 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> Clip:
        number, seeds = choices(key, self.seed)
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
        return self._made(video, plan, transformed(self.transform, pixels, seeds))

    def _pixels(self, path: Path, numbers: NDArray[np.int64], length: int) -> Tensor:
        """Frames (n, 3, height, width) of these numbers, of a file that should have ``length``."""

        def read(wanted: NDArray[np.int64]) -> Tensor:
            return videos.read(path, wanted, short_side=self.short_side, lenient=True, threads=self.threads)

        if self.kept is None:
            return read(numbers)
        if path not in self.kept:
            self.kept[path] = read(np.arange(length))
        return self.kept[path][torch.from_numpy(numbers)]

    def _made(self, video: Video, plan: Plan, frames: Tensor) -> Clip:
        if self.normalize is not None:
            mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in self.normalize)
            frames = frames.float().sub_(mean).div_(std)
        return Clip(video.id, frames, torch.arange(self.sampling.steps) < plan.valid, *plan.targets(), plan.timing)

    def _black(self, video: Video) -> Clip:
        """A clip of a video that cannot be read: nothing to see, one step valid."""
        side = self.short_side or 1
        pixels = torch.zeros(self.sampling.frames, 3, side, side, dtype=torch.uint8)
        frames = transformed(self.transform, pixels, np.random.SeedSequence(self.seed))
        nothing, timing = np.zeros(0, np.int64), Timing(1.0, 1.0, 0.0, video.duration)
        return self._made(video, Plan(nothing, 1, np.zeros((0, 2)), nothing, timing), frames)
