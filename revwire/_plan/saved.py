"""Immutable data as plain data, which JSON can hold, and back: a plan in a file.

What is written follows from the fields of the dataclasses alone, so that a field more is only data: a file that was
written before it was there is read with its default, and one with a field that is not known here is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from revwire._errors import ConversionError, CouplingError
from revwire.couplings import Coupling, coupling_from

SCHEMA = 1
"""The version of the form; it grows when a field changes its meaning."""


AnyPath = str | PathLike[str]


T = TypeVar("T")


def headed(value: Any) -> dict[str, Any]:
    """A dataclass as plain data, with the versions of the form and of revwire in front."""
    return {"schema": SCHEMA, "revwire": _version(), **plain(value)}


def _version() -> str:
    try:
        return version("revwire")
    except PackageNotFoundError:  # it runs from its sources
        return "unknown"


def plain(value: Any) -> Any:
    """A value as dicts, lists, numbers and strings; a coupling as `Coupling.to_plain` has it."""
    if isinstance(value, Coupling):
        return value.to_plain()
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: plain(getattr(value, name)) for name in value._fields}
    return [*map(plain, value)] if isinstance(value, (list, tuple)) else value


def parsed_file(path: AnyPath) -> Any:
    """What a JSON file holds.

    Raises:
        ConversionError: it is none.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(
            f"{path}: got a file that is no JSON ({error}); expected one that Plan.save wrote"
        ) from None


def written_file(path: AnyPath, data: Any) -> None:
    """Write plain data to a JSON file."""
    Path(path).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def beheaded(kind: type[T], data: Any, where: str, couplings: Iterable[Coupling] = (), leaves: Iterable[str] = ()) -> T:
    """The dataclass of which `headed` made this.

    Args:
        kind: the dataclass.
        data: plain data.
        where: what errors call it.
        couplings: those whose spellings revwire does not know.
        leaves: keys that are there for readers alone.

    Raises:
        ConversionError: it is of another version, or something else.
    """
    if not isinstance(data, Mapping) or "schema" not in data:
        raise ConversionError(
            f"{where}: got data without a schema version; expected a plan, as Plan.save and Plan.to_dict give it"
        )
    if data["schema"] != SCHEMA:
        raise ConversionError(
            f"{where}: got schema version {data['schema']!r}, written by revwire {data.get('revwire', 'unknown')}; "
            f"expected {SCHEMA}; read it with that version of revwire, or make the plan again with revwire.plan"
        )
    own = {name: value for name, value in data.items() if name not in ("schema", "revwire", *leaves)}
    found: T = _Reader(where, {c.name: c for c in couplings}).read(kind, own, "plan")
    return found


class _Reader:
    """Reads plain data as what the annotations of dataclasses say."""

    def __init__(self, where: str, couplings: Mapping[str, Coupling]) -> None:
        self.where, self.couplings = where, couplings

    def read(self, kind: Any, data: Any, place: str) -> Any:
        origin = get_origin(kind)
        if kind is Any:
            return tuple(self.read(Any, d, place) for d in data) if isinstance(data, (list, tuple)) else data
        if origin in (Union, UnionType):
            (other,) = (k for k in get_args(kind) if k is not NoneType)
            return None if data is None else self.read(other, data, place)
        if origin is tuple:
            return self._tuple(get_args(kind), data, place)
        if origin is Literal:
            return data if data in get_args(kind) else self._refuse(data, place, f"one of {list(get_args(kind))}")
        if kind is Coupling:
            return self._coupling(data, place)
        if is_dataclass(kind) or hasattr(kind, "_fields"):
            return self._fields(kind, data, place)
        if kind is float and type(data) is int:
            return float(data)
        return data if type(data) is kind else self._refuse(data, place, kind.__name__)

    def _tuple(self, kinds: tuple[Any, ...], data: Any, place: str) -> tuple[Any, ...]:
        if not isinstance(data, (list, tuple)):
            self._refuse(data, place, "a list")
        each = kinds[:1] * len(data) if kinds[-1] is Ellipsis else kinds
        if len(each) != len(data):
            self._refuse(data, place, f"a list of {len(each)}")
        return tuple(self.read(k, d, f"{place}[{i}]") for i, (k, d) in enumerate(zip(each, data, strict=True)))

    def _fields(self, kind: Any, data: Any, place: str) -> Any:
        if not isinstance(data, Mapping):
            self._refuse(data, place, "a dict")
        kinds = get_type_hints(kind)
        if is_dataclass(kind):
            optional = {f.name for f in fields(kind) if f.default is not MISSING}
        else:
            optional = {*kind._field_defaults}
        unknown = [name for name in data if name not in kinds]
        missing = [name for name in kinds if name not in data and name not in optional]
        if unknown or missing:
            what = f"{unknown[0]!r}, which is not known here" if unknown else f"no {missing[0]!r}"
            raise ConversionError(
                f"{self.where}: got {place} with {what}; expected {sorted(kinds)}; if another version of revwire wrote "
                "it, make the plan again with revwire.plan"
            )
        return kind(**{name: self.read(kinds[name], value, f"{place}.{name}") for name, value in data.items()})

    def _coupling(self, data: Any, place: str) -> Coupling:
        if isinstance(data, str) and data in self.couplings:
            return self.couplings[data]
        try:
            return coupling_from(data if isinstance(data, Mapping) else str(data))
        except CouplingError:
            raise CouplingError(
                f"{self.where}: got {place} {data!r}, which is no coupling of revwire's; expected a spelling that "
                "convert takes; pass the coupling itself: Plan.load(path, couplings=[...])"
            ) from None

    def _refuse(self, data: Any, place: str, expected: str) -> Any:
        raise ConversionError(f"{self.where}: got {place} = {data!r}; expected {expected}")
