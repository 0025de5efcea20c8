"""THUMOS-14 and MultiTHUMOS, as their authors publish them: below a folder, for each class a text file, and in it on
each line a video, a start and an end in seconds.

    BaseballPitch_val.txt, BaseballPitch_test.txt ..         THUMOS-14, ambiguous moments among them
    class_list.txt, annotations/BaseballPitch.txt ..         MultiTHUMOS, the same 413 videos with 65 classes

They say neither durations nor frame rates: ``data.lengths`` is where these come from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.tal.annotations import AnnotationError, Fault, span
from benchmarks.tal.forms.published import Published, text_of

LIST = "class_list.txt"
OTHERS = (LIST, "detclasslist.txt", "readme.txt")
"""Text files that hold no segments."""

SUBSET = re.compile(r"video_(validation|test)_\d+")


def read(folder: Path) -> Published:
    """Videos by their ids; their subset, ``validation`` or ``test``, is part of these."""
    files = sorted(path for path in folder.rglob("*.txt") if path.name.lower() not in OTHERS)
    if not files:
        raise AnnotationError(folder, [Fault("missing", "", "it holds no text files; expected one for each class")])
    database: dict[str, dict[str, Any]] = {}
    for path in files:
        label = re.sub("_(val|test)$", "", path.stem)
        for count, line in enumerate(text_of(path).splitlines(), 1):
            if not (fields := line.split()):
                continue
            ends, subset = span(fields[1:]), SUBSET.fullmatch(fields[0])
            if ends is None or subset is None:
                form = "video_validation_N or video_test_N, and a start and an end in seconds"
                raise AnnotationError(path, [Fault("line", f"line {count}", f"expected {form}; got {line!r}")])
            entry = database.setdefault(fields[0], {"subset": subset[1], "annotations": []})
            entry["annotations"].append({"segment": list(ends), "label": label})
    return Published(dict(sorted(database.items())), _classes(folder))


def _classes(folder: Path) -> tuple[str, ...] | None:
    """Of a file with a number and a name on each line, where there is one."""
    path = next(iter(sorted(folder.rglob(LIST))), None)
    return None if path is None else tuple(line.split()[-1] for line in text_of(path).splitlines() if line.strip())
