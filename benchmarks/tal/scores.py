"""Video-level class scores from elsewhere: which classes a video shows, for localizers that only say when something
happens.

Three forms are known by their content:

- CUHK's, for ActivityNet: ``{"results": {id: [score of each class]}, "class": [names]}``;
- one class a video: ``{id: {"class": name, "score": number}}``;
- UntrimmedNet's, for THUMOS-14: an array ``.npy`` (videos, 101 classes of UCF-101), a row for each test video by its
  number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tal.annotations import bare
from benchmarks.tal.errors import InputError

UCF101 = {
    "BaseballPitch": 7,
    "BasketballDunk": 9,
    "Billiards": 12,
    "CleanAndJerk": 21,
    "CliffDiving": 22,
    "CricketBowling": 23,
    "CricketShot": 24,
    "Diving": 26,
    "FrisbeeCatch": 31,
    "GolfSwing": 33,
    "HammerThrow": 36,
    "HighJump": 40,
    "JavelinThrow": 45,
    "LongJump": 51,
    "PoleVault": 68,
    "Shotput": 79,
    "SoccerPenalty": 85,
    "TennisSwing": 92,
    "ThrowDiscus": 93,
    "VolleyballSpiking": 97,
}
"""The 20 classes of THUMOS-14's detection task by their numbers, from 1, among the 101 of its classification task."""

FORMS = "expected CUHK's form (with 'results' and 'class'), or a 'class' and a 'score' for each video"

Ranking = tuple[tuple[int, float], ...]


class ScoreError(InputError, ValueError):
    """A file of video-level scores that is of no known form, or names a class that is not among those expected."""


@dataclass(frozen=True)
class VideoScores:
    """For each video (label, score), best first."""

    ranking: Mapping[str, Ranking]

    def top(self, video_id: str, count: int = 2) -> Ranking:
        """The ``count`` best classes of a video as (label, score); fewer where fewer are known.

        Raises:
            KeyError: the video has no scores.
        """
        try:
            return self.ranking[bare(video_id)][:count]
        except KeyError:
            raise KeyError(
                f"no video-level scores for video {video_id!r}; {len(self.ranking)} videos have some"
            ) from None


def read(path: Path | str, classes: Sequence[str]) -> VideoScores:
    """Scores of a file; labels are indices into ``classes``.

    Raises:
        ScoreError: the file has none of the known forms, or a class that ``classes`` lacks.
    """
    labels = {name: label for label, name in enumerate(classes)}
    if str(path).endswith(".npy"):
        return VideoScores(_untrimmednet(path, labels))
    data = _json(path)
    if isinstance(data.get("results"), dict):
        return VideoScores(_cuhk(path, data, labels))
    if data and all(isinstance(v, dict) and {"class", "score"} <= v.keys() for v in data.values()):
        return VideoScores({bare(k): ((_label(path, v["class"], labels), float(v["score"])),) for k, v in data.items()})
    raise ScoreError(f"{path}: {FORMS}")


def classes(path: Path | str) -> tuple[str, ...]:
    """The names of classes in a file of scores, in its order.

    Raises:
        ScoreError: the file has none of the known forms.
    """
    if str(path).endswith(".npy"):
        return tuple(UCF101)
    data = _json(path)
    if isinstance(data.get("results"), dict):
        return tuple(map(str, data.get("class", data.get("classes", ()))))
    return tuple(dict.fromkeys(str(entry.get("class")) for entry in data.values() if isinstance(entry, dict)))


def _json(path: Path | str) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text(encoding="utf8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ScoreError(f"{path}: this is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ScoreError(f"{path}: {FORMS}; got {type(data).__name__}")
    return data


def _cuhk(path: Path | str, data: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, Ranking]:
    names = data.get("class", data.get("classes"))
    if not isinstance(names, list):
        raise ScoreError(f"{path}: it has 'results' but no 'class', the names of their columns")
    columns = [_label(path, name, labels) for name in names]
    ranking = {}
    for key, values in data["results"].items():
        row = np.asarray(values, dtype=np.float64).ravel()
        if len(row) != len(columns):
            raise ScoreError(
                f"{path}: video {key!r} has {len(row)} scores; expected one for each of {len(columns)} classes"
            )
        ranking[bare(key)] = _ranked(row, columns)
    return ranking


def _untrimmednet(path: Path | str, labels: Mapping[str, int]) -> dict[str, Ranking]:
    table = np.load(path)
    if table.ndim != 2 or table.shape[1] != 101:
        raise ScoreError(f"{path}: it has shape {table.shape}; expected (videos, 101), the classes of UCF-101")
    if absent := sorted(labels.keys() - UCF101.keys()):
        raise ScoreError(f"{path}: it has scores for the 20 classes of THUMOS-14 alone, not for {absent[0]!r}")
    columns = [UCF101[name] - 1 for name in labels]
    rows = table[:, columns].astype(np.float64)
    return {f"video_test_{number:07}": _ranked(row, list(labels.values())) for number, row in enumerate(rows, 1)}


def _ranked(row: Any, labels: Sequence[int]) -> Ranking:
    return tuple((labels[i], float(row[i])) for i in np.argsort(-row, kind="stable"))


def _label(path: Path | str, name: Any, labels: Mapping[str, int]) -> int:
    """The label of a class, whatever the case and the spaces of its name."""
    if name in labels:
        return labels[name]
    folded = {re.sub(r"[\W_]+", "", known).lower(): label for known, label in labels.items()}
    try:
        return folded[re.sub(r"[\W_]+", "", str(name)).lower()]
    except KeyError:
        raise ScoreError(
            f"{path}: unknown class {name!r}; expected one of {len(labels)}, such as {next(iter(labels), None)!r}"
        ) from None
