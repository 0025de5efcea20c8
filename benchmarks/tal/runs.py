"""A run from its configuration: data, network, trainer, and the record of what came of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from benchmarks.harness.record import Record, Row, environment
from benchmarks.tal import clips, folders, loading, networks
from benchmarks.tal.annotations import Annotations
from benchmarks.tal.callbacks import Average, Cost
from benchmarks.tal.loading import Data
from benchmarks.tal.prediction import Fused, Scorer
from benchmarks.tal.schema import Config, ConfigError
from benchmarks.tal.scores import VideoScores
from benchmarks.tal.scores import read as read_scores
from benchmarks.tal.suppression import Suppression
from benchmarks.tal.training import Classification, Localization, Run
from revwire.measure import peak_bytes

INTENDED = (
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning),  # Lightning 2.6 asks torch 2.14 so
    (r"Checkpoint directory .* exists and is not empty", UserWarning),  # where a run is resumed
    (
        r"Found \d+ module\(s\) in eval mode at the start of training",
        UserWarning,
    ),  # norms and backbones that are frozen
    (r"The '(train|val)_dataloader' does not have many workers", UserWarning),  # data.workers says how many
)
"""What Lightning warns of though it is as it should be."""


def trainer(config: Config, callbacks: list[Callback], progress: bool) -> L.Trainer:
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
        logger=[CSVLogger(config.folder, name="csv"), TensorBoardLogger(config.folder, name="tensorboard")],
        callbacks=callbacks,
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


def checkpoints(config: Config) -> ModelCheckpoint:
    """Keep the latest state of the run."""
    every = config.training.save_every
    return ModelCheckpoint(
        config.folder / "checkpoints",
        "step{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=every,
        save_top_k=1,
    )


def latest(config: Config) -> Path:
    """The latest checkpoint of a run.

    Raises:
        ConfigError: it has none.
    """
    found = sorted(
        (config.folder / "checkpoints").glob("step*.ckpt"), key=lambda path: int(path.stem.removeprefix("step"))
    )
    if not found:
        raise ConfigError(f"{config.folder}: there is no checkpoint to go on from; train without --resume")
    return found[-1]


# -- what a run is made of ---------------------------------------------------------------------------------------------


def prepared(config: Config) -> tuple[Run, Data]:
    """The module and the data of a configuration.

    Raises:
        ConfigError, ValueError, OSError: something of it is not there, or does not fit.
    """
    if config.training.strategy == "fsdp" and config.training.ema is not None:
        raise ConfigError(
            "training.ema: got an average of weights that are sharded; expected null with training.strategy=fsdp"
        )
    L.seed_everything(config.seed, verbose=False)
    return _classification(config) if config.task == "classification" else _localization(config)


def _localization(config: Config) -> tuple[Run, Data]:
    truth = loading.truth(config)
    data = Data(
        config, loading.dataset(config, truth.training, True), loading.dataset(config, truth.test, False), clips.collate
    )
    network = networks.build(config, 1 if config.class_agnostic else len(truth.classes), loading.root(config))
    networks.observe(network, config)
    tested = truth.test.only({video.id for video, _ in data.test.items})
    scorer = Scorer(
        tested,
        truth.classes,
        Suppression(**config.suppression),
        fused(config, tested),
        config.thresholds,
        predictions(config),
    )
    return Localization(network, config.training, config.seed, scorer), data


def _classification(config: Config) -> tuple[Run, Data]:
    training, test = (loading.labelled(config, subset) for subset in (True, False))
    network = networks.build(config, len(training.classes), loading.root(config))
    networks.observe(network, config)
    return Classification(network, config.training, config.seed), Data(config, training, test, folders.collate)


def predictions(config: Config) -> Path:
    """Where a run's detections are written."""
    return config.folder / "predictions.json"


def fused(config: Config, tested: Annotations) -> Fused | None:
    """The classes of the tested videos, where a file is to say them.

    Raises:
        ConfigError: a localizer without classes has no such file, or the file lacks videos.
    """
    if config.data.class_scores is None:
        if config.class_agnostic:
            raise ConfigError("data.class_scores: got None; expected a file of classes, as class_agnostic is true")
        return None
    scores = read_scores(loading.path(config, "class_scores"), tested.classes)
    lacking = [video.id for video in tested.videos if not _has(scores, video.id)]
    if lacking:
        raise ConfigError(
            f"data.class_scores: no class for {len(lacking)} of {len(tested.videos)} videos, {lacking[0]!r} first"
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
    cost = Cost()
    averages = [] if config.training.ema is None else [Average(config.training.ema)]
    runner = trainer(config, [cost, *averages, checkpoints(config), *further], progress)
    if runner.is_global_zero:
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    runner.fit(module, data, ckpt_path=resume)
    runner.validate(module, data, verbose=False)
    found = row(config, module, data, runner, cost)
    record = Record("result", "ok", None, dataclasses.asdict(config), [found], environment(module.device.type))
    if runner.is_global_zero:
        record.write(config.folder)
    return record


def evaluate(config: Config, checkpoint: Path, progress: bool = True) -> dict[str, float]:
    """Test the weights of a checkpoint (the averaged ones, where they were averaged): figures by name."""
    module, data = prepared(config)
    restore(module, checkpoint)
    trainer(config, [], progress).validate(module, data, verbose=False)
    return figures(module.trainer)


def restore(module: Run, checkpoint: Path) -> None:
    """Load the weights of a checkpoint; the averaged ones, where they were averaged. No code of the file is run."""
    held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    averaged = held.get("callbacks", {}).get(Average.__name__, {}).get("average", {})
    module.load_state_dict(held["state_dict"] | averaged)


def predict(
    config: Config, checkpoint: Path, folder: Path | None, output: Path, progress: bool = True
) -> dict[str, list[Any]]:
    """Write what a checkpoint detects in the videos of a folder (None: those of the test subset) to ``output``, and
    return it.

    Raises:
        ConfigError, ValueError: there is no video, or no class for one of them.
    """
    module, data = prepared(config)
    assert isinstance(module, Localization)
    scorer = module.scorer
    scorer.path, scorer.truth = output, None
    if folder is not None:
        found = loading.unannotated(folder, scorer.classes)
        data.test = loading.dataset(config, found, False, folder)
        scorer.fused = fused(config, found)
    restore(module, checkpoint)
    trainer(config, [], progress).validate(module, data, verbose=False)
    return json.loads(output.read_text(encoding="utf-8"))["results"]


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
