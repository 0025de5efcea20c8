"""Who does what when: annotations in ActivityNet's JSON form (ActivityNet-1.3, THUMOS-14 and whatever follows them),
checked on the way in.

    {"database": {"video id": {"subset": "training", "duration": 82.73,
                               "annotations": [{"label": "Ballet", "segment": [6.2, 77.7]}, …]}, …}}

Times are seconds; a number written as a string counts as that number, as some published files have it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.tal.errors import EmptyError, InputError

SUBSETS = ("training", "validation", "testing", "train", "val", "test")
"""Names of subsets in use, in lower case: files write them in either."""

ROUNDING = 1e-2
"""Seconds by which a segment may pass its video's end: files round durations to hundredths."""

SHOWN = 10
"""Faults that a message spells out; the others are counted."""


def bare(name: str) -> str:
    """The id of a video without ActivityNet's ``v_``: files name a video either way, and mean the same one."""
    return name.removeprefix("v_")


@dataclass(frozen=True)
class Segment:
    """An action: from ``start`` to ``end`` in seconds, ``label`` an index into :attr:`Annotations.classes`."""

    start: float
    end: float
    label: int


@dataclass(frozen=True)
class Video:
    """One video and its actions, in the file's order. ``duration`` in seconds, infinite where the file need not state
    it; ``fps`` frames per second, where the file says; ``doubtful`` are (start, end) of what marks no action.
    """

    id: str
    subset: str
    duration: float
    segments: tuple[Segment, ...]
    fps: float | None = None
    doubtful: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Annotations:
    """Videos in the file's order, and the names behind the labels."""

    videos: tuple[Video, ...]
    classes: tuple[str, ...]

    @cached_property
    def by_id(self) -> dict[str, Video]:
        """Videos by their ids."""
        return {video.id: video for video in self.videos}

    def video(self, name: str) -> Video | None:
        """The video of an id, with ActivityNet's ``v_`` or without."""
        return self._by_bare_id.get(bare(name))

    @cached_property
    def _by_bare_id(self) -> dict[str, Video]:
        return {bare(video.id): video for video in self.videos}

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the subsets that have videos, in order of appearance."""
        return tuple(dict.fromkeys(video.subset for video in self.videos))

    def subset(self, name: str) -> Annotations:
        """The videos of one subset; the case of its name does not matter.

        Raises:
            EmptyError: no video is in it.
        """
        videos = tuple(video for video in self.videos if video.subset == name.lower())
        if not videos:
            raise EmptyError(
                f"no video is in subset {name!r}; there are {', '.join(map(repr, self.subsets)) or 'none'}"
            )
        return replace(self, videos=videos)

    def only(self, ids: Collection[str]) -> Annotations:
        """The videos among ``ids``, such as those that were found on disk."""
        wanted = {bare(name) for name in ids}
        return replace(self, videos=tuple(video for video in self.videos if bare(video.id) in wanted))

    def class_agnostic(self) -> Annotations:
        """The same segments, all of one class ``action``: what a localizer learns whose classes come from elsewhere."""
        videos = (replace(v, segments=tuple(replace(s, label=0) for s in v.segments)) for v in self.videos)
        return Annotations(tuple(videos), ("action",))


@dataclass(frozen=True)
class Fault:
    """Something wrong with a file: ``kind`` for counting, ``where`` within the file, and ``what`` was found and
    expected.
    """

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class AnnotationError(InputError, ValueError):
    """A file of annotations that does not hold what it should; :attr:`faults` has all that was found."""

    def __init__(self, path: Path | str, faults: Sequence[Fault]) -> None:
        self.path = Path(path)
        self.faults = tuple(faults)
        super().__init__(f"{path}: {listed(faults)}")


class AnnotationWarning(UserWarning):
    """Faults that were counted and passed over because the reader was told to."""


def listed(faults: Sequence[Fault]) -> str:
    """The first faults, one a line, and how many more there are."""
    if len(faults) == 1:
        return str(faults[0])
    return f"{len(faults)} faults\n" + "\n".join(shortened("  ", map(str, faults)))


def shortened(indent: str, lines: Iterable[str]) -> list[str]:
    """At most ``SHOWN`` lines, and how many more there are."""
    every = list(lines)
    more = [f"and {len(every) - SHOWN} more"] if len(every) > SHOWN else []
    return [f"{indent}{line}" for line in every[:SHOWN] + more]


def read(
    path: Path | str,
    *,
    subsets: Collection[str] | None = SUBSETS,
    classes: Sequence[str] | None = None,
    ignore: Collection[str] = ("Ambiguous",),
    lenient: bool = False,
    durations: bool = True,
    database: Mapping[str, Any] | None = None,
) -> Annotations:
    """Annotations of a file, checked.

    Args:
        path: a JSON file in ActivityNet's form.
        subsets: the names a video's subset may have, in any case; None for any name.
        classes: the names of the classes, in the order of their labels; without them, all labels of the file in
            alphabetical order.
        ignore: labels that mark no action (THUMOS-14 marks doubtful moments so); their segments stand apart.
            A label that is not among given classes is an error, ``lenient`` or not.
        lenient: pass over faults with one counted :class:`AnnotationWarning`. A segment outside its video's bounds then
            stays as it is, for results are scored against the file's times, and published durations are sometimes
            wrong; clips cut it. One without length or of an unknown label is left out; of two videos with one id the
            first is kept; a video with other faults is left out.
        durations, database: see :func:`parse`.

    Raises:
        AnnotationError: the file is no such JSON, or, unless ``lenient``, it has a fault: an unknown subset or label, a
            segment outside its video or one that does not end after it starts, a video that comes twice, a field that
            is missing or of the wrong type.
    """
    chosen: dict[str, Any] = {"subsets": subsets, "classes": classes, "ignore": ignore}
    annotations, faults = parse(path, **chosen, durations=durations, database=database)
    refuse(path, faults, classes is not None, lenient)
    if faults:
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(fault.kind for fault in faults).items())
        warnings.warn(
            f"{path}: passed over {len(faults)} faults ({counts}); first: {faults[0]}", AnnotationWarning, stacklevel=2
        )
    return annotations


def refuse(path: Path | str, faults: Sequence[Fault], mapped: bool, lenient: bool) -> None:
    """Raise for faults that are not passed over: see :func:`read`; ``mapped`` where classes were given.

    Raises:
        AnnotationError: there is one.
    """
    unknown = [fault for fault in faults if mapped and fault.kind == "unknown label"]
    if unknown or (faults and not lenient):
        raise AnnotationError(path, unknown or faults)


def parse(
    path: Path | str,
    *,
    subsets: Collection[str] | None = SUBSETS,
    classes: Sequence[str] | None = None,
    ignore: Collection[str] = ("Ambiguous",),
    durations: bool = True,
    database: Mapping[str, Any] | None = None,
) -> tuple[Annotations, tuple[Fault, ...]]:
    """What could be read of a file, as with ``lenient``, and every fault of it; arguments as in :func:`read`.

    With ``durations`` false they may be missing, and no segment is held against them. ``database`` is what the file
    holds, where that was read already, for its form is another one.

    Raises:
        AnnotationError: the file as a whole is not what it should be.
    """
    entries, faults = _load(Path(path)) if database is None else (list(database.items()), [])
    allowed = None if subsets is None else {name.lower() for name in subsets}
    names = tuple(classes) if classes is not None else _labels(entries, ignore)
    reader = _Reader(allowed, {name: label for label, name in enumerate(names)}, frozenset(ignore), durations, faults)
    videos = tuple(video for key, entry in entries if (video := reader.video(key, entry)) is not None)
    return Annotations(videos, names), tuple(faults)


def read_classes(path: Path | str) -> tuple[str, ...]:
    """Names of classes, one a line, in the order of their labels; a first line ``action`` is a heading."""
    lines = [line.strip() for line in Path(path).read_text(encoding="utf8").splitlines()]
    return tuple(line for i, line in enumerate(lines) if line and not (i == 0 and line == "action"))


def nearest(label: Any, classes: Iterable[str]) -> str:
    """The known class that is most like this one, as the end of a message."""
    known = list(classes)
    near = get_close_matches(str(label), known, 1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {len(known)} classes"


# -- the file as a whole -----------------------------------------------------------------------------------------------


class _Pairs(list):
    """A JSON object as it stands in the file: repeated keys are still there."""


def _plain(value: Any) -> Any:
    """The same with dicts for objects; of repeated keys the last counts, as JSON readers have it."""
    if isinstance(value, _Pairs):
        return {key: _plain(item) for key, item in value}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _load(path: Path) -> tuple[list[tuple[str, Any]], list[Fault]]:
    """((id, entry) of each video, faults): of videos that come twice, only the first."""
    try:
        data = json.loads(path.read_text(encoding="utf8"), object_pairs_hook=_Pairs)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(path, [Fault("json", "", f"this is not JSON: {error}")]) from None
    database = next((value for key, value in data if key == "database"), None) if isinstance(data, _Pairs) else None
    if not isinstance(database, _Pairs):
        raise AnnotationError(
            path,
            [Fault("missing", "", "expected an object with a field 'database' that holds the videos by their ids")],
        )
    if not database:
        raise AnnotationError(path, [Fault("empty", "", "its 'database' holds no video")])
    entries: dict[str, tuple[str, Any]] = {}
    faults = []
    for key, entry in database:
        if (name := bare(key)) in entries:
            faults.append(Fault("duplicate video", f"video {key!r}", f"it is there already, as {entries[name][0]!r}"))
        else:
            entries[name] = (key, _plain(entry))
    return list(entries.values()), faults


def _labels(entries: Iterable[tuple[str, Any]], ignore: Collection[str]) -> tuple[str, ...]:
    found = set()
    for _, entry in entries:
        annotations = entry.get("annotations") if isinstance(entry, dict) else None
        for annotation in annotations if isinstance(annotations, list) else ():
            if isinstance(annotation, dict) and isinstance(label := annotation.get("label"), str):
                found.add(label)
    return tuple(sorted(found - set(ignore)))


# -- one video ---------------------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite number, also where it is written as a string; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        result = float(value)
    except ValueError:
        return None
    return result if math.isfinite(result) else None


def span(value: Any) -> tuple[float, float] | None:
    """(start, end) of a list of two finite numbers; None for anything else."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    start, end = number(value[0]), number(value[1])
    return None if start is None or end is None else (start, end)


def _fps(entry: Mapping[str, Any], duration: float) -> float | None:
    """What a video's entry says of its frames per second: the number of frames counts before the rate, for rates are
    often rounded; extractors of features count frames.
    """
    counts = [count for name in ("frame", "frames") if (count := number(entry.get(name)))]
    rate = number(entry.get("fps"))
    if counts and counts[0] > 0 and math.isfinite(duration):
        return counts[0] / duration
    return rate if rate is not None and rate > 0 else None


@dataclass(frozen=True)
class _Reader:
    subsets: Collection[str] | None
    labels: Mapping[str, int]
    ignore: Collection[str]
    durations: bool
    faults: list[Fault]

    def video(self, key: str, entry: Any) -> Video | None:
        """The video of an entry, or None where it has a fault that leaves nothing of it."""
        where = f"video {key!r}"
        if not isinstance(entry, dict):
            return self._fault("missing", where, f"expected an object, got {entry!r}")
        needed = ("subset", "annotations", *(["duration"] if self.durations else []))
        if absent := [field for field in needed if field not in entry]:
            return self._fault("missing", where, f"it has no {' and no '.join(map(repr, absent))}")
        subset, duration = entry["subset"], number(entry.get("duration"))
        if duration is None and not self.durations:
            duration = math.inf
        if not isinstance(subset, str) or (self.subsets is not None and subset.lower() not in self.subsets):
            expected = f"; expected one of {', '.join(self.subsets)}" if self.subsets else ""
            return self._fault("unknown subset", where, f"unknown subset {subset!r}{expected}")
        if duration is None or duration <= 0:
            return self._fault("duration", where, f"its duration is {entry['duration']!r}; expected seconds above 0")
        if not isinstance(entry["annotations"], list):
            return self._fault("missing", where, f"its annotations are {entry['annotations']!r}; expected a list")
        segments = (
            self._segment(f"{where}, annotation {i}", item, duration) for i, item in enumerate(entry["annotations"])
        )
        kept = tuple(s for s in segments if s is not None)
        return Video(key, subset.lower(), duration, kept, _fps(entry, duration), self._doubtful(entry["annotations"]))

    def _doubtful(self, items: Iterable[Any]) -> tuple[tuple[float, float], ...]:
        ignored = (i for i in items if isinstance(i, dict) and str(i.get("label")) in self.ignore)
        return tuple(ends for item in ignored if (ends := span(item.get("segment"))))

    def _segment(self, where: str, item: Any, duration: float) -> Segment | None:
        if not isinstance(item, dict) or not {"label", "segment"} <= item.keys():
            return self._fault("missing", where, f"expected an object with 'label' and 'segment', got {item!r}")
        label, ends = item["label"], span(item["segment"])
        if isinstance(label, str) and label in self.ignore:
            return None
        if not isinstance(label, str) or label not in self.labels:
            return self._fault("unknown label", where, f"unknown label {label!r}; {nearest(label, self.labels)}")
        if ends is None:
            return self._fault(
                "segment", where, f"its segment is {item['segment']!r}; expected [start, end] in seconds"
            )
        if not ends[0] < ends[1]:
            return self._fault(
                "end before start",
                where,
                f"it starts at {ends[0]:g} s and ends at {ends[1]:g} s; expected an end after it",
            )
        if self.durations and (ends[0] < 0 or ends[1] > duration + ROUNDING):
            self._fault("outside", where, f"[{ends[0]:g}, {ends[1]:g}] s lies outside its video of {duration:g} s")
        return Segment(*ends, self.labels[label])

    def _fault(self, kind: str, where: str, what: str) -> None:
        self.faults.append(Fault(kind, where, what))
