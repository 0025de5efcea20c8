"""EPIC-KITCHENS-100, as its authors publish it (github.com/epic-kitchens/epic-kitchens-100-annotations): a folder with
``EPIC_100_train.csv``, ``EPIC_100_validation.csv``, ``EPIC_100_test_timestamps.csv`` (which has no labels, and may be
absent), ``EPIC_100_video_info.csv``, and the lists of verbs and nouns.

A row is a segment; it has a verb and a noun, each of which is a task of its own, and an action is the pair of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.tal.annotations import AnnotationError, Fault
from benchmarks.tal.forms.published import Published, table_of

FILES = {"training": "train", "validation": "validation", "testing": "test_timestamps"}
TIMES = ("video_id", "start_timestamp", "stop_timestamp")

Row = dict[str, str]


def verbs(folder: Path) -> Published:
    """Segments labelled by their verbs, as ``take``; the classes are all 97 of the list."""
    classes = _classes(folder, "verb")
    return Published(_database(folder, lambda row: classes[int(row["verb_class"])]), tuple(classes))


def nouns(folder: Path) -> Published:
    """Segments labelled by their nouns, as ``tap``; the classes are all 300 of the list."""
    classes = _classes(folder, "noun")
    return Published(_database(folder, lambda row: classes[int(row["noun_class"])]), tuple(classes))


def actions(folder: Path) -> Published:
    """Segments labelled by the numbers of verb and noun, as ``0,12``, the form in which the challenge takes actions."""
    return Published(_database(folder, lambda row: f"{int(row['verb_class'])},{int(row['noun_class'])}"), None)


def _classes(folder: Path, kind: str) -> list[str]:
    path = folder / f"EPIC_100_{kind}_classes.csv"
    rows = table_of(path, ("id", "key"))
    if [row["id"] for row in rows] != [str(i) for i in range(len(rows))]:
        raise AnnotationError(path, [Fault("classes", "", "its ids do not count from 0; expected one row for each id")])
    return [row["key"] for row in rows]


def _database(folder: Path, label: Callable[[Row], str]) -> dict[str, dict[str, Any]]:
    lengths = {row["video_id"]: row for row in table_of(folder / "EPIC_100_video_info.csv", ("video_id", "duration"))}
    found: dict[str, dict[str, Any]] = {}
    for subset, name in FILES.items():
        path, tested = folder / f"EPIC_100_{name}.csv", subset == "testing"
        if tested and not path.is_file():
            continue
        for row in table_of(path, TIMES if tested else (*TIMES, "verb_class", "noun_class")):
            info = lengths.get(row["video_id"], {})
            said = {key: info[key] for key in ("duration", "fps") if key in info}
            entry = found.setdefault(row["video_id"], {"subset": subset, **said, "annotations": []})
            if not tested:
                ends = [_seconds(path, row[key]) for key in TIMES[1:]]
                entry["annotations"].append({"segment": ends, "label": label(row)})
    return found


def _seconds(path: Path, stamp: str) -> float:
    """Of hours, minutes and seconds, ``00:01:02.50``."""
    parts = stamp.split(":")
    try:
        hours, minutes, seconds = map(float, parts)
    except ValueError:
        raise AnnotationError(path, [Fault("time", "", f"got {stamp!r}; expected hours:minutes:seconds")]) from None
    return round(3600 * hours + 60 * minutes + seconds, 3)
