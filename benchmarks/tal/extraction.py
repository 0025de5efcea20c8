"""Features of videos by a backbone, made once: a row for each step that a localizer would see, or for each snippet.

Into a folder: ``rows/ID.npy`` or ``rows.h5``; ``extraction.jsonl``, which says how, and of each video that is done its
frames per second; and ``config.yaml``, by which a localizer trains on them. An extraction that was broken off goes on
with the next video.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader, Subset

from benchmarks.tal import loading, networks, videos
from benchmarks.tal import sampling as cuts
from benchmarks.tal.annotations import Annotations, Video, bare
from benchmarks.tal.backbones import Backbone
from benchmarks.tal.checkpoints import Trained
from benchmarks.tal.clips import Batch, Clip, Clips, collate
from benchmarks.tal.features import LOG
from benchmarks.tal.pixels import centre
from benchmarks.tal.schema import Config, ConfigError, Features

Array = NDArray[np.float32]


@dataclass
class Extracted:
    """What came of it.

    Attributes:
        path: of the rows. rows: how many, of all videos that were made now. channels: of a row.
        done: videos that were made now. before: that were there already.
        missing: videos without a file. unreadable: and those whose file cannot be read, with the reason.
    """

    path: Path
    rows: int = 0
    channels: int = 0
    done: int = 0
    before: int = 0
    missing: tuple[str, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.done} videos, {self.rows} rows of {self.channels} channels: {self.path}"]
        if self.before:
            lines.append(f"{self.before} videos were there already")
        if self.missing:
            lines.append(f"{len(self.missing)} videos have no file")
        lines += [f"video {name!r} cannot be read: {reason}" for name, reason in self.unreadable.items()]
        return "\n".join(lines)


def extract(
    config: Config,
    output: Path,
    *,
    trained: Trained | None = None,
    source: Path | None = None,
    snippet: int | None = None,
    every: int | None = None,
    hdf5: bool = False,
    batch: int = 1,
    progress: bool = True,
) -> Extracted:
    """Write features of the training and the test videos of a configuration.

    The backbone sees what it sees in a test. Where a clip is a whole video, rows are those of its steps; where clips
    are windows, a row is taken from the one in whose middle it is most.

    Args:
        config: of the backbone, of how clips are cut and pixels are scaled. output: folder to write to.
        trained: weights; None: those that ``backbone.weights`` names.
        source: any videos, a file or a folder, instead of those of the configuration.
        snippet: make each row of so many sampled frames on their own. every: video frames from row to row then; None:
            as many as a snippet spans.
        hdf5: one file, instead of one for each video. batch: clips at a time.

    Raises:
        ConfigError: the folder holds features made in another way.
    """
    if snippet is None and every is not None:
        raise ConfigError(f"--every: got {every} without --snippet; expected both, or neither")
    given = config
    if snippet is not None:
        cut = dataclasses.replace(config.sampling, method="window", frames=snippet, steps=1)
        config = dataclasses.replace(config, sampling=cut)
    every = every or (snippet or 0) * config.sampling.stride
    of = _videos(config, source)
    files = videos.find(source or loading.path(config, "videos"), None if source else [video.id for video in of.videos])
    pieces = _Pieces(of, files, _cut(config, snippet, every), centre(config.sampling.crop), config.sampling.crop)
    backbone = _backbone(config, trained, snippet is not None)
    made = _how(config, backbone, every)
    log = _Log(output, made)
    rows = _Rows(output, hdf5)
    found = Extracted(rows.path, 0, backbone.channels, 0, len(log.done), pieces.missing, dict(pieces.unreadable))
    _run(config, backbone, pieces, log, rows, found, batch, progress)
    if found.done or found.before:
        rows.finish()
        (output / "config.yaml").write_text(_reading(given, rows.path, backbone.channels, snippet, every).to_yaml())
    return found


def _run(
    config: Config,
    backbone: Backbone,
    pieces: _Pieces,
    log: _Log,
    rows: _Rows,
    found: Extracted,
    batch: int,
    progress: bool,
) -> None:
    fabric = L.Fabric(accelerator=config.training.accelerator, devices=1, precision=config.training.precision)
    module = fabric.setup_module(backbone)
    todo = [number for number, (video, _) in enumerate(pieces.items) if bare(video.id) not in log.done]
    waiting = Counter(pieces.items[number][0].id for number in todo)
    parts: dict[str, list[tuple[int, Array]]] = defaultdict(list)
    loader = DataLoader(Subset(pieces, todo), batch, collate_fn=_readable, num_workers=config.data.workers)
    with Progress(disable=not progress) as bar, torch.no_grad():
        task = bar.add_task("extracting features", total=len(todo))
        for clips, faults in loader:
            found.unreadable.update(faults)
            for name, timing, part in _made(module, clips, backbone.steps is None, fabric.device):
                parts[name].append((round(timing.offset / timing.stride), part))
                if len(parts[name]) == waiting[name]:
                    whole = _joined(parts.pop(name), config.sampling.steps)
                    rows.write(name, whole)
                    log.add({"video": name, "fps": timing.fps, "rows": len(whole)})
                    found.rows, found.done = found.rows + len(whole), found.done + 1
            bar.advance(task, len(faults) + len(clips or ()))


def _made(
    module: nn.Module, clips: Batch | None, mean: bool, device: torch.device
) -> Iterator[tuple[str, cuts.Timing, Array]]:
    """(video, timing, rows) of each clip; ``mean``: one row, of all times."""
    if clips is None:
        return
    features = module(clips.frames.to(device), clips.mask.to(device))
    features = features.mean(2, keepdim=True) if mean else features
    for name, timing, mask, made in zip(clips.video_ids, clips.timings, clips.mask, features, strict=True):
        yield name, timing, made[:, : int(mask.sum())].T.float().cpu().numpy()


def _joined(parts: Sequence[tuple[int, Array]], steps: int) -> Array:
    """The rows of a video, from windows of so many steps that begin at these: each from the one in whose middle it is
    most.
    """
    length = max(first + len(rows) for first, rows in parts)
    nearest, whole = np.full(length, np.inf), np.empty((length, parts[0][1].shape[1]), np.float32)
    for first, rows in parts:
        place = slice(first, first + len(rows))
        off = np.abs(np.arange(len(rows)) + 0.5 - steps / 2)
        closer = off < nearest[place]
        whole[place][closer], nearest[place][closer] = rows[closer], off[closer]
    return whole


# -- what goes through -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snippets:
    """Each row on its own: ``frames`` sampled frames, one of every ``stride``; the next begins ``every`` video frames
    later. Those that would pass the end are left out, but for a video shorter than a snippet.
    """

    frames: int
    stride: int
    every: int
    steps: int = 1

    def count(self, length: int) -> int:
        """See `sampling.Sampling`."""
        return 1 + max(length - self.frames * self.stride, 0) // self.every

    def plan(self, video: Video, length: int, fps: float, part: int, rng: np.random.Generator) -> cuts.Plan:
        """See `sampling.Sampling`. Nothing is learned from it: it has no actions."""
        numbers = np.minimum(part * self.every + np.arange(self.frames) * self.stride, length - 1)
        timing = cuts.Timing(fps, float(self.every), float(part * self.every), length / fps)
        return cuts.Plan(numbers, 1, np.zeros((0, 2)), np.zeros(0, np.int64), timing)


class _Pieces(Clips):
    """Clips for features: one that cannot be read is none, where a test takes a black one."""

    def __init__(self, of: Annotations, files: dict[str, Path], cut: cuts.Sampling, transform: Any, side: int) -> None:
        super().__init__(of, files, cut, transform, short_side=side, normalize=None)

    def __getitem__(self, key: cuts.Key) -> Clip | tuple[str, str]:  # type: ignore[override]
        number, seeds = cuts.choices(key, self.seed)
        video, part = self.items[number]
        try:
            return self._clip(video, part, seeds)
        except videos.VideoError as error:
            return video.id, str(error)


def _readable(items: Sequence[Clip | tuple[str, str]]) -> tuple[Batch | None, dict[str, str]]:
    """(the clips that could be read, why others could not, by their videos)."""
    clips = [item for item in items if isinstance(item, Clip)]
    return collate(clips) if clips else None, dict(item for item in items if not isinstance(item, Clip))


def _videos(config: Config, source: Path | None) -> Annotations:
    if source is not None:
        return loading.unannotated(config, source, ())[0]
    truth = loading.truth(config)
    return truth.whole.only({video.id for of in (truth.training, truth.test) for video in of.videos})


def _cut(config: Config, snippet: int | None, every: int) -> cuts.Sampling:
    return loading.sampling(config, False) if snippet is None else Snippets(snippet, config.sampling.stride, every)


def _backbone(config: Config, trained: Trained | None, snippets: bool) -> Backbone:
    """The backbone in eval mode, rewired as it would be in a test: some couplings change what a network computes."""
    L.seed_everything(config.seed, verbose=False)
    if config.data.features.path is not None:
        raise ConfigError("data.features.path: got features to extract features from; expected videos, and null here")
    if trained is not None:
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None))
    classes = len(trained.classes) if trained is not None and trained.classes and not config.class_agnostic else 1
    network = networks.build(config, classes, loading.root(config))
    networks.observe(network, config)
    if trained is not None:
        trained.into(nn.ModuleDict({"network": network}), config)
    assert network.backbone is not None
    stride = network.backbone.network.frame_stride
    if config.sampling.frames % stride:
        raise ConfigError(f"frames of a clip: got {config.sampling.frames}; expected a multiple of {stride}")
    if snippets:
        network.backbone.steps = None  # a row is the mean over all times
    return network.backbone.eval()


# -- what is written ---------------------------------------------------------------------------------------------------


def _how(config: Config, backbone: nn.Module, every: int) -> dict[str, Any]:
    """All that rows depend on, in plain values."""
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    cut = ("method", "frames", "steps", "stride", "overlap", "crop")
    net = ("name", "chunk", "mean", "std", "options")
    return {
        "weights": digest.hexdigest(),
        "backbone": {name: getattr(config.backbone, name) for name in net},
        "memory": "stored" if config.backbone.frozen else config.memory,
        "precision": config.training.precision,
        "sampling": {name: getattr(config.sampling, name) for name in cut},
        "every": every,
    }


class _Log:
    """``extraction.jsonl``: how features are made, then a line for each video that is done."""

    def __init__(self, output: Path, made: dict[str, Any]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / LOG
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        if lines and not lines[-1].endswith("\n"):  # it was broken off there
            lines.pop()
            self.path.write_text("".join(lines), encoding="utf-8")
        if not lines:
            self.add(made)
        elif differs := [name for name, value in json.loads(lines[0]).items() if made[name] != value]:
            raise ConfigError(
                f"{output}: it holds features made in another way ({', '.join(differs)}); give another folder"
            )
        self.done = {bare(json.loads(line)["video"]) for line in lines[1:]}

    def add(self, entry: dict[str, Any]) -> None:
        """A line more."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class _Rows:
    """Where rows go: a file for each video, and from there into one of all, where that is wanted."""

    def __init__(self, output: Path, hdf5: bool) -> None:
        self.folder, self.file = output / "rows", output / "rows.h5"
        if self.file.exists() and not hdf5:
            raise ConfigError(f"{output}: it holds features in one file; give --hdf5, or another folder")
        self.path = self.file if hdf5 else self.folder
        self.folder.mkdir(exist_ok=True)

    def write(self, video: str, rows: Array) -> None:
        """All of a video's, or none."""
        if "/" in video:
            raise ConfigError(f"video {video!r}: there are two videos of that name; expected one, for a file by its id")
        part = self.folder / f"{video}.part"
        with part.open("wb") as file:
            np.save(file, rows)
        os.replace(part, self.folder / f"{video}.npy")

    def finish(self) -> None:
        """Into one file: a copy takes what is new, and then the place of the one before."""
        if self.path == self.folder:
            return
        part = self.file.with_suffix(".part")
        if self.file.exists():
            shutil.copyfile(self.file, part)
        with h5py.File(part, "a") as all_rows:
            for path in sorted(self.folder.glob("*.npy")):
                all_rows[path.stem] = np.load(path)
        os.replace(part, self.file)
        shutil.rmtree(self.folder)


def _reading(config: Config, path: Path, channels: int, snippet: int | None, every: int) -> Config:
    """The configuration that trains on these features instead of the videos."""
    s = config.sampling
    step = every if snippet is not None else s.stride * s.frames / s.steps
    seen = None if snippet is None else float(snippet * s.stride)
    rows = Features(path=str(path.resolve()), channels=channels, stride=float(step), snippet=seen)
    return dataclasses.replace(
        config,
        name=f"{config.name}_features",
        data=dataclasses.replace(config.data, features=rows, drawn={}),
        sampling=dataclasses.replace(s, frames=s.steps, stride=1),
    )
