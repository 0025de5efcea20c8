"""Pre-extracted features as input: the same clips as of videos, with ``features`` (channels, steps) in the place of
frames.

A video's features are an array (rows, channels), row i for the moment ``offset + i · stride`` frames into a video of
``fps`` frames per second. They lie in a folder with a file for each video (``.npy``, ``.pt``), or in one HDF5 file with
an entry for each, an array or a group that holds one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from benchmarks.tal.annotations import Annotations, Video
from benchmarks.tal.clips import Clip
from benchmarks.tal.sampling import Key, Plan, Resize, Sampling, choices

SUFFIXES = (".npy", ".pt", ".pth")
HDF5 = (".h5", ".hdf5", ".hdf")


class FeatureError(RuntimeError):
    """Features that cannot be read, or are of another form; says of which video."""


@dataclass(frozen=True)
class Source:
    """Features by the ids of videos: the files of a folder, or entries of an HDF5 file."""

    path: Path
    entries: Mapping[str, str]
    """Of each id (without ActivityNet's ``v_``) the file's name or the entry's."""

    def __contains__(self, video_id: str) -> bool:
        return video_id.removeprefix("v_") in self.entries

    def read(self, video_id: str) -> Tensor:
        """(rows, channels) float32.

        Raises:
            FeatureError: there are none, or they are no such array.
        """
        try:
            entry = self.entries[video_id.removeprefix("v_")]
        except KeyError:
            raise FeatureError(f"{self.path}: there are no features of video {video_id!r}") from None
        where = self.path / entry
        try:
            array = _from_hdf5(self.path, entry) if self.path.is_file() else _from_file(where)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
            raise FeatureError(f"{where}: the features of video {video_id!r} cannot be read ({error})") from None
        return _checked(array, where)


def find(path: Path | str) -> Source:
    """The features in a folder, or below it, or in an HDF5 file.

    Raises:
        FileNotFoundError: there is neither.
        FeatureError: it has none.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        entries = {p.stem.removeprefix("v_"): str(p) for p in reversed(files)}
    elif path.is_file() and path.suffix.lower() in HDF5:
        with h5py.File(path) as file:
            entries = {name.removeprefix("v_"): name for name in file}
    else:
        raise FileNotFoundError(f"there is no folder and no HDF5 file of features {path}")
    if not entries:
        raise FeatureError(
            f"{path}: there are no features in it; expected {', '.join(SUFFIXES)} files, or entries of an HDF5 file"
        )
    return Source(path, entries)


def _from_file(path: Path) -> Any:
    if path.suffix.lower() == ".npy":
        return np.load(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return _only(loaded) if isinstance(loaded, dict) else loaded


def _from_hdf5(path: Path, entry: str) -> Any:
    with h5py.File(path) as file:
        found = file[entry]
        return np.asarray(_only(found) if isinstance(found, h5py.Group) else found)


def _only(group: Mapping[str, Any]) -> Any:
    """The array of a group: the one that is called so, or the only one."""
    for name in ("features", "feature", "feats"):
        if name in group:
            return group[name]
    if len(group) != 1:
        raise ValueError(f"expected one array or one called 'features', got {', '.join(map(str, group)) or 'none'}")
    return next(iter(group.values()))


def _checked(array: Any, where: Path) -> Tensor:
    tensor = torch.as_tensor(array)
    if (
        tensor.dim() != 2
        or 0 in tensor.shape
        or not (tensor.is_floating_point() or tensor.dtype in (torch.uint8, torch.int32))
    ):
        raise FeatureError(
            f"{where}: it holds {tensor.dtype} of shape {tuple(tensor.shape)}; expected numbers (rows, channels)"
        )
    if not tensor.isfinite().all():
        raise FeatureError(f"{where}: it holds values that are not finite")
    return tensor.float()


# -- the data set ------------------------------------------------------------------------------------------------------


class Features(Dataset[Clip]):
    """Clips of features. Items, passes and random choices are as for :class:`benchmarks.tal.clips.Clips`.

    Args:
        annotations: of the videos to use.
        source: of their features; videos without are left out (:attr:`missing`).
        sampling: how clips are cut. A row counts as one sampled frame: ``frames`` must equal ``steps``, and a stride of
            2 takes every second row. For :class:`Resize`, rows are interpolated linearly, and fps and stride do not
            matter.
        fps: of the videos; None: from each one's rows and duration.
        stride: frames from a row to the next.
        offset: frames from the beginning to the moment that the first row stands for.
        training: leave out videos without actions.
        seed: of random choices.

    Raises:
        ValueError: the sampling is of several frames a step, or no video is left.
    """

    def __init__(
        self,
        annotations: Annotations,
        source: Source,
        sampling: Sampling,
        *,
        fps: float | None = None,
        stride: float = 1.0,
        offset: float = 0.0,
        training: bool = False,
        seed: int = 0,
    ) -> None:
        if sampling.frames != sampling.steps and not isinstance(sampling, Resize):
            raise ValueError(
                f"expected a row of features for each step, got {sampling.frames} for {sampling.steps} steps"
            )
        self.source, self.sampling, self.training, self.seed = source, sampling, training, seed
        self.fps, self.stride, self.offset = fps, stride, offset
        self.missing = tuple(video.id for video in annotations.videos if video.id not in source)
        wanted = [v for v in annotations.videos if v.id in source and (v.segments or not training)]
        self.items = [(video, part) for video in wanted for part in range(self._count(video))]
        if not self.items:
            raise ValueError(
                f"no clips: of {len(annotations.videos)} videos {len(self.missing)} have no features, the others no "
                "action"
            )

    def _count(self, video: Video) -> int:
        return 1 if isinstance(self.sampling, Resize) else self.sampling.count(len(self.source.read(video.id)))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> Clip:
        number, seeds = choices(key, self.seed)
        video, part = self.items[number]
        rows = self.source.read(video.id)
        plan = self.plan(video, len(rows), part, np.random.default_rng(seeds))
        features = self._resized(rows) if isinstance(self.sampling, Resize) else rows[torch.from_numpy(plan.numbers)].T
        mask = torch.arange(self.sampling.steps) < plan.valid
        return Clip(video.id, None, mask, *plan.targets(), plan.timing, (features * mask).contiguous())

    def plan(self, video: Video, rows: int, part: int, rng: np.random.Generator) -> Plan:
        """The clip's rows and actions; its timing in the frames of the video."""
        if isinstance(self.sampling, Resize):
            return self.sampling.plan(video, rows, 1.0, part, rng)
        if self.fps is None and not math.isfinite(video.duration):
            raise FeatureError(f"video {video.id!r} has no duration; give the frames per second of its features")
        # One row in so many seconds: rows count as frames, and actions begin earlier by what row 0 lies behind the
        # beginning.
        fps = rows * self.stride / video.duration if self.fps is None else self.fps
        moved = replace(
            video,
            segments=tuple(
                replace(s, start=s.start - self.offset / fps, end=s.end - self.offset / fps) for s in video.segments
            ),
        )
        plan = self.sampling.plan(moved, rows, fps / self.stride, part, rng)
        timing = replace(
            plan.timing,
            fps=fps,
            stride=plan.timing.stride * self.stride,
            offset=plan.timing.offset * self.stride + self.offset,
            duration=plan.timing.duration,
        )
        return replace(plan, timing=timing)

    def _resized(self, rows: Tensor) -> Tensor:
        """(rows, channels) → (channels, steps)"""
        return F.interpolate(rows.T[None], size=self.sampling.steps, mode="linear", align_corners=False)[0]
