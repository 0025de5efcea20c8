"""Batches for training and testing: which clips, in which order, on which process; and where a resumed run goes on."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.tal import annotations, clips, features, folders, pixels, videos
from benchmarks.tal import sampling as cuts
from benchmarks.tal.annotations import Annotations, Video
from benchmarks.tal.schema import Config, ConfigError
from benchmarks.tal.synthetic import synthesize


class Batches(Sampler[list[tuple[int, int]]]):
    """The batches of a whole run: passes over the data, each in its own order, cut into batches without regard to where
    a pass ends.

    Args:
        clips: in the data. batch: clips of all processes together. count: batches of the run.
        seed: of the orders. rank, world: this process and the number of processes, which share a batch out.

    Raises:
        ConfigError: the processes cannot share a batch evenly.
    """

    def __init__(self, clips: int, batch: int, count: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch % world:
            raise ConfigError(f"training.batch: got {batch} clips for {world} processes; expected a multiple of them")
        self.clips = clips
        self.batch = batch
        self.count = count
        self.seed = seed
        self.share = range(rank * batch // world, (rank + 1) * batch // world)
        self.start = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.start, self.count):
            yield [self.key(number * self.batch + place) for place in self.share]

    def key(self, position: int) -> tuple[int, int]:
        """(pass over the data, index of the clip) at a position in the endless sequence."""
        turn, place = divmod(position, self.clips)
        order = torch.randperm(self.clips, generator=torch.Generator().manual_seed(hash((self.seed, turn)) % 2**63))
        return turn, int(order[place])


class TrainingLoader(DataLoader[Any]):
    """Loads `Batches`, counts what it handed over, and goes on from there; its state is part of a checkpoint."""

    def __init__(self, data: Dataset[Any], batches: Batches, **options: Any) -> None:
        super().__init__(data, batch_sampler=batches, **options)
        self.batches = batches
        self.handed = 0

    def __iter__(self) -> Iterator[Any]:
        self.batches.start = self.handed
        for batch in super().__iter__():
            self.handed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches were handed over."""
        return {"handed": self.handed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after so many batches."""
        self.handed = state["handed"]


def shared(items: int, rank: int, world: int) -> list[int]:
    """The test clips of a process: every ``world``-th, and the first ones again so that all processes have equally
    many.

    Sharded networks run in step, so that a process without a clip would leave the others waiting.
    """
    rounds = -(-items // world)
    return [(rank + world * turn) % items for turn in range(rounds)]


# -- what a configuration's data are -----------------------------------------------------------------------------------


def root(config: Config) -> Path:
    """The folder to which the paths of a configuration are relative."""
    return Path(config.data.root or os.environ.get("REVWIRE_DATA") or ".")


def path(config: Config, key: str) -> Path:
    """``data.KEY`` as a path; for ``features``, that of its section.

    Raises:
        ConfigError: it is not set, or nothing is there.
    """
    value = config.data.features.path if key == "features" else getattr(config.data, key)
    found = root(config) / str(value)
    if value is None or not found.exists():
        raise ConfigError(f"data.{key}: got {value!r}, and there is no {found}; set it, or data.root (or REVWIRE_DATA)")
    return found


def draw(config: Config) -> None:
    """Make the videos that a configuration says are to be drawn, if they are not there; several processes may try at
    once.
    """
    folder = (root(config) / str(config.data.annotations)).parent
    if not config.data.drawn or folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(dir=folder.parent)
    synthesize(made, progress=True, **config.data.drawn)
    with suppress(OSError):  # another process was first
        os.rename(made, folder)
    shutil.rmtree(made, ignore_errors=True)


@dataclass(frozen=True)
class Truth:
    """Annotations of a configuration's two subsets, ``excluded`` videos left out; ``classes`` are those of the file."""

    training: Annotations
    test: Annotations
    excluded: int

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.test.classes


def truth(config: Config) -> Truth:
    """Read the annotations.

    Raises:
        AnnotationError: they have faults. ConfigError: no such file.
    """
    draw(config)
    read = annotations.read(path(config, "annotations"), lenient=config.data.lenient)
    if config.data.exclude is None:
        return Truth(_subsets(read, config.data.training_subset), _subsets(read, config.data.test_subset), 0)
    excluded = {name.removeprefix("v_") for name in json.loads(path(config, "exclude").read_text(encoding="utf-8"))}
    kept = read.only({video.id for video in read.videos if video.id.removeprefix("v_") not in excluded})
    lost = len(read.videos) - len(kept.videos)
    return Truth(_subsets(kept, config.data.training_subset), _subsets(kept, config.data.test_subset), lost)


def _subsets(of: Annotations, names: str) -> Annotations:
    return of.only({video.id for name in names.split(",") for video in of.subset(name.strip()).videos})


def sampling(config: Config, training: bool) -> cuts.Sampling:
    """How clips are cut."""
    s = config.sampling
    if s.method == "resize":
        return cuts.Resize(s.frames, s.steps)
    if training:
        return cuts.Truncate(s.frames, s.steps, s.stride, s.truncation)
    return cuts.Windows(s.frames, s.steps, s.stride, s.overlap)


def transform(config: Config, training: bool) -> pixels.Transform:
    """What is done to pixels."""
    s = config.sampling
    if not training:
        return pixels.centre(s.crop)
    return pixels.augmentation(
        s.crop, scale=None if s.scale is None else (s.scale[0], s.scale[1]), flip=s.flip, jitter=s.jitter
    )


def unannotated(folder: Path, classes: Sequence[str]) -> Annotations:
    """The videos of a folder, without segments.

    Raises:
        ValueError: there is none.
    """
    files = videos.find(folder)
    if not files:
        raise ValueError(f"{folder}: there is no video in it")
    found = (Video(name, "testing", videos.header(path).duration, ()) for name, path in files.items())
    return Annotations(tuple(found), tuple(classes))


def dataset(
    config: Config, of: Annotations, training: bool, folder: Path | None = None
) -> clips.Clips | features.Features:
    """The clips of annotated videos, or their features; videos lie in ``folder``, by default ``data.videos``.

    Raises:
        ConfigError: no such folder. ValueError: no clip is left.
    """
    wanted = of.class_agnostic() if config.class_agnostic else of
    ids = [video.id for video in wanted.videos]
    if config.data.features.path is not None:
        return _features(config, wanted, training)
    files = videos.find(folder or path(config, "videos"), ids)
    side = config.sampling.short_side if training else config.sampling.crop
    return clips.Clips(
        wanted,
        files,
        sampling(config, training),
        transform(config, training),
        short_side=side,
        training=training,
        normalize=None,  # the backbone does that, on its own device
        seed=config.seed,
        keep=config.data.keep,
    )


def _features(config: Config, of: Annotations, training: bool) -> features.Features:
    f = config.data.features
    source = features.find(path(config, "features"))
    how = sampling(config, training)
    return features.Features(
        of, source, how, fps=f.fps, stride=f.stride, offset=f.offset, training=training, seed=config.seed
    )


class Data(L.LightningDataModule):
    """The batches of a run; by process, where there are several.

    Args:
        training, test: items by key, and by index.
        collate: items -> batch.
        config: of the run.
    """

    def __init__(self, config: Config, training: Dataset[Any], test: Dataset[Any], collate: Any) -> None:
        super().__init__()
        self.config, self.training, self.test, self.collate = config, training, test, collate

    def train_dataloader(self) -> TrainingLoader:
        """See `Batches`. A step's batch is cut into ``accumulate`` parts."""
        options, trainer = self.config.training, self.trainer
        parts = options.accumulate
        if options.batch % parts:
            raise ConfigError(
                f"training.batch: got {options.batch} clips in {parts} parts; expected a multiple of "
                "training.accumulate"
            )
        count = options.steps * parts
        batches = Batches(
            len(self.training), options.batch // parts, count, self.config.seed, trainer.global_rank, trainer.world_size
        )
        return TrainingLoader(self.training, batches, **self._options())

    def val_dataloader(self) -> DataLoader[Any]:
        """This process's share of the test clips, one at a time."""
        trainer = self.trainer
        mine = shared(len(self.test), trainer.global_rank, trainer.world_size)
        return DataLoader(self.test, batch_size=1, sampler=mine, **self._options())

    def _options(self) -> dict[str, Any]:
        workers = self.config.data.workers
        return {"collate_fn": self.collate, "num_workers": workers, "persistent_workers": workers > 0}


def labelled(config: Config, training: bool) -> folders.LabelledClips:
    """The labelled clips of a subset: the folder ``data.videos``/SUBSET.

    Raises:
        ConfigError: no such folder, or features. ValueError: no clip in it.
    """
    if config.data.features.path is not None or config.sampling.method != "window":
        raise ConfigError("task: got 'classification'; expected videos, not features, and sampling.method 'window'")
    parent = path(config, "videos")
    names = folders.classes(parent / config.data.training_subset)
    folder = parent / (config.data.training_subset if training else config.data.test_subset)
    side = config.sampling.short_side if training else config.sampling.crop
    return folders.LabelledClips(
        folder,
        names,
        config.sampling.frames,
        config.sampling.stride,
        transform(config, training),
        short_side=side,
        training=training,
        seed=config.seed,
    )
