"""A run from its configuration: data, network, trainer, and the record of what came of it."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from benchmarks.harness.record import Record, Row, environment
from benchmarks.tal import checkpoints, clips, detection_files, folders, loading, logs, networks
from benchmarks.tal.annotations import Annotations, Video
from benchmarks.tal.callbacks import Average, Cost
from benchmarks.tal.checkpoints import Kept, Trained
from benchmarks.tal.checkpoints import latest as latest
from benchmarks.tal.loading import Data
from benchmarks.tal.prediction import Fused, Scorer
from benchmarks.tal.schema import Config, ConfigError
from benchmarks.tal.scores import VideoScores
from benchmarks.tal.scores import classes as score_classes
from benchmarks.tal.scores import read as read_scores
from benchmarks.tal.suppression import Suppression
from benchmarks.tal.training import Classification, Localization, Run, groups
from revwire.measure import peak_bytes

INTENDED = (
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),  # Lightning 2.6 asks torch 2.14 so
    (
        r"Found \d+ module\(s\) in eval mode at the start of training",
        UserWarning,
    ),  # norms and backbones that are frozen
    (r"The '(train|val)_dataloader' does not have many workers", UserWarning),  # data.workers says how many
)
"""What Lightning warns of though it is as it should be."""


def trainer(
    config: Config, callbacks: list[Callback], progress: bool, loggers: list[Logger] | None = None
) -> L.Trainer:
    """Lightning's trainer for a configuration; see Note [One pass] in `training`."""
    for message, category in INTENDED:
        warnings.filterwarnings("ignore", message, category)
    options = config.training
    batches = options.steps * options.accumulate
    return L.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=options.clip or None,
        precision=options.precision,
        strategy=_strategy(config),
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.nodes,
        val_check_interval=options.test_every * options.accumulate if options.test_every else batches + 1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # `loading` shares the batches out
        log_every_n_steps=min(options.log_every, batches),
        logger=loggers or False,
        callbacks=callbacks,
        enable_checkpointing=False,  # `Kept` does that
        enable_progress_bar=progress,
        enable_model_summary=False,
        default_root_dir=config.folder,
    )


def _strategy(config: Config) -> str | Strategy:
    if config.training.strategy == "fsdp":
        world = config.training.devices * config.training.nodes
        return ModelParallelStrategy(
            data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return config.training.strategy


# -- what a run is made of ---------------------------------------------------------------------------------------------


def prepared(config: Config) -> tuple[Run, Data]:
    """The module and the data of a configuration.

    Raises:
        InputError: something of it is not there, or does not fit.
    """
    if config.training.strategy == "fsdp" and config.training.ema is not None:
        raise ConfigError(
            "training.ema: got an average of weights that are sharded; expected null with training.strategy=fsdp"
        )
    L.seed_everything(config.seed, verbose=False)
    return _classification(config) if config.task == "classification" else _localization(config)


def tested(config: Config, trained: Trained) -> tuple[Run, Data]:
    """The module of a checkpoint, its weights in it, and the data of a test; nothing is read for training.

    Raises:
        InputError: as `prepared`; or the checkpoint is another network's.
    """
    L.seed_everything(config.seed, verbose=False)
    config = without_weights(config)
    make = _classification if config.task == "classification" else _localization
    module, data = make(config, trained)
    trained.into(module, config)
    return module, data


def _localization(config: Config, trained: Trained | None = None) -> tuple[Localization, Data]:
    truth = loading.truth(config)
    training = None if trained else loading.dataset(config, truth.training, True)
    test = loading.dataset(config, truth.test, False)
    found = truth.test.only({video.id for video, _ in test.items})
    if training is not None:
        say(loading.missed(config, truth.training, training, True))
    say(loading.missed(config, truth.test, test, False))
    scored = found if config.data.only_found else truth.test
    classes = (trained and trained.classes) or truth.classes
    scorer = _scorer(config, classes, fused(config, found.videos, classes), scored)
    return _localizer(config, classes, scorer), Data(config, training, test, clips.collate)


def _localizer(config: Config, classes: Sequence[str], scorer: Scorer) -> Localization:
    network = networks.build(config, 1 if config.class_agnostic else len(classes), loading.root(config))
    networks.observe(network, config)
    return Localization(network, config.training, config.seed, scorer, origin(config, classes))


def _scorer(config: Config, classes: Sequence[str], classify: Fused | None, truth: Annotations | None) -> Scorer:
    try:
        suppress = Suppression(**config.suppression)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"suppression: {error}") from None
    return Scorer(truth, classes, suppress, classify, config.thresholds, predictions(config), config.recall)


def _classification(config: Config, trained: Trained | None = None) -> tuple[Classification, Data]:
    classes = None if trained is None else trained.classes
    training = None if trained else loading.labelled(config, True)
    test = loading.labelled(config, False, classes)
    network = networks.build(config, len(test.classes), loading.root(config))
    networks.observe(network, config)
    module = Classification(network, config.training, config.seed, origin(config, test.classes))
    return module, Data(config, training, test, folders.collate)


def origin(config: Config, classes: Sequence[str]) -> dict[str, Any]:
    """What a checkpoint says of its run, in plain values."""
    return {"config": dataclasses.asdict(config), "classes": list(classes)}


def without_weights(config: Config) -> Config:
    """A configuration whose backbone's weights come from elsewhere."""
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, weights=None))


@rank_zero_only
def say(lines: Sequence[str]) -> None:
    """Lines for whoever runs this, once."""
    for line in lines:
        print(line, file=sys.stderr)


def predictions(config: Config) -> Path:
    """Where a run's detections are written."""
    return config.folder / "predictions.json"


def fused(config: Config, tested: Sequence[Video], classes: Sequence[str]) -> Fused | None:
    """The classes of the tested videos, where a file is to say them.

    Raises:
        ConfigError: a localizer without classes has no such file, or the file lacks videos.
    """
    if config.data.class_scores is None:
        if config.class_agnostic:
            raise ConfigError("data.class_scores: got None; expected a file of classes, as class_agnostic is true")
        return None
    where = loading.path(config, "class_scores")
    scores = read_scores(where, classes)
    lacking = [video.id for video in tested if not _has(scores, video.id)]
    if lacking:
        raise ConfigError(
            f"data.class_scores: {where} has no class for {len(lacking)} of {len(tested)} videos, {lacking[0]!r} first"
        )
    return lambda video: scores.top(video, config.data.class_scores_top)


def _has(scores: VideoScores, video: str) -> bool:
    try:
        return bool(scores.top(video, 1))
    except KeyError:
        return False


# -- what a run does ---------------------------------------------------------------------------------------------------


def train(
    config: Config, resume: Path | None = None, progress: bool = True, further: Sequence[Callback] = ()
) -> Record:
    """Train, test, and write the run's record beside its logs and checkpoints; see `Config.folder`.

    Args:
        resume: a checkpoint to go on from. further: callbacks.
    """
    module, data = prepared(config)
    begun = None if resume is None else checkpoints.read(resume)
    if begun is not None:
        begun.check(module, config)
        begun.check_optimizer([len(g["params"]) for g in groups(module.network, config.training)], config)
    cost = Cost()
    averages = [] if config.training.ema is None else [Average(config.training.ema)]
    kept = Kept(config, module.figure, resumed=begun is not None)
    loggers = logs.loggers(config.folder, None if begun is None else begun.step)
    runner = trainer(config, [cost, *averages, kept, *further], progress, loggers)
    if runner.is_global_zero:
        if begun is None:
            checkpoints.set_aside(config)
        checkpoints.folder(config).mkdir(parents=True, exist_ok=True)
        (config.folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    runner.fit(module, data, ckpt_path=resume, weights_only=True)
    runner.validate(module, data, verbose=False)
    found = {**row(config, module, data, runner, cost), "best": kept.best}
    record = Record("result", "ok", None, dataclasses.asdict(config), [found], environment(module.device.type))
    if runner.is_global_zero:
        record.write(config.folder)
    return record


def evaluate(config: Config, checkpoint: Path, progress: bool = True) -> dict[str, float]:
    """Test the weights of a checkpoint (the averaged ones, where they were averaged): figures by name."""
    module, data = tested(config, checkpoints.read(checkpoint))
    trainer(config, [], progress).validate(module, data, verbose=False)
    return figures(module.trainer)


def predict(
    config: Config, checkpoint: Path, videos: Path | None, output: Path, progress: bool = True
) -> dict[str, list[Any]]:
    """Write what a checkpoint detects to ``output``, and return it, by video.

    Args:
        config: of the checkpoint. videos: a file or a folder of any videos; None: those of the test subset.

    Raises:
        InputError: there is no video, or no class for one of them.
    """
    trained = checkpoints.read(checkpoint)
    module, data = tested(config, trained) if videos is None else _own(config, trained, videos)
    if not isinstance(module, Localization):
        raise ConfigError(f"{checkpoint}: it classifies whole clips; expected a network that localizes")
    module.scorer.path, module.scorer.truth = output, None
    trainer(config, [], progress).validate(module, data, verbose=False)
    return detection_files.plain(output)


def _own(config: Config, trained: Trained, source: Path) -> tuple[Localization, Data]:
    """As `tested`, for videos without annotations. Classes are the checkpoint's; for a network that knows none, those
    of a file of scores, where there is one.
    """
    L.seed_everything(config.seed, verbose=False)
    config = without_weights(config)
    classes = trained.classes if trained.classes is not None else loading.truth(config).classes
    of, test = loading.unannotated(config, source, classes)
    classify = None
    if config.data.class_scores is not None:
        classes = score_classes(loading.path(config, "class_scores")) if config.class_agnostic else classes
        classify = fused(config, of.videos, classes)
    elif config.class_agnostic:
        classes = ("action",)
    module = _localizer(config, classes, _scorer(config, classes, classify, None))
    trained.into(module, config)
    return module, Data(config, None, test, clips.collate)


def figures(runner: L.Trainer) -> dict[str, float]:
    """What was tested last, by name."""
    return {
        name.removeprefix("test/"): float(v) for name, v in runner.callback_metrics.items() if name.startswith("test/")
    }


def row(config: Config, module: Run, data: Data, runner: L.Trainer, cost: Cost) -> Row:
    """What came of a run: figures between 0 and 1, bytes, seconds."""
    on_cuda = module.device.type == "cuda"
    counted = step_bytes(module, data, config) if config.measure and not on_cuda else None
    return {
        "name": config.name,
        "memory": "frozen" if config.backbone.frozen else config.memory,
        "seed": config.seed,
        "steps": runner.global_step,
        "batch": config.training.batch,
        "frames": config.sampling.frames,
        "crop": config.sampling.crop,
        "figures": figures(runner),
        "tested_clips": len(data.test),
        "peak_bytes": cost.peak if on_cuda else counted,
        "seconds_per_step": cost.median(),
    }


def step_bytes(module: Run, data: Data, config: Config) -> int:
    """Peak bytes of forward and backward of one part of a step, above rest, ``.grad`` allocated; see
    `revwire.measure`.
    """
    network = module.network.train()
    count = config.training.batch // config.training.accumulate
    batch = data.collate([data.training[(0, i % len(data.training))] for i in range(count)])
    try:
        return peak_bytes(lambda: torch.stack(list(network(batch).values())).sum().backward(), module.device)
    finally:
        network.zero_grad(set_to_none=True)
