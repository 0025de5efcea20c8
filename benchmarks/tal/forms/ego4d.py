"""Ego4D's moments queries, as its command-line tool delivers them: a folder with ``moments_train.json``,
``moments_val.json`` and ``moments_test_unannotated.json`` (which may be absent).

What is localized in are clips, cut from longer videos; times here are those within a clip. Of the moments of all
annotators only the primary ones count, those of the 110 classes of the task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.tal.annotations import AnnotationError, Fault
from benchmarks.tal.forms.published import Published, json_of

FILES = {"training": "train", "validation": "val", "testing": "test_unannotated"}


def read(folder: Path) -> Published:
    """Clips by their ids. Those of training and validation without a primary moment are left out."""
    database: dict[str, dict[str, Any]] = {}
    for subset, name in FILES.items():
        path = folder / f"moments_{name}.json"
        if subset == "testing" and not path.is_file():
            continue
        whole = json_of(path)
        try:
            for video in whole["videos"]:
                for clip in video["clips"]:
                    entry = _entry(clip, subset)
                    if entry["annotations"] or subset == "testing":
                        database[clip["clip_uid"]] = entry
        except (KeyError, TypeError) as error:
            form = "'videos' that hold 'clips', and these 'annotations' with 'labels'"
            raise AnnotationError(path, [Fault("form", "", f"expected {form}; got none at {error}")]) from None
    return Published(database, None)


def _entry(clip: dict[str, Any], subset: str) -> dict[str, Any]:
    start = max(float(clip["video_start_sec"]), 0.0)
    frames = int(clip["video_end_frame"]) - max(int(clip["video_start_frame"]), 0)
    moments = [
        {
            "segment": [round(moment[f"video_{end}_time"] - start, 4) for end in ("start", "end")],
            "label": moment["label"],
        }
        for annotator in (clip["annotations"] if subset != "testing" else ())
        for moment in annotator["labels"]
        if moment["primary"]
    ]
    duration = round(float(clip["video_end_sec"]) - start, 4)
    return {"subset": subset, "duration": duration, "frames": frames, "annotations": moments}
