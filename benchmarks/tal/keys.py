"""Which keys a configuration may have: those of its classes, and the arguments of what a section has options for."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from benchmarks.tal.backbones import NETWORKS
from benchmarks.tal.localizers import LOCALIZERS
from benchmarks.tal.schema import Config, ConfigError, Tree
from benchmarks.tal.suppression import Suppression
from benchmarks.tal.synthetic import synthesize

GIVEN = ("name", "state", "in_channels", "num_classes", "folder", "progress")
"""Arguments of constructors that follow from other keys."""

OPTIONS: dict[str, Callable[..., Any]] = {"suppression": Suppression, "data.drawn": synthesize, **LOCALIZERS}
"""What takes the options of a section, whatever the backbone is."""


def known(*trees: Tree) -> dict[str, Any]:
    """Dotted key -> its type, sections included; those of free options are for the backbone that the last tree to do so
    names.

    Raises:
        ConfigError: there is no such backbone.
    """
    sections = [tree.get("backbone") for tree in trees]
    names = [str(section["name"]) for section in sections if isinstance(section, dict) and "name" in section]
    if names and names[-1] not in NETWORKS:
        raise ConfigError(f"backbone.name: got {names[-1]!r}; {nearest(names[-1], NETWORKS)}")
    of_backbone = {"backbone.options": NETWORKS[names[-1]]} if names else {}
    keys = dict(_keys(Config, ""))
    for section, constructor in (of_backbone | OPTIONS).items():
        keys |= {f"{section}.{parameter}": Any for parameter in parameters(constructor)}
    return keys


def _keys(schema: type, prefix: str) -> Iterable[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(schema).items():
        yield f"{prefix}{name}", kind
        if dataclasses.is_dataclass(kind):
            yield from _keys(typing.cast(type, kind), f"{prefix}{name}.")


def parameters(constructor: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that a configuration may set."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        name for name, p in inspect.signature(constructor).parameters.items() if p.kind in kinds and name not in GIVEN
    )


def nearest(dotted: str, known: Iterable[str]) -> str:
    """The known key that is most like this one: among its siblings, else by its last part anywhere."""
    names = list(known)
    section, _, leaf = dotted.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in names if k.rpartition(".")[0] == section}
    anywhere = {k.rpartition(".")[2]: k for k in reversed(names)}
    tries = [(siblings, 0.6), (anywhere, 1.0), (anywhere, 0.6)]
    for candidates, likeness in tries if section else [tries[1], tries[0], tries[2]]:
        near = get_close_matches(leaf, candidates, 1, likeness)
        if near:
            return f"did you mean {candidates[near[0]]!r}?"
    return f"expected one of {', '.join(sorted(siblings.values())) or 'the keys of its section'}"
