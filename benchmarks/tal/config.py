"""Configurations: each file differs from what it begins with, and every key is known.

A configuration file is YAML. That of a data set holds what differs from the values in `schema`; that of an experiment
names what it begins with (``defaults: thumos14``, a file beside it: a data set, or an experiment on one) and holds what
differs from it; options of the command
line (``training.steps=100``) differ from both.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.tal.keys import known, nearest
from benchmarks.tal.schema import Config as Config
from benchmarks.tal.schema import ConfigError as ConfigError
from benchmarks.tal.schema import Tree

CONFIGS = Path(__file__).parent / "configs"


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        source: a YAML file, or the name of one in ``configs``.
        overrides: ``key=value``, where the key is dotted and the value YAML.

    Raises:
        ConfigError: no such file, an unknown key (the nearest known one is named), a missing key, or a value of another
            type.
    """
    path = _found(source)
    name, parts = {"name": path.stem}, [(path.name, _read(path))]
    while (base := parts[0][1].pop("defaults", None)) is not None:
        path = _found(path.parent / f"{base}.yaml", base)
        if path.name in (where for where, _ in parts):
            raise ConfigError(f"{path.name}: its defaults lead back to it; expected a data set at their end")
        parts.insert(0, (path.name, _read(path)))
    return _together([*parts[:-1], (parts[-1][0], {**name, **parts[-1][1]})], overrides)


def from_tree(tree: Tree, where: str, overrides: Sequence[str] = ()) -> Config:
    """A configuration from all of its keys and values, as `dataclasses.asdict` gives them; ``where`` they come from.

    Raises:
        ConfigError: as `load`.
    """
    return _together([(where, tree)], overrides)


def _together(parts: Sequence[tuple[str, Tree]], overrides: Sequence[str]) -> Config:
    tree: Tree = defaults_of(Config)
    for where, part in [*parts, *(("command line", _parsed(override)) for override in overrides)]:
        _forget_options(tree, part)
        merge(tree, part, known(tree, part), where)
    return typing.cast(Config, _build(Config, tree, ""))


def defaults_of(schema: type) -> Tree:
    """The values of a class of the schema where no file says otherwise, and of the classes in it."""
    tree: Tree = {}
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[field.name]):
            tree[field.name] = defaults_of(hints[field.name])
        elif field.default_factory is not dataclasses.MISSING:
            tree[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            tree[field.name] = field.default
    return tree


def _forget_options(tree: Tree, part: Tree) -> None:
    """Another backbone takes no options of the one before."""
    section, new = tree.get("backbone"), part.get("backbone")
    if (
        isinstance(section, dict)
        and isinstance(new, dict)
        and new.get("name", section.get("name")) != section.get("name")
    ):
        section["options"] = {}


def _found(source: str | Path, name: str | None = None) -> Path:
    path = Path(source)
    for candidate in (path, CONFIGS / path.name, CONFIGS / f"{path.name}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    wanted = name or path.name
    near = get_close_matches(path.stem, names, 1)
    raise ConfigError(
        f"configuration {wanted!r}: no such file; "
        + (f"did you mean {near[0]!r}?" if near else f"expected {', '.join(names)}")
    )


def _read(path: Path) -> Tree:
    tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path.name}: got {type(tree).__name__}; expected keys and values")
    return _nested(tree)


def _nested(tree: Mapping[str, Any]) -> Tree:
    """Dotted keys as sections: ``{"training.steps": 1}`` is ``{"training": {"steps": 1}}``."""
    result: Tree = {}
    for key, value in tree.items():
        *sections, leaf = str(key).split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        if isinstance(value, Mapping):
            value = {**place.get(leaf, {}), **_nested(value)}
        place[leaf] = value
    return result


def _parsed(override: str) -> Tree:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"command line: got {override!r}; expected key=value")
    try:
        return _nested({key.strip(): yaml.safe_load(value)})
    except yaml.YAMLError as error:
        raise ConfigError(f"command line: {key}: got {value!r}, which is no YAML value ({error})") from None


def merge(tree: Tree, differences: Mapping[str, Any], keys: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Write ``differences`` into ``tree``.

    Raises:
        ConfigError: a key that is not known.
    """
    for key, value in differences.items():
        dotted = f"{prefix}{key}"
        if dotted not in keys:
            raise ConfigError(f"{where}: unknown key {dotted!r}; {nearest(dotted, keys)}")
        if _is_section(keys[dotted]) and isinstance(value, Mapping):
            merge(tree.setdefault(key, {}), value, keys, where, f"{dotted}.")
        else:
            tree[key] = value


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or kind == Tree


# -- from a tree to the classes ----------------------------------------------------------------------------------------


def _build(schema: type, tree: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(schema)
    missing = [f"{prefix}{name}" for name in hints if name not in tree]
    if missing:
        raise ConfigError(
            f"missing keys: {', '.join(missing)}; a defaults file has them all, and an experiment names its defaults "
            "file"
        )
    return schema(**{name: _value(tree[name], kind, f"{prefix}{name}") for name, kind in hints.items()})


def _value(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``, one of: a dataclass, Any, int, float, str, bool, a dict, list[...], Literal[...], or a
    union of these, with None or without.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(typing.cast(type, kind), value, f"{key}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        fitting = [a for a in arguments if a is not types.NoneType and (typing.get_origin(a) or a) is type(value)]
        return None if value is None else _value(value, (fitting or list(arguments))[0], key)
    if origin is Literal and value in arguments:
        return value
    if origin is list and isinstance(value, list):
        return [_value(v, arguments[0], f"{key}[{i}]") for i, v in enumerate(value)]
    if kind is float:
        with_number = _number(value)
        if with_number is not None:
            return with_number
    if (origin is dict and isinstance(value, dict)) or (kind in (int, str, bool) and type(value) is kind):
        return value
    expected = (
        f"one of {', '.join(map(repr, arguments))}" if origin is Literal else getattr(kind, "__name__", str(kind))
    )
    raise ConfigError(f"{key}: got {value!r}; expected {expected}")


def _number(value: Any) -> float | None:
    """A number; YAML reads 1e-4, which has no point, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None
