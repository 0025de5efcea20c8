"""Video files: found by id, and read frame by frame at exact places.

A frame's number is its place in the order in which frames are shown. Reading packets without decoding them gives each
frame's time stamp and the frames at which decoding can start; a frame is then reached by decoding from the last such
one before it, and recognised by its time stamp, so it is the same frame as in a file decoded from its beginning.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.tal.annotations import bare
from benchmarks.tal.errors import InputError, MissingError

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ts")
"""Names of files that are taken for videos; of two files with one id the earlier extension counts."""

SLACK = 1.0
"""Seconds by which a file may be shorter than it says, or than its annotations say, before that is reported."""

DAMAGES = 100
"""Damaged places of a file that are passed over in one go, where that is wanted."""


class VideoError(InputError, RuntimeError):
    """A file that cannot be read as a video, or a frame of it."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path, self.reason = Path(path), reason
        super().__init__(f"{path}: {reason}")


class VideoWarning(UserWarning):
    """Frames that could not be decoded and were replaced by their neighbours."""


# -- finding -----------------------------------------------------------------------------------------------------------


def find(folder: Path | str, ids: Iterable[str] | None = None) -> dict[str, Path]:
    """The file of each id that has one, in ``folder`` or below: any common extension, the name with ActivityNet's
    ``v_`` or without.

    Without ``ids``, every video by its file's name without ``v_``; where several have the same, by their paths from the
    folder, with their endings. ``folder`` may then be a file.

    Raises:
        MissingError: there is no such folder.
    """
    if Path(folder).is_file() and ids is None:
        return {bare(Path(folder).stem): Path(folder)}
    if not Path(folder).is_dir():
        raise MissingError(f"there is no folder of videos {folder}")
    files: dict[str, list[Path]] = {}
    for path in sorted(_files(Path(folder)), key=lambda p: (EXTENSIONS.index(p.suffix.lower()), len(p.parts), p)):
        files.setdefault(bare(path.stem), []).append(path)
    if ids is None:
        return {
            name if len(paths) == 1 else path.relative_to(folder).as_posix(): path
            for name, paths in files.items()
            for path in paths
        }
    return {name: files[bare(name)][0] for name in ids if bare(name) in files}


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (Path(parent, name) for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS)


# -- what a file holds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a file says of itself, without reading on: number of frames (estimated where it does not say), frames per
    second, pixels.
    """

    frames: int
    fps: float
    width: int
    height: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps


@dataclass(frozen=True, eq=False)
class Index:
    """The frames of a file in the order in which they are shown.

    ``stamps`` (n,) time stamps in units of ``unit`` seconds, empty where the format has none (frames are then counted
    from the beginning); ``starts`` (k, 2) the time stamp of each frame at which decoding can start, and the position to
    seek to for it.
    """

    frames: int
    fps: float
    stamps: NDArray[np.int64]
    starts: NDArray[np.int64]
    unit: float

    @property
    def duration(self) -> float:
        """Seconds, from the first frame to the end of the last one."""
        return self.frames / self.fps


def _open(path: Path | str) -> InputContainer:
    try:
        container = av.open(str(path))
    except (FFmpegError, OSError) as error:
        raise VideoError(path, f"it cannot be opened ({_reason(error)})") from None
    if not container.streams.video:
        container.close()
        raise VideoError(path, "it has no video stream")
    return container


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


@functools.lru_cache(maxsize=1024)
def header(path: Path | str) -> Header:
    """What a file says of itself. Kept for later calls.

    Raises:
        VideoError: the file is no video, or says too little.
    """
    with _open(path) as container:
        return _header(path, container)


def _header(path: Path | str, container: InputContainer) -> Header:
    stream = container.streams.video[0]
    fps = stream.average_rate or stream.guessed_rate
    seconds = _duration(container, stream)
    frames = stream.frames or round((seconds or 0) * float(fps or 0))
    if not fps or not frames or not stream.width:
        raise VideoError(path, "it states no frame rate, no length or no size")
    return Header(int(frames), float(fps), stream.width, stream.height)


def _duration(container: InputContainer, stream: VideoStream) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


@functools.lru_cache(maxsize=1024)
def index(path: Path | str) -> Index:
    """The frames of a file, from its packets. Kept for later calls.

    Raises:
        VideoError: the file is no video, or it has no frames.
    """
    with _open(path) as container:
        return _index(path, container)


def _index(path: Path | str, container: InputContainer) -> Index:
    stream = container.streams.video[0]
    stamps: list[int | None] = []
    starts: list[tuple[int, int]] = []
    try:
        for packet in container.demux(stream):
            if packet.size == 0 or packet.is_discard:
                continue
            stamps.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                starts.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    except FFmpegError as error:
        if not stamps:
            raise VideoError(path, f"no packet of it can be read ({_reason(error)})") from None
    if not stamps:
        raise VideoError(path, "it has no frames")
    unit = float(stream.time_base or 1)
    known = sorted({stamp for stamp in stamps if stamp is not None})
    if len(known) < len(stamps):  # stamps that are missing or repeated identify no frame
        fps = float(stream.average_rate or stream.guessed_rate or 25)
        return Index(len(stamps), fps, np.zeros(0, np.int64), np.zeros((0, 2), np.int64), unit)
    span = (known[-1] - known[0]) * unit
    fps = (len(known) - 1) / span if span > 0 else float(stream.average_rate or stream.guessed_rate or 25)
    return Index(len(known), fps, np.array(known), np.array(sorted(starts)).reshape(-1, 2), unit)


# -- reading -----------------------------------------------------------------------------------------------------------


def read(
    path: Path | str,
    numbers: Sequence[int] | NDArray[np.int64],
    *,
    short_side: int | None = None,
    lenient: bool = False,
    threads: int = 1,
) -> Tensor:
    """The frames of these numbers, in their order: uint8 (n, 3, height, width), RGB.

    Args:
        path: a video file.
        numbers: places in the order in which frames are shown, from 0; in any order, repeated or not.
        short_side: pixels of the shorter side, to which frames are scaled as they are decoded; without it, their own
            size.
        lenient: frames that are not there or cannot be decoded are replaced by the nearest ones that can, with a
            :class:`VideoWarning`.
        threads: of the decoder.

    Raises:
        VideoError: the file cannot be read, or, unless ``lenient``, one of the frames.
        IndexError: a number below 0, or, unless ``lenient``, past the last frame.
    """
    where = index(path)
    wanted, places = np.unique(np.asarray(numbers, dtype=np.int64), return_inverse=True)
    if len(wanted) and (wanted[0] < 0 or (wanted[-1] >= where.frames and not lenient)):
        raise IndexError(
            f"{path}: frames {wanted[0]} to {wanted[-1]} were asked for; it has frames 0 to {where.frames - 1}"
        )
    scaler = _Scaler(short_side)
    found: dict[int, NDArray[np.uint8]] = {}
    try:
        for number, frame in _frames(path, where, wanted.tolist(), threads, lenient):
            found[number] = scaler(frame)
    except FFmpegError as error:
        if not lenient:
            at = next((n for n in wanted.tolist() if n not in found), 0)
            raise VideoError(
                path, f"frame {at} of {where.frames} ({at / where.fps:.2f} s) cannot be decoded ({_reason(error)})"
            ) from None
    return _stack(path, where, wanted, found, lenient)[torch.from_numpy(places.ravel())]


def _stack(
    path: Path | str, where: Index, wanted: NDArray[np.int64], found: dict[int, NDArray[np.uint8]], lenient: bool
) -> Tensor:
    absent = [number for number in wanted.tolist() if number not in found]
    if absent and not (lenient and found):
        at = absent[0]
        raise VideoError(
            path, f"frame {at} of {where.frames} ({at / where.fps:.2f} s) cannot be decoded; the file may be truncated"
        )
    if absent:
        text = (
            f"{path}: {len(absent)} of {len(wanted)} frames cannot be decoded, from frame {absent[0]} on; their "
            "neighbours are used"
        )
        warnings.warn(text, VideoWarning, stacklevel=3)
        known = np.array(sorted(found))
        for number in absent:
            found[number] = found[int(known[np.abs(known - number).argmin()])]
    frames = [found[number] for number in wanted.tolist()]
    return (
        torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) if frames else torch.zeros(0, 3, 0, 0, dtype=torch.uint8)
    )


@dataclass
class _Scaler:
    """Frames to arrays (height, width, 3); all of a file to the size of its first, in case it changes on the way."""

    short_side: int | None
    size: tuple[int, int] | None = field(default=None, init=False)

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        if self.size is None:
            ratio = self.short_side / min(frame.width, frame.height) if self.short_side else 1
            self.size = (max(1, round(frame.width * ratio)), max(1, round(frame.height * ratio)))
        return frame.reformat(*self.size, format="rgb24", interpolation="BILINEAR").to_ndarray()


def _frames(
    path: Path | str, where: Index, wanted: Sequence[int], threads: int, lenient: bool
) -> Iterator[tuple[int, VideoFrame]]:
    """(number, frame) of the ``wanted`` ones, ascending; those that the decoder does not give are left out."""
    if not len(where.stamps):
        yield from _counted(path, set(wanted), threads)
        return
    with _open(path) as container:
        reader = _Reader(container, where, threads, lenient)
        for number in (n for n in wanted if n < where.frames):
            if (frame := reader.frame(int(where.stamps[number]))) is not None:
                yield number, frame


def _counted(path: Path | str, wanted: Collection[int], threads: int) -> Iterator[tuple[int, VideoFrame]]:
    last = max(wanted, default=-1)
    with _open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = threads
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield number, frame
            if number >= last:
                return


class _Reader:
    """A file open for decoding, at some place. Frames come by ascending time stamp."""

    def __init__(self, container: InputContainer, where: Index, threads: int, lenient: bool) -> None:
        self.container, self.starts = container, where.starts
        self.patience = DAMAGES if lenient else 0
        self.stream = container.streams.video[0]
        self.stream.codec_context.thread_count = threads
        self.decoder = container.decode(self.stream)
        self.last: VideoFrame | None = None
        self.began = 0  # the start from which we decode

    def frame(self, stamp: int) -> VideoFrame | None:
        """The frame of this time stamp, or None where the decoder gives none."""
        start = max(int(np.searchsorted(self.starts[:, 0], stamp, side="right")) - 1, 0)
        if start > self.began:
            self._seek(start)
        frame = self._forward(stamp)
        # Formats count positions differently: where a seek led past the frame, begin at an earlier start, at worst at
        # the first.
        while frame is not None and frame.pts > stamp and self.began > 0 and start > 0:
            start = max(start - 1, 0)
            self._seek(start)
            frame = self._forward(stamp)
        return frame if frame is not None and frame.pts == stamp else None

    def _seek(self, start: int) -> None:
        self.container.seek(int(self.starts[start, 1]), stream=self.stream)
        self.decoder = self.container.decode(self.stream)
        self.last, self.began = None, start

    def _forward(self, stamp: int) -> VideoFrame | None:
        """Decode up to the first frame at ``stamp`` or after it; None at the end."""
        while self.last is None or self.last.pts is None or self.last.pts < stamp:
            self.last = self._next()
            if self.last is None:
                return None
        return self.last

    def _next(self) -> VideoFrame | None:
        while True:
            try:
                return next(self.decoder, None)
            except FFmpegError:
                if not self.patience:
                    raise
                self.patience -= 1
                self.decoder = self.container.decode(self.stream)  # goes on with the packet after the damaged one
