"""Charades, as its authors publish it: a folder with ``Charades_v1_train.csv``, ``Charades_v1_test.csv`` and
``Charades_v1_classes.txt``.

A row is a video, ``length`` its seconds, and ``actions`` a list such as ``c092 11.90 21.20;c147 0.00 12.60``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tal.annotations import AnnotationError, Fault, span
from benchmarks.tal.forms.published import Published, table_of, text_of

FILES = {"training": "train", "testing": "test"}


def read(folder: Path) -> Published:
    """Videos by their ids, actions by their names; the classes are all 157 of the list."""
    lines = text_of(folder / "Charades_v1_classes.txt").splitlines()
    names = dict(line.split(maxsplit=1) for line in lines if line.strip())
    database: dict[str, dict[str, Any]] = {}
    for subset, name in FILES.items():
        path = folder / f"Charades_v1_{name}.csv"
        for row in table_of(path, ("id", "actions", "length")):
            actions = [_action(path, row["id"], text, names) for text in row["actions"].split(";") if text.strip()]
            database[row["id"]] = {"subset": subset, "duration": row["length"], "annotations": actions}
    return Published(database, tuple(names.values()))


def _action(path: Path, video: str, text: str, names: dict[str, str]) -> dict[str, Any]:
    code, *times = text.split()
    ends = span(times)
    if ends is None or code not in names:
        form = "a class of Charades_v1_classes.txt, a start and an end in seconds"
        raise AnnotationError(path, [Fault("actions", f"video {video!r}", f"expected {form}; got {text!r}")])
    return {"segment": list(ends), "label": names[code]}
