"""What a reader of published annotations gives, and how it reads tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.tal.annotations import AnnotationError, Fault


class Published(NamedTuple):
    """Annotations in ActivityNet's form.

    Attributes:
        database: entries by the ids of videos: ``subset``, ``annotations``, and ``duration`` (seconds), ``frames`` and
            ``fps`` where the data set says them.
        classes: names of the classes in the order of their labels, where the data set lists them.
    """

    database: dict[str, dict[str, Any]]
    classes: tuple[str, ...] | None


def text_of(path: Path) -> str:
    """What a file of a data set holds.

    Raises:
        AnnotationError: it is not there, or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(path, [Fault("missing", "", f"it cannot be read ({error})")]) from None


def json_of(path: Path) -> Any:
    """A JSON file of a data set.

    Raises:
        AnnotationError: it is not there, or none.
    """
    try:
        return json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise AnnotationError(path, [Fault("json", "", f"this is not JSON: {error}")]) from None


def table_of(path: Path, columns: Collection[str]) -> list[dict[str, str]]:
    """The rows of a CSV file of a data set, which has these columns, and perhaps more.

    Raises:
        AnnotationError: it is not there, or lacks one of them.
    """
    rows = list(csv.DictReader(text_of(path).splitlines(keepends=True)))
    if absent := [name for name in columns if name not in (rows[0] if rows else ())]:
        raise AnnotationError(path, [Fault("columns", "", f"it has no column {', '.join(map(repr, absent))}")])
    return rows
