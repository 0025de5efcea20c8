"""Pre-extracted features as input: the same clips as of videos, with ``features`` (channels, steps) in the place of
frames.

A video's features are an array (rows, channels); :class:`Extraction` says when a row is. They lie in a folder with a
file for each video (``.npy``, ``.pt``), or in one HDF5 file with an entry for each, an array or a group that holds one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from benchmarks.tal.annotations import Annotations, Video, bare
from benchmarks.tal.clips import Clip
from benchmarks.tal.errors import EmptyError, InputError, MissingError
from benchmarks.tal.sampling import Key, Plan, Resize, Sampling, Timing, choices
from benchmarks.tal.schema import ConfigError

ROUNDING = 1e-6
"""Of a frame: what a product may fall short of a whole number."""

SUFFIXES = (".npy", ".pt", ".pth")
HDF5 = (".h5", ".hdf5", ".hdf")

LOG = "extraction.jsonl"
"""Beside features that `extraction` made: how, and of each video its frames per second."""


class FeatureError(InputError, RuntimeError):
    """Features that cannot be read, or are of another form; says of which video. ``kind`` is for counting."""

    kind = "unreadable"


class NotFiniteError(FeatureError):
    """Some of their numbers are none."""

    kind = "not finite"


class WidthError(FeatureError):
    """Rows are of another width than expected."""

    kind = "width"


class TransposedError(WidthError):
    """Rows are where columns are expected."""

    kind = "transposed"


@dataclass(frozen=True)
class Source:
    """Features by the ids of videos: the files of a folder, or entries of an HDF5 file."""

    path: Path
    entries: Mapping[str, str]
    """Of each id (without ActivityNet's ``v_``) the file's name or the entry's."""
    channels: int | None = None
    """That rows must have; None: any number."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Frames per second of videos, by their ids, where the extractor left them."""

    def told(self, video: Video) -> Video:
        """The video with the frames per second that the extractor met, where it left them."""
        return replace(video, fps=self.rates.get(self.key(video.id), video.fps))

    def key(self, video_id: str) -> str:
        """The id as entries have it."""
        return bare(video_id)

    def __contains__(self, video_id: str) -> bool:
        return self.key(video_id) in self.entries

    def read(self, video_id: str) -> Tensor:
        """(rows, channels) float32.

        Raises:
            FeatureError: there are none, or they are no such array; says so of rows of another width, too.
        """
        try:
            entry = self.entries[self.key(video_id)]
        except KeyError:
            raise FeatureError(f"{self.path}: there are no features of video {video_id!r}") from None
        where = self.path / entry
        try:
            array = _from_hdf5(self.path, entry) if self.path.is_file() else _from_file(where)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
            raise FeatureError(f"{where}: the features of video {video_id!r} cannot be read ({error})") from None
        return _checked(array, where, self.channels)


def find(path: Path | str) -> Source:
    """The features in a folder, or below it, in an HDF5 file, or of one video in a file.

    Raises:
        MissingError: there is neither.
        FeatureError: it has none, or two files for one video.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        entries: dict[str, str] = {}
        for file in files:
            if (first := entries.setdefault(bare(file.stem), str(file))) != str(file):
                raise FeatureError(
                    f"{path}: video {bare(file.stem)!r} has features twice, in {first} and {file}; expected one file"
                )
    elif path.is_file() and path.suffix.lower() in HDF5:
        with h5py.File(path) as file:
            entries = {bare(name): name for name in file}
    elif path.is_file() and path.suffix.lower() in SUFFIXES:
        return Source(path.parent, {bare(path.stem): path.name})
    else:
        raise MissingError(f"there is no folder and no HDF5 file of features {path}")
    if not entries:
        raise FeatureError(
            f"{path}: there are no features in it; expected {', '.join(SUFFIXES)} files, or entries of an HDF5 file"
        )
    return Source(path, entries, rates=_rates(path.parent / LOG))


def _rates(log: Path) -> dict[str, float]:
    if not log.is_file():
        return {}
    lines = (json.loads(line) for line in log.read_text(encoding="utf8").splitlines()[1:])
    return {bare(line["video"]): line["fps"] for line in lines}


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


def _checked(array: Any, where: Path, channels: int | None) -> Tensor:
    tensor = torch.as_tensor(array)
    if (
        tensor.dim() != 2
        or 0 in tensor.shape
        or not (tensor.is_floating_point() or tensor.dtype in (torch.uint8, torch.int32))
    ):
        raise FeatureError(
            f"{where}: it holds {tensor.dtype} of shape {tuple(tensor.shape)}; expected numbers (rows, channels)"
        )
    if channels and tensor.shape[1] != channels:
        said = f"it has shape {tuple(tensor.shape)}; expected (rows, {channels}), by data.features.channels"
        if tensor.shape[0] == channels:
            raise TransposedError(f"{where}: it is transposed: {said}")
        raise WidthError(f"{where}: {said}")
    if not (fine := tensor.isfinite()).all():
        raise NotFiniteError(
            f"{where}: it holds values that are not finite, in {int((~fine).any(1).sum())} of {len(tensor)} rows"
        )
    return tensor.float()


# -- when rows are -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extraction:
    """How an extractor made rows of a video: of ``snippet`` frames each, one every ``stride`` frames, row i for the
    moment ``offset`` + i · ``stride`` frames into the video.

    Attributes:
        stride: frames. snippet: frames; None: twice the offset, or the stride.
        offset: frames; None: half a snippet, or none where none is given.
        fps: of the videos; None: of each what the annotations say, else what its rows and its duration make it.
        whole_frames: times of actions are cut to whole frames.
    """

    stride: float = 1.0
    snippet: float | None = None
    offset: float | None = None
    fps: float | None = None
    whole_frames: bool = False

    @property
    def seen(self) -> float:
        """Frames that a row sees."""
        return self.snippet or 2 * (self.offset or 0.0) or self.stride

    @property
    def first(self) -> float:
        """The frame that the first row stands for."""
        return (self.snippet or 0.0) / 2 if self.offset is None else self.offset

    def frames(self, rows: int) -> float:
        """Frames that so many rows see."""
        return (rows - 1) * self.stride + self.seen

    def rate(self, video: Video, rows: int) -> float:
        """Frames per second of a video.

        Raises:
            FeatureError: nothing says it.
        """
        if said := self.fps or video.fps:
            return said
        if not math.isfinite(video.duration):
            raise FeatureError(f"video {video.id!r} has no duration; give the frames per second of its features")
        return self.frames(rows) / video.duration

    def moved(self, video: Video, fps: float) -> Video:
        """The video with time 0 at its first row."""

        def shifted(seconds: float) -> float:
            frame = seconds * fps
            return ((math.floor(frame + ROUNDING) if self.whole_frames else frame) - self.first) / fps

        segments = (replace(s, start=shifted(s.start), end=shifted(s.end)) for s in video.segments)
        return replace(video, segments=tuple(segments))

    def timed(self, timing: Timing, fps: float) -> Timing:
        """The timing of a clip in frames of the video, from that in rows."""
        offset = timing.offset * self.stride + self.first
        return replace(timing, fps=fps, stride=timing.stride * self.stride, offset=offset)


def unannotated(source: Source, how: Extraction) -> Annotations:
    """The videos of features, without actions; their durations are those of their rows.

    Raises:
        FeatureError: nothing says how many frames a second has.
    """
    rates = {name: how.fps or source.rates.get(name) for name in source.entries}
    if None in rates.values():
        raise FeatureError(f"{source.path}: nothing says the frames per second of these videos; set data.features.fps")
    lengths = ((name, how.frames(len(source.read(name))) / fps) for name, fps in rates.items() if fps)
    return Annotations(tuple(Video(name, "testing", seconds, ()) for name, seconds in lengths), ())


# -- the data set ------------------------------------------------------------------------------------------------------


class Features(Dataset[Clip]):
    """Clips of features. Items, passes and random choices are as for :class:`benchmarks.tal.clips.Clips`.

    Args:
        annotations: of the videos to use.
        source: of their features; videos without are left out (:attr:`missing`).
        sampling: how clips are cut. A row counts as one sampled frame: ``frames`` must equal ``steps``, and a stride of
            2 takes every second row. For :class:`Resize`, rows are interpolated linearly, and fps and stride do not
            matter.
        fps, stride, snippet, offset, whole_frames: see :class:`Extraction`.
        channels: that rows must have, or None.
        training: leave out videos without actions.
        seed: of random choices.

    Raises:
        ConfigError: the sampling is of several frames a step. EmptyError: no video is left.
        FeatureError: features of a video are not as they should be.
    """

    def __init__(
        self,
        annotations: Annotations,
        source: Source,
        sampling: Sampling,
        *,
        fps: float | None = None,
        stride: float = 1.0,
        snippet: float | None = None,
        offset: float | None = None,
        whole_frames: bool = False,
        channels: int | None = None,
        training: bool = False,
        seed: int = 0,
    ) -> None:
        if sampling.frames != sampling.steps and not isinstance(sampling, Resize):
            raise ConfigError(
                f"sampling.frames: expected a row of features for each step, got {sampling.frames} for "
                f"{sampling.steps} steps (sampling.steps)"
            )
        source = replace(source, channels=channels or source.channels)
        self.source, self.sampling, self.training, self.seed = source, sampling, training, seed
        self.how = Extraction(stride, snippet, offset, fps, whole_frames)
        self.missing = tuple(video.id for video in annotations.videos if video.id not in source)
        wanted = [source.told(v) for v in annotations.videos if v.id in source and (v.segments or not training)]
        self.items = [(video, part) for video in wanted for part in range(self._count(video))]
        if not self.items:
            raise EmptyError(
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
        # One row in so many seconds: rows count as frames, and actions begin earlier by what row 0 lies behind the
        # beginning.
        fps = self.how.rate(video, rows)
        plan = self.sampling.plan(self.how.moved(video, fps), rows, fps / self.how.stride, part, rng)
        return replace(plan, timing=self.how.timed(plan.timing, fps))

    def _resized(self, rows: Tensor) -> Tensor:
        """(rows, channels) → (channels, steps)"""
        return F.interpolate(rows.T[None], size=self.sampling.steps, mode="linear", align_corners=False)[0]
