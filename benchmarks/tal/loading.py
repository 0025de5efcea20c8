"""Batches for training and testing: which clips, in which order, on which process; and where a resumed run goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.tal import annotations, clips, features, folders, pixels, videos
from benchmarks.tal import sampling as cuts
from benchmarks.tal.annotations import Annotations, Fault, Video, bare
from benchmarks.tal.errors import EmptyError
from benchmarks.tal.features import Extraction, Features
from benchmarks.tal.forms import FORMS, Published
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
    """Annotations of a configuration, ``excluded`` videos left out, and faults that were passed over."""

    whole: Annotations
    names: Mapping[str, str]
    excluded: int
    path: Path
    faults: tuple[Fault, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.whole.classes

    @cached_property
    def training(self) -> Annotations:
        """Of ``data.training_subset``."""
        return self._subset("training_subset")

    @cached_property
    def test(self) -> Annotations:
        """Of ``data.test_subset``."""
        return self._subset("test_subset")

    def _subset(self, key: str) -> Annotations:
        names = [name.strip() for name in self.names[key].split(",")]
        try:
            return self.whole.only({video.id for name in names for video in self.whole.subset(name).videos})
        except EmptyError as error:
            raise EmptyError(f"data.{key}: {error} ({self.path})") from None


def truth(config: Config, quietly: bool = False) -> Truth:
    """Read the annotations; ``quietly`` without the warning of faults that are passed over.

    Raises:
        AnnotationError: they have faults. ConfigError: no such file.
    """
    draw(config)
    where = path(config, "annotations")
    published = _published(config, where)
    known = all("duration" in entry for entry in published.database.values())
    classes, lenient = class_map(config) or published.classes, config.data.lenient
    chosen: dict[str, Any] = {"classes": classes, "durations": known, "database": published.database or None}
    if quietly:
        read, faults = annotations.parse(where, **chosen)
        annotations.refuse(where, faults, classes is not None, lenient)
    else:
        read, faults = annotations.read(where, **chosen, lenient=lenient), ()
    names = {key: getattr(config.data, key) for key in ("training_subset", "test_subset")}
    if config.data.exclude is None:
        return Truth(read, names, 0, where, faults)
    excluded = {bare(name) for name in json.loads(path(config, "exclude").read_text(encoding="utf-8"))}
    kept = read.only({video.id for video in read.videos if bare(video.id) not in excluded})
    return Truth(kept, names, len(read.videos) - len(kept.videos), where, faults)


def _published(config: Config, where: Path) -> Published:
    """What a data set publishes in its own form, with the lengths of its videos from elsewhere; of ActivityNet's, which
    is read as it is, nothing.
    """
    reader = FORMS.get(config.data.form)
    if reader is None:
        return Published({}, None)
    found = reader(where)
    if config.data.lengths is not None:
        known, _ = annotations.parse(path(config, "lengths"), subsets=None)
        for name, entry in found.database.items():
            if "duration" not in entry and (video := known.video(name)) is not None:
                entry |= {"duration": video.duration, "fps": video.fps}
    return found


def class_map(config: Config) -> tuple[str, ...] | None:
    """The classes that a configuration names, in the order of their labels; None: those of the annotations."""
    given = config.data.classes
    if given is None or isinstance(given, list):
        return None if given is None else tuple(given)
    return annotations.read_classes(path(config, "classes"))


def missed(config: Config, of: Annotations, data: clips.Clips | Features, training: bool) -> list[str]:
    """What is to be said of videos of a subset that are not among its clips: counted, and what comes of them."""
    kind = "features" if isinstance(data, Features) else "file"
    name, end = ("training", "they are not learned from") if training else ("test", "they count as missed")
    if not training and config.data.only_found:
        end = "they are left out, by data.only_found"
    counts = ((len(data.missing), kind), (len(getattr(data, "unreadable", ())), "file that can be opened"))
    return [f"{n} of {len(of.videos)} {name} videos have no {what}: {end}" for n, what in counts if n]


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
    scale = None if s.scale is None else (s.scale[0], s.scale[1])
    return pixels.augmentation(s.crop, scale=scale, flip=s.flip, operations=s.operations, jitter=s.jitter)


def unannotated(config: Config, source: Path, classes: Sequence[str]) -> tuple[Annotations, clips.Clips | Features]:
    """The videos of a file or a folder, without segments, and their clips; of features, where a network takes these.

    Raises:
        EmptyError, MissingError: there is none. VideoError: one cannot be read.
    """
    if config.data.features.path is not None:
        found = features.find(source)
        of = replace(features.unannotated(found, extraction(config)), classes=tuple(classes))
        return of, _features(config, of, found, False)
    files = videos.find(source)
    if not files:
        raise EmptyError(f"{source}: there is no video in it; expected files named {', '.join(videos.EXTENSIONS)}")
    of = Annotations(
        tuple(Video(name, "testing", videos.header(path).duration, ()) for name, path in files.items()), tuple(classes)
    )
    return of, _clips(config, of, files, False)


def dataset(config: Config, of: Annotations, training: bool) -> clips.Clips | Features:
    """The clips of annotated videos, or their features.

    Raises:
        ConfigError: no such folder. EmptyError: no clip is left.
    """
    wanted = of.class_agnostic() if config.class_agnostic else of
    if config.data.features.path is not None:
        return _features(config, wanted, features.find(path(config, "features")), training)
    files = videos.find(path(config, "videos"), [video.id for video in wanted.videos])
    return _clips(config, wanted, files, training)


def _clips(config: Config, of: Annotations, files: Mapping[str, Path], training: bool) -> clips.Clips:
    side = config.sampling.short_side if training else config.sampling.crop
    return clips.Clips(
        of,
        files,
        sampling(config, training),
        transform(config, training),
        short_side=side,
        training=training,
        normalize=None,  # the backbone does that, on its own device
        seed=config.seed,
        keep=config.data.keep,
    )


def extraction(config: Config) -> Extraction:
    """How the features of a configuration were made."""
    f = config.data.features
    return Extraction(f.stride, f.snippet, f.offset, f.fps, f.whole_frames)


def extracted(config: Config) -> tuple[features.Source, Extraction | None]:
    """The features of a configuration, and how they were made: None where nothing says it, as rows are resized."""
    source = replace(features.find(path(config, "features")), channels=config.data.features.channels or None)
    resized = config.sampling.method == "resize" and config.data.features.fps is None
    return source, None if resized else extraction(config)


def _features(config: Config, of: Annotations, source: features.Source, training: bool) -> Features:
    options = {**dataclasses.asdict(extraction(config)), "channels": config.data.features.channels}
    return Features(of, source, sampling(config, training), **options, training=training, seed=config.seed)


class Data(L.LightningDataModule):
    """The batches of a run; by process, where there are several.

    Args:
        training, test: items by key, and by index; no training items for a test alone.
        collate: items -> batch.
        config: of the run.
    """

    def __init__(self, config: Config, training: Dataset[Any] | None, test: Dataset[Any], collate: Any) -> None:
        super().__init__()
        self.config, self.test, self.collate = config, test, collate
        self._training = training

    @property
    def training(self) -> Dataset[Any]:
        """What is learned from.

        Raises:
            RuntimeError: these data are for testing alone.
        """
        if self._training is None:
            raise RuntimeError("Data: got a request for training clips; these are the data of a test")
        return self._training

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


def labelled(config: Config, training: bool, classes: Sequence[str] | None = None) -> folders.LabelledClips:
    """The labelled clips of a subset: the folder ``data.videos``/SUBSET, and in it one of each class, by default those
    of the training subset.

    Raises:
        ConfigError: no such folder, or features. EmptyError: no clip in it.
    """
    if config.data.features.path is not None or config.sampling.method != "window":
        raise ConfigError("task: got 'classification'; expected videos, not features, and sampling.method 'window'")
    parent = path(config, "videos")
    folder = parent / (config.data.training_subset if training else config.data.test_subset)
    side = config.sampling.short_side if training else config.sampling.crop
    return folders.LabelledClips(
        folder,
        classes or class_map(config) or folders.classes(parent / config.data.training_subset),
        config.sampling.frames,
        config.sampling.stride,
        transform(config, training),
        short_side=side,
        training=training,
        seed=config.seed,
    )
