"""Videos audited before a long run: which are missing, corrupt, truncated, or of another length than annotated."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.tal.annotations import Annotations
from benchmarks.tal.videos import SLACK, Index, VideoError, find, header, index, read


@dataclass(frozen=True)
class Audit:
    """What a folder has of the annotated videos."""

    found: dict[str, Path]
    """Files that can be read, by id."""
    missing: tuple[str, ...]
    """Ids without a file."""
    faulty: dict[str, str]
    """Ids whose file is corrupt or truncated, with the reason; they are not among those found."""
    lengths: dict[str, tuple[float, float]]
    """Ids whose file and annotation differ in length: seconds of either. They are used."""

    def __str__(self) -> str:
        lines = [
            f"{len(self.found)} videos can be read, {len(self.missing)} are missing, {len(self.faulty)} are corrupt or "
            "truncated"
        ]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  corrupt: {reason}" for reason in self.faulty.values()]
        lines += [
            f"  length: {name}: the file has {a:.2f} s, the annotation {b:.2f} s"
            for name, (a, b) in self.lengths.items()
        ]
        return "\n".join(lines)


def audit(
    annotations: Annotations, folder: Path | str, *, thorough: bool = False, workers: int = 1, progress: bool = True
) -> Audit:
    """Look for each annotated video, and whether its file can be read.

    Args:
        annotations: whose videos to look for.
        folder: where.
        thorough: decode every frame. Otherwise packets are read, which finds truncated files, and three frames are
            decoded.
        workers: files at a time.
        progress: show a progress bar.
    """
    paths = find(folder, [video.id for video in annotations.videos])
    with Progress(disable=not progress) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("checking videos", total=len(paths))
        checks = dict(
            zip(paths, pool.map(lambda path: _advance(bar, task, fault(path, thorough)), paths.values()), strict=True)
        )
    found = {name: path for name, path in paths.items() if checks[name] is None}
    both = ((name, header(path).duration, annotations.by_id[name].duration) for name, path in found.items())
    return Audit(
        found,
        tuple(video.id for video in annotations.videos if video.id not in paths),
        {name: reason for name, reason in checks.items() if reason is not None},
        {
            name: (file, said)
            for name, file, said in both
            if abs(file - said) > max(SLACK, 0.05 * said) and np.isfinite(said)
        },
    )


def _advance(bar: Progress, task: int, result: str | None) -> str | None:
    bar.advance(task)
    return result


def fault(path: Path | str, thorough: bool = False) -> str | None:
    """What is wrong with a file, or None: see :func:`audit`."""
    try:
        said = header(path)
        where = index(path)
        if where.frames < said.frames - SLACK * said.fps:
            return f"{path}: it is truncated: {where.frames} of {said.frames} frames are there"
        for numbers in _samples(where, thorough):
            read(path, numbers, short_side=16)
    except VideoError as error:
        return str(error)
    return None


def _samples(where: Index, thorough: bool) -> Iterable[NDArray[np.int64]]:
    if thorough:
        everything = np.arange(where.frames)
        return np.array_split(everything, max(1, where.frames // 512))
    return [np.unique([0, where.frames // 2, where.frames - 1])]
