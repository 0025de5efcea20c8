"""What a configuration says, key by key. Values that stand here hold where no file says otherwise; what has none here
each data set says. Options of a network are those of its constructor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks.tal.errors import InputError
from benchmarks.tal.normalization import MEAN, STD

Tree = dict[str, Any]

Protocol = Literal["activitynet", "thumos14"]
"""Of mean average precision; see `evaluation.evaluate`."""


Form = Literal["activitynet", "charades", "ego4d_mq", "epic_verb", "epic_noun", "epic_action", "thumos"]
"""Of annotations; see `forms`."""


class ConfigError(InputError, ValueError):
    """A configuration that is not understood: says where, what was found, and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Extracted features as input.

    Attributes:
        path: folder or HDF5 file, relative to ``data.root``; null: there are none, and the backbone makes them from
            videos.
        channels: of a row. fps: of the videos, or null: of each video what the annotations say (``fps``, or ``frames``
            by ``duration``), else what its rows and its duration make it.
        stride: frames from row to row. snippet: frames that a row sees; null: twice the offset, or the stride.
        offset: frames to the moment that the first row stands for; null: half a snippet, or none.
        whole_frames: cut the times of actions to whole frames of the video, as OpenTAD does for THUMOS-14.
    """

    path: str | None = None
    channels: int = 0
    fps: float | None = None
    stride: float = 1.0
    snippet: float | None = None
    offset: float | None = None
    whole_frames: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where videos and annotations lie. Paths are relative to ``root`` (null: the environment variable REVWIRE_DATA).

    Attributes:
        annotations: JSON in ActivityNet's form; for classification, null. form: another one, in which data sets
            publish theirs, in a folder.
        lengths: JSON in ActivityNet's form with the seconds, and the frame rates, of videos of which the annotations
            say none; null: files of videos say them, or ``features.fps``.
        videos: folder of videos, by id; for classification, with one folder per class in it.
        features: extracted features, where they stand for the videos.
        drawn: options of `synthetic.synthesize`, by which data are made where there are none, in the annotations'
            folder; or {}.
        training_subset, test_subset: names in the annotations; several by commas.
        classes: names of the classes in the order of their labels: a list, or a file with one a line. A label that is
            not among them is an error. Null: those that the data set lists beside its annotations, or all labels of
            these, in alphabetical order.
        only_found: score, of the test videos, only those that have a file; the others count as missed otherwise.
        lenient: count faulty annotations instead of refusing them.
        exclude: JSON list of ids that are left out, or null.
        class_scores: file of video-level scores that are fused with detections, or null; of its best
            ``class_scores_top`` classes.
        workers: processes that decode videos, per training process.
        keep: whether videos stay in memory, whole, once they are decoded: for small data that is gone through many
            times.
    """

    root: str | None = None
    annotations: str | None
    form: Form = "activitynet"
    lengths: str | None = None
    videos: str | None
    features: Features
    drawn: Tree = field(default_factory=dict)
    training_subset: str = "training"
    test_subset: str = "validation"
    classes: str | list[str] | None = None
    only_found: bool = False
    lenient: bool = True
    exclude: str | None = None
    class_scores: str | None = None
    class_scores_top: int = 2
    workers: int = 4
    keep: bool = False


@dataclass(frozen=True, kw_only=True)
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
        flip: whether training clips are mirrored at random. operations: how many of RandAugment's are drawn for each
            clip, of magnitude 9 of 10. jitter: strength of random brightness, contrast and saturation.
    """

    method: Literal["resize", "window"] = "window"
    frames: int
    steps: int
    stride: int = 2
    overlap: float = 0.5
    truncation: float = 0.5
    short_side: int = 256
    crop: int = 224
    scale: list[float] | None = field(default_factory=lambda: [0.08, 1.0])
    flip: bool = True
    operations: int = 0
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The video network.

    Attributes:
        name: see ``backbones``. weights: checkpoint, relative to ``data.root``, or null for random weights.
        frozen: no parameter of it trains, and it stores nothing. freeze_norms: its norms neither train nor update
            statistics.
        chunk: frames of a clip that go through at once, or null for all of them.
        mean, std: by which pixels (0 to 255) are normalised: red, green, blue.
        options: of its constructor.
    """

    name: str = "video_swin_t"
    weights: str | None = None
    frozen: bool = False
    freeze_norms: bool = False
    chunk: int | None = None
    mean: list[float] = field(default_factory=lambda: list(MEAN))
    std: list[float] = field(default_factory=lambda: list(STD))
    options: Tree = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
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
    accumulate: int = 1
    lr: float = 1e-3
    backbone_lr: float
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup: int
    schedule: int = 0
    final: float = 0.0
    clip: float = 1.0
    ema: float | None = None
    precision: str = "bf16-mixed"
    save_every: int
    test_every: int = 0
    log_every: int = 50
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run.

    Attributes:
        name: of the folder of its results below ``output``. task: localization, or classification of whole clips (the
            paper's first stage).
        memory: how activations are kept: ``stored``, ``checkpoint``, ``leanest`` (`revwire.convert` as it is called
            plainly), or a coupling (``bdia``, ``re2tal``, ...), in chunks, too: ``re2tal+8chunks``; with the blocks
            that cannot be rewired checkpointed: ``re2tal+stays``; with streams of floats: ``re2tal+float``. Any of
            them with ``+clips``: the backbone sees clips of ``backbone.chunk`` frames one after the other, keeps none,
            and computes each again in backward.
        localizer: ``actionformer``, ``tridet`` or ``vsgn``, whose options stand in the section of that name.
        class_agnostic: localize one class "action"; classes come from ``data.class_scores``.
        suppression: how overlapping detections are thinned out, the options of `suppression.Suppression`.
        measure: at the end, count the bytes of a training step by the allocator's reports (on the CPU they are not to
            be had in passing).
        thresholds: temporal overlaps (tIoU) of the evaluation. recall: and for each k here, recall by the best
            k x segments detections of each class and video, at these overlaps.
    """

    name: str
    task: Literal["localization", "classification"]
    seed: int = 0
    memory: str
    output: str = "runs"
    data: Data
    sampling: Sampling
    backbone: Backbone
    localizer: Literal["actionformer", "tridet", "vsgn"] = "actionformer"
    class_agnostic: bool = False
    actionformer: Tree = field(default_factory=dict)
    tridet: Tree = field(default_factory=dict)
    vsgn: Tree = field(default_factory=dict)
    training: Training
    suppression: Tree = field(default_factory=dict)
    thresholds: list[float]
    recall: list[int] = field(default_factory=list)
    measure: bool = False

    @property
    def folder(self) -> Path:
        """Where this run's results lie."""
        memory = "frozen" if self.backbone.frozen else self.memory.replace(":", "-").replace("/", "_")
        return Path(self.output, self.name, memory, f"seed{self.seed}")

    def to_yaml(self) -> str:
        """The whole configuration, as a file that `load` reads back."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)
