"""Weights that are kept while a run goes on, and what stands beside them, so that a checkpoint alone can be used.

Of a run's folder ``checkpoints``: ``stepN.ckpt``, its latest state (every so many steps, and always at the end), and
``best.ckpt``, the state that did best when it was tested.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from benchmarks.tal.callbacks import Average
from benchmarks.tal.config import from_tree
from benchmarks.tal.schema import Config, ConfigError

BEST, LAST = "best", "last"
"""What a checkpoint may be called instead of its path."""

ELSEWHERE = ("name", "seed", "output", "data", "training", "suppression", "thresholds", "recall", "measure")
"""Sections of a configuration that say nothing of the network."""


def folder(config: Config) -> Path:
    """Where a run keeps its checkpoints."""
    return config.folder / "checkpoints"


def latest(config: Config) -> Path:
    """The latest checkpoint of a run.

    Raises:
        ConfigError: it has none.
    """
    found = sorted(folder(config).glob("step*.ckpt"), key=lambda path: int(path.stem.removeprefix("step")))
    if not found:
        raise ConfigError(f"{config.folder}: there is no checkpoint to go on from; train without --resume")
    return found[-1]


def named(config: Config | None, name: str | Path) -> Path:
    """The checkpoint of that name: ``best`` or ``last`` of a run, or a path.

    Raises:
        ConfigError: it is not there, or a name of no run.
    """
    if str(name) not in (BEST, LAST):
        path = Path(name)
    elif config is None:
        raise ConfigError(f"checkpoint: got {str(name)!r} of no run; give --config, or the path of a checkpoint")
    else:
        path = latest(config) if str(name) == LAST else folder(config) / "best.ckpt"
    if not path.is_file():
        raise ConfigError(f"checkpoint: there is no {path}; expected 'best', 'last' or the path of a checkpoint")
    return path


class Kept(Callback):
    """Saves the state of a run, one of them at a time, and the best one.

    Args:
        config: of the run. figure: of the tests, by which states are better. resumed: whether an earlier best counts.
    """

    def __init__(self, config: Config, figure: str, resumed: bool = False) -> None:
        self.folder, self.figure = folder(config), figure
        self.every, self.end = config.training.save_every, config.training.steps
        self.saved: tuple[int, Path] | None = None
        note = self.folder / "best.json"
        self.best: dict[str, Any] | None = json.loads(note.read_text()) if resumed and note.is_file() else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A state that a run goes on from is there already."""
        path = self._path(trainer.global_step)
        if path.is_file():
            self.saved = trainer.global_step, path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, every so many optimizer steps and at the last one; the state before goes."""
        step = trainer.global_step
        if step in (0, self.saved and self.saved[0]) or (step % self.every and step != self.end):
            return
        before, self.saved = self.saved, (step, self._path(step))
        trainer.save_checkpoint(self.saved[1])
        if before is not None and trainer.is_global_zero:
            before[1].unlink(missing_ok=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the state that was tested, if none did better."""
        step, value = trainer.global_step, float(trainer.callback_metrics[f"test/{self.figure}"])
        if self.best is not None and value <= self.best[self.figure]:
            return
        self.best = {"step": step, self.figure: value}
        best = self.folder / "best.ckpt"
        if self.saved is None or self.saved[0] != step:
            trainer.save_checkpoint(best)
        elif trainer.is_global_zero:
            shutil.copyfile(self.saved[1], best)
        if trainer.is_global_zero:
            (self.folder / "best.json").write_text(json.dumps(self.best) + "\n", encoding="utf-8")

    def _path(self, step: int) -> Path:
        return self.folder / f"step{step}.ckpt"


def set_aside(config: Config) -> None:
    """Rename the checkpoints of an earlier run in the same place, so that they are not taken for this one's."""
    if not folder(config).is_dir():
        return
    count = 1
    while (aside := folder(config).with_name(f"checkpoints_before_{count}")).exists():
        count += 1
    folder(config).rename(aside)


# -- what a checkpoint holds -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A checkpoint that was read. ``config`` and ``classes`` are None in files that came without."""

    path: Path
    weights: Mapping[str, Tensor]
    """The averaged ones, where they were averaged."""
    groups: tuple[int, ...]
    """Sizes of the optimizer's groups of parameters."""
    step: int
    config: Config | None
    classes: tuple[str, ...] | None

    def alone(self, overrides: Sequence[str] = ()) -> Config:
        """The configuration of the run, for one process on whatever machine this is.

        Raises:
            ConfigError: the checkpoint came without.
        """
        if self.config is None:
            raise ConfigError(f"{self.path}: it does not say its configuration; give --config")
        one = dataclasses.replace(
            self.config.training, devices=1, nodes=1, strategy="auto", accelerator="auto", ema=None
        )
        return from_tree(dataclasses.asdict(dataclasses.replace(self.config, training=one)), str(self.path), overrides)

    def into(self, module: nn.Module, config: Config) -> None:
        """Write the weights into the module of a run.

        Raises:
            ConfigError: they are another network's; names what differs.
        """
        self.check(module, config)
        module.load_state_dict(self.weights)

    def check(self, module: nn.Module, config: Config) -> None:
        """Whether they are this network's: see :meth:`into`."""
        own = module.state_dict()
        faults = [f"it lacks {name}" for name in own if name not in self.weights]
        faults += [f"it has {name}" for name in self.weights if name not in own]
        faults += [
            f"{name} is {_shape(value)}, and {_shape(own[name])} here"
            for name, value in self.weights.items()
            if name in own and value.shape != own[name].shape and value.numel() * own[name].numel() != 1
        ]
        if faults:
            raise ConfigError(f"{self.path}: it holds another network: {self._differences(config) or faults[0]}")

    def check_optimizer(self, sizes: Sequence[int], config: Config) -> None:
        """Whether an optimizer of groups of so many parameters can go on.

        Raises:
            ConfigError: it has other groups.
        """
        if self.groups and tuple(sizes) != self.groups:
            said = self._differences(config) or f"groups of {self.groups} there, and of {tuple(sizes)} here"
            raise ConfigError(f"{self.path}: its optimizer moves another set of parameters: {said}")

    def _differences(self, config: Config) -> str:
        """What the configurations say differently of the network."""
        if self.config is None:
            return ""
        theirs, ours = (dict(_leaves(dataclasses.asdict(c))) for c in (self.config, config))
        keys = [k for k in theirs | ours if k.split(".")[0] not in ELSEWHERE and theirs.get(k) != ours.get(k)]
        return "; ".join(f"{k} is {theirs.get(k)!r} there, and {ours.get(k)!r} here" for k in keys)


def _shape(value: Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "one number"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read(path: Path) -> Trained:
    """What a checkpoint holds. No code of the file is run.

    Raises:
        ConfigError: it is no checkpoint of a run.
    """
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{path}: it cannot be read as a checkpoint ({reason})") from None
    if not isinstance(held, dict) or "state_dict" not in held:
        raise ConfigError(f"{path}: it is no checkpoint of a run; expected one that `train` wrote")
    averaged = held.get("callbacks", {}).get(Average.__name__, {}).get("average", {})
    optimizers = held.get("optimizer_states") or [{"param_groups": ()}]
    groups = tuple(len(group["params"]) for group in optimizers[0]["param_groups"])
    origin = held.get("origin", {})
    config = from_tree(origin["config"], str(path)) if "config" in origin else None
    classes = tuple(origin["classes"]) if "classes" in origin else None
    return Trained(path, held["state_dict"] | averaged, groups, held.get("global_step", 0), config, classes)
