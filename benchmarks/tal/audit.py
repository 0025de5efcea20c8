"""Videos, or their features, audited before a long run: which are missing, broken, or of another length than
annotated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from benchmarks.tal.annotations import Annotations, Fault, shortened
from benchmarks.tal.features import Extraction, FeatureError, Source
from benchmarks.tal.videos import SLACK, Index, VideoError, find, header, index, read

Reason = tuple[str, str]
"""What kind of fault, and what it is."""


@dataclass(frozen=True)
class Audit:
    """What there is of the annotated videos."""

    found: dict[str, Path]
    """Files that can be read, by id."""
    missing: tuple[str, ...]
    """Ids without a file."""
    faulty: dict[str, str]
    """Ids whose file is corrupt or truncated, with the reason; they are not among those found."""
    lengths: dict[str, tuple[float, float]]
    """Ids whose file and annotation differ in length: seconds of either. They are used."""
    kinds: Mapping[str, str]
    """Of each fault its kind, by id."""
    broken: str = "corrupt or truncated"
    """What those that are faulty are called together."""

    def __str__(self) -> str:
        """Numbers, and of each kind the first few."""
        found, missing, faulty = (len(part) for part in (self.found, self.missing, self.faulty))
        lines = [
            f"{found} videos can be read, {missing} are missing, {faulty} are {self.broken}",
            *shortened("  missing: ", self.missing),
        ]
        for kind in dict.fromkeys(self.kinds.values()):
            lines += shortened(f"  {kind}: ", (r for name, r in self.faulty.items() if self.kinds[name] == kind))
        differences = (
            f"{name}: the file has {a:.2f} s, the annotation {b:.2f} s" for name, (a, b) in self.lengths.items()
        )
        return "\n".join([*lines, *shortened("  length: ", differences)])


def of_annotations(faults: Sequence[Fault], training: Annotations, test: Annotations) -> list[str]:
    """Lines about a file of annotations: its faults by kind, and classes that one of the subsets lacks."""
    kinds = Counter(fault.kind for fault in faults)
    lines = []
    for kind, count in kinds.items():
        lines.append(f"annotations: {count} x {kind}")
        lines += shortened("  ", (str(fault) for fault in faults if fault.kind == kind))
    shown = [{of.classes[s.label] for video in of.videos for s in video.segments} for of in (training, test)]
    for name, other, lacking in (("training", "test", shown[1] - shown[0]), ("test", "training", shown[0] - shown[1])):
        if lacking:
            lines.append(f"annotations: {len(lacking)} classes of {other} videos have no action in {name} videos")
            lines += shortened("  ", (repr(label) for label in sorted(lacking)))
    return lines or ["annotations: no fault"]


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

    def checked(name: str) -> Reason | None:
        reason = fault(paths[name], thorough)
        return None if reason is None else ("corrupt", reason)

    found = _audited(annotations, paths, checked, workers, progress)
    return replace(found, lengths=_lengths(annotations, {n: header(path).duration for n, path in found.found.items()}))


def audit_features(
    annotations: Annotations, source: Source, how: Extraction | None, *, workers: int = 1, progress: bool = True
) -> Audit:
    """Look for the features of each annotated video, and whether they are what a network takes: finite, of its width,
    as long as the video.

    Args:
        annotations: whose videos to look for. source: of features, with the width that is expected.
        how: they were made, by which their length is held against the annotated one; None: it is not.
        workers: files at a time. progress: show a progress bar.
    """
    places = {v.id: source.path / source.entries[source.key(v.id)] for v in annotations.videos if v.id in source}
    seconds: dict[str, float] = {}

    def checked(name: str) -> Reason | None:
        video = source.told(annotations.by_id[name])
        try:
            rows = len(source.read(name))
            if how is not None and (how.fps or video.fps):
                seconds[name] = how.frames(rows) / how.rate(video, rows)
        except FeatureError as error:
            return error.kind, str(error)
        return None

    found = _audited(annotations, places, checked, workers, progress)
    return replace(found, lengths=_lengths(annotations, seconds), broken="not as they should be")


def _audited(
    annotations: Annotations,
    paths: Mapping[str, Path],
    checked: Callable[[str], Reason | None],
    workers: int,
    progress: bool,
) -> Audit:
    with Progress(disable=not progress) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("checking videos", total=len(paths))
        checks = dict(zip(paths, pool.map(lambda name: _advance(bar, task, checked(name)), paths), strict=True))
    faulty = {name: reason for name, reason in checks.items() if reason is not None}
    return Audit(
        {name: path for name, path in paths.items() if name not in faulty},
        tuple(video.id for video in annotations.videos if video.id not in paths),
        {name: reason for name, (_, reason) in faulty.items()},
        {},
        {name: kind for name, (kind, _) in faulty.items()},
    )


def _lengths(annotations: Annotations, seconds: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Of which videos the files are of other lengths than the annotations say."""
    both = ((name, file, annotations.by_id[name].duration) for name, file in sorted(seconds.items()))
    return {
        name: (file, said)
        for name, file, said in both
        if np.isfinite(said) and abs(file - said) > max(SLACK, 0.05 * said)
    }


def _advance(bar: Progress, task: int, result: Reason | None) -> Reason | None:
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
