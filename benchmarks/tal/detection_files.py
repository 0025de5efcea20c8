"""Detections as they come: in memory, in JSON of ActivityNet's form, or in THUMOS's text.

    {"results": {"video id": [{"segment": [start, end], "label": name, "score": number}, …], …}}

    video_test_0000004 0.2 1.1 23 0.9

A line of text is a video, its start and end in seconds, a class and a score; a class is a name, or a number of
THUMOS-14's 20 among the 101 of UCF-101.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tal.annotations import Fault, bare, listed, number, span
from benchmarks.tal.errors import InputError
from benchmarks.tal.scores import UCF101


class PredictionError(InputError, ValueError):
    """Detections that are not of the form that is evaluated; :attr:`faults` has all that was found."""

    def __init__(self, path: Path | str | None, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(f"{path or 'detections'}: {listed(faults)}")


class Row(NamedTuple):
    """One detection; ``start`` and ``end`` in seconds."""

    label: str
    start: float
    end: float
    score: float


def read(source: Mapping[str, Any] | Path | str) -> dict[str, list[Row]]:
    """Detections by the ids of videos, as the source has them.

    Args:
        source: ``{id: [detection, …]}``, alone or as the ``"results"`` of an object; or the path of a file.

    Raises:
        PredictionError: there is no such file, or one is malformed: names the video, its place, what was expected; or
            a video comes twice, with ``v_`` and without.
    """
    path = source if isinstance(source, (str, Path)) else None
    faults: list[Fault] = []
    found: dict[str, list[Row]] = {}
    first: dict[str, str] = {}
    for key, items in _results(source, path).items():
        if (earlier := first.setdefault(bare(key), key)) != key:
            faults.append(Fault("twice", f"video {key!r}", f"it is there already, as {earlier!r}"))
        if not isinstance(items, (list, tuple)):
            faults.append(Fault("list", f"video {key!r}", f"expected a list of detections, got {items!r}"))
            continue
        rows = found[key] = []
        for i, item in enumerate(items):
            row = _row(item)
            if isinstance(row, str):
                faults.append(Fault("detection", f"video {key!r}, detection {i}", row))
            else:
                rows.append(row)
    if faults:
        raise PredictionError(path, faults)
    return found


def plain(path: Path) -> dict[str, Any]:
    """What a file of detections holds, as `read` checks it: lists of objects by the ids of videos."""
    read(path)
    return dict(_results(path, path))


def _results(source: Mapping[str, Any] | Path | str, path: Path | str | None) -> Mapping[str, Any]:
    data: Any = source
    if path is not None:
        text = _text(Path(path))
        if Path(path).suffix.lower() == ".txt":
            return _lines(path, text)
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PredictionError(path, [Fault("json", "", f"this is not JSON: {error}")]) from None
        if not isinstance(data, dict) or "results" not in data:
            raise PredictionError(
                path, [Fault("results", "", "expected an object with a field 'results' that holds detections by video")]
            )
    wrapped = path is not None or (isinstance(data, Mapping) and isinstance(data.get("results"), Mapping))
    results = data["results"] if wrapped else data
    if not isinstance(results, Mapping):
        raise PredictionError(
            path, [Fault("results", "", f"expected detections by the ids of videos, got {type(results).__name__}")]
        )
    return results


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise PredictionError(path, [Fault("json", "", f"this is not JSON: {error}")]) from None
    except OSError as error:
        raise PredictionError(path, [Fault("missing", "", f"it cannot be read ({error.strerror})")]) from None


# -- the text of THUMOS ------------------------------------------------------------------------------------------------


def _lines(path: Path | str, text: str) -> dict[str, list[dict[str, Any]]]:
    names = {str(value): name for name, value in UCF101.items()}
    found: dict[str, list[dict[str, Any]]] = {}
    for place, (video, start, end, label, score) in _fields(path, text):
        if label.isdecimal() and label not in names:
            raise PredictionError(
                path,
                [Fault("class", place, f"class {label} is none of THUMOS-14's 20 ({', '.join(names)}); or give names")],
            )
        item = {"segment": [start, end], "label": names.get(label, label), "score": score}
        found.setdefault(video, []).append(item)
    return found


def _fields(path: Path | str, text: str) -> Iterator[tuple[str, list[str]]]:
    """(place, its five fields) of each line."""
    for count, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if fields and len(fields) != 5:
            form = "five fields: video, start and end in seconds, class (number or name), score"
            raise PredictionError(path, [Fault("line", f"line {count}", f"expected {form}; got {line!r}")])
        if fields:
            yield f"line {count}", fields


# -- one detection -----------------------------------------------------------------------------------------------------


def _row(item: Any) -> Row | str:
    """A detection, or what is wrong with it."""
    if not isinstance(item, Mapping):
        return f"expected an object with 'segment', 'label' and 'score', got {item!r}"
    if absent := [field for field in ("segment", "label", "score") if field not in item]:
        return f"it has no {' and no '.join(map(repr, absent))}"
    ends, score = span(_plain(item["segment"])), number(_plain(item["score"]))
    if ends is None:
        return f"its segment is {item['segment']!r}; expected [start, end], two finite numbers of seconds"
    if score is None:
        return f"its score is {item['score']!r}; expected a finite number"
    if not isinstance(item["label"], str):
        return f"its label is {item['label']!r}; expected the name of a class"
    return Row(item["label"], *ends, score)


def _plain(value: Any) -> Any:
    """Numbers and lists of arrays and tensors."""
    return value.tolist() if hasattr(value, "tolist") else value
