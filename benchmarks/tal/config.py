"""Configurations: one defaults file per data set, experiments as differences from it, every key known.

A configuration file is YAML. It names its defaults file (``defaults: thumos14``, a file beside it) and holds what
differs from it; options of the command line (``training.steps=100``) differ from both. The classes below are the
schema. They have no default values, so that each value stands in one file. Options of a network are those of its
constructor.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

CONFIGS = Path(__file__).parent / "configs"

Tree = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that is not understood: says where, what was found, and what was expected."""


@dataclass(frozen=True)
class Features:
    """Extracted features as input.

    Attributes:
        path: folder or HDF5 file, relative to ``data.root``; null: there are none, and the backbone makes them from
            videos.
        channels: of a row. fps: of the videos, or null: from the number of rows and the duration.
        stride, offset: frames from row to row, and to the moment that the first one stands for.
    """

    path: str | None
    channels: int
    fps: float | None
    stride: float
    offset: float


@dataclass(frozen=True)
class Data:
    """Where videos and annotations lie. Paths are relative to ``root`` (null: the environment variable REVWIRE_DATA).

    Attributes:
        annotations: JSON in ActivityNet's form; for classification, null.
        videos: folder of videos, by id; for classification, with one folder per class in it.
        features: extracted features, where they stand for the videos.
        drawn: options of `synthetic.synthesize`, by which data are made where there are none, in the annotations'
            folder; or {}.
        training_subset, test_subset: names in the annotations; several by commas.
        lenient: count faulty annotations instead of refusing them.
        exclude: JSON list of ids that are left out, or null.
        class_scores: file of video-level scores that are fused with detections, or null; of its best
            ``class_scores_top`` classes.
        workers: processes that decode videos, per training process.
        keep: whether videos stay in memory, whole, once they are decoded: for small data that is gone through many
            times.
    """

    root: str | None
    annotations: str | None
    videos: str | None
    features: Features
    drawn: Tree
    training_subset: str
    test_subset: str
    lenient: bool
    exclude: str | None
    class_scores: str | None
    class_scores_top: int
    workers: int
    keep: bool


@dataclass(frozen=True)
class Sampling:
    """What one clip is.

    Attributes:
        method: ``resize``, the whole video as ``frames`` frames; or ``window``, every ``stride``-th frame, cut at
            random for training and by windows for testing that overlap by ``overlap`` of their length.
        frames: of a clip.
        steps: of the localizer's time axis per clip.
        stride: video frames per sampled frame (windows).
        overlap: of test windows, as a share of their length.
        truncation: shortest share of a training segment that may be left by a cut, below which it is dropped.
        short_side, crop: pixels; training videos are scaled to this short side, test videos to one of ``crop``, then
            cut to squares.
        scale: share of the area that a random cut takes before it is scaled to ``crop``, from and to; null: it is
            ``crop`` pixels wide.
        flip: whether training clips are mirrored at random. jitter: strength of random brightness, contrast and
            saturation.
    """

    method: Literal["resize", "window"]
    frames: int
    steps: int
    stride: int
    overlap: float
    truncation: float
    short_side: int
    crop: int
    scale: list[float] | None
    flip: bool
    jitter: float


@dataclass(frozen=True)
class Backbone:
    """The video network.

    Attributes:
        name: see ``backbones``. weights: checkpoint, relative to ``data.root``, or null for random weights.
        frozen: no parameter of it trains, and it stores nothing. freeze_norms: its norms neither train nor update
            statistics.
        chunk: frames of a clip that go through at once, or null for all of them.
        options: of its constructor.
    """

    name: str
    weights: str | None
    frozen: bool
    freeze_norms: bool
    chunk: int | None
    options: Tree


@dataclass(frozen=True)
class Training:
    """How long and how.

    Attributes:
        steps: optimizer steps. batch: clips per step, over all processes. accumulate: forward passes that a step sums
            up.
        lr: of the localizer. backbone_lr: of the backbone's last layer; ``layer_decay`` is the factor per layer towards
            its input.
        weight_decay: of all but norms and biases. warmup: steps of linear warm-up, before a cosine that ends at
            ``final`` x the rate after ``schedule`` steps (0: at the last one).
        clip: largest gradient norm. ema: decay of the averaged weights that are evaluated, or null for none.
        precision: Lightning's name: 32-true, bf16-mixed, 16-mixed, 64-true.
        save_every, test_every: steps between checkpoints, and between evaluations (0: at the end only).
        strategy, devices, nodes: auto, ddp or fsdp; processes per node; nodes.
    """

    steps: int
    batch: int
    accumulate: int
    lr: float
    backbone_lr: float
    layer_decay: float
    weight_decay: float
    warmup: int
    schedule: int
    final: float
    clip: float
    ema: float | None
    precision: str
    save_every: int
    test_every: int
    log_every: int
    strategy: Literal["auto", "ddp", "fsdp"]
    accelerator: Literal["auto", "cpu", "cuda"]
    devices: int
    nodes: int


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        name: of the folder of its results below ``output``. task: localization, or classification of whole clips (the
            paper's first stage).
        memory: how activations are kept: ``stored``, ``checkpoint``, or a coupling of `revwire.convert` (``bdia``,
            ``re2tal``, ...), in chunks, too: ``re2tal+8chunks``; with the blocks that cannot be rewired checkpointed:
            ``re2tal+stays``.
        localizer: ``actionformer`` or ``vsgn``, whose options stand in the section of that name.
        class_agnostic: localize one class "action"; classes come from ``data.class_scores``.
        suppression: how overlapping detections are thinned out, the options of `suppression.Suppression`.
        measure: at the end, count the bytes of a training step by the allocator's reports (on the CPU they are not to
            be had in passing).
        thresholds: temporal overlaps (tIoU) of the evaluation.
    """

    name: str
    task: Literal["localization", "classification"]
    seed: int
    memory: str
    output: str
    data: Data
    sampling: Sampling
    backbone: Backbone
    localizer: Literal["actionformer", "vsgn"]
    class_agnostic: bool
    actionformer: Tree
    vsgn: Tree
    training: Training
    suppression: Tree
    thresholds: list[float]
    measure: bool

    @property
    def folder(self) -> Path:
        """Where this run's results lie."""
        memory = "frozen" if self.backbone.frozen else self.memory.replace(":", "-").replace("/", "_")
        return Path(self.output, self.name, memory, f"seed{self.seed}")

    def to_yaml(self) -> str:
        """The whole configuration, as a file that `load` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


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
    differences = _read(path)
    base = differences.pop("defaults", None)
    defaults = {} if base is None else _read(_found(path.parent / f"{base}.yaml", base))
    if "defaults" in defaults:
        raise ConfigError(f"{base}.yaml: got defaults of defaults; expected a complete file")
    tree: Tree = {"name": path.stem}
    parts = [
        (f"{base}.yaml", defaults),
        (path.name, differences),
        *(("command line", _parsed(override)) for override in overrides),
    ]
    for where, part in parts:
        _forget_options(tree, part)
        merge(tree, part, _known(tree, part), where)
    return typing.cast(Config, _build(Config, tree, ""))


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


# -- which keys there are ----------------------------------------------------------------------------------------------


def _known(*trees: Tree) -> dict[str, Any]:
    """Dotted key -> its type, sections included; those of free options are for the backbone that the last tree to do so
    names.
    """
    from benchmarks.tal import networks  # imports model zoos, which a look at a configuration's text does not need

    sections = [tree.get("backbone") for tree in trees]
    names = [section["name"] for section in sections if isinstance(section, dict) and "name" in section]
    keys = dict(_keys(Config, ""))
    for section, constructor in networks.constructors(str(names[-1]) if names else None).items():
        keys |= {f"{section}.{parameter}": Any for parameter in parameters(constructor)}
    return keys


def _keys(schema: type, prefix: str) -> Iterable[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(schema).items():
        yield f"{prefix}{name}", kind
        if dataclasses.is_dataclass(kind):
            yield from _keys(typing.cast(type, kind), f"{prefix}{name}.")


GIVEN = ("name", "state", "in_channels", "num_classes", "folder", "progress")
"""Arguments of constructors that follow from other keys."""


def parameters(constructor: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments that a configuration may set."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        name for name, p in inspect.signature(constructor).parameters.items() if p.kind in kinds and name not in GIVEN
    )


def merge(tree: Tree, differences: Mapping[str, Any], known: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Write ``differences`` into ``tree``.

    Raises:
        ConfigError: a key that is not known.
    """
    for key, value in differences.items():
        dotted = f"{prefix}{key}"
        if dotted not in known:
            raise ConfigError(f"{where}: unknown key {dotted!r}; {nearest(dotted, known)}")
        if _is_section(known[dotted]) and isinstance(value, Mapping):
            merge(tree.setdefault(key, {}), value, known, where, f"{dotted}.")
        else:
            tree[key] = value


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or kind == Tree


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
    """``value`` as ``kind``, one of: a dataclass, Any, int, float, str, bool, a dict, list[...], Literal[...], or one
    of these or None.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(typing.cast(type, kind), value, f"{key}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _value(value, next(a for a in arguments if a is not types.NoneType), key)
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
