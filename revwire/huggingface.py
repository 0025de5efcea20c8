"""For Hugging Face's `Trainer`, and those that are made of it (TRL's): a callback that converts the network when
training starts, logs what that gains, and keeps in checkpoints the form in which it is trained. Needs ``pip install
'revwire[hf]'``.

Nothing else in revwire needs transformers, and ``import revwire`` does not import this file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from revwire._api.config import load_config, save_config
from revwire._api.in_training import InTraining
from revwire._api.rival import switched
from revwire._errors import ConversionError
from revwire._forwards.converted import is_converted

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
except ImportError as error:
    raise ImportError("revwire.huggingface: transformers is not installed; pip install 'revwire[hf]'") from error


CONFIG_NAME = "revwire.json"
"""The file beside the weights that `revwire.load_config` reads."""


class RevwireCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Converts the `Trainer`'s model by the first call of training, with the arguments, the autocast and the device of
    training; a reference pass or an evaluation before it does not count.

    The model's own activation checkpointing (``activation_checkpointing=True``, the default of some trainers) is
    switched off: the plan says what is checkpointed.

    Checkpoints, and whatever ``model.save_pretrained`` writes, hold ``revwire.json`` (see `revwire.save_config`). A run
    that is resumed takes its form from there, whatever the options say.

    The rows that the `Trainer` logs, to whichever of its loggers, have ``revwire/step_seconds``; in MiB what a step
    needs at its peak above rest, ``revwire/planned_mib``, and would have needed, ``revwire/checkpointing_mib`` (each
    block checkpointed) and ``revwire/stored_mib`` (as it was); and on accelerators ``revwire/peak_mib``, what was
    allocated at most since conversion (statistics of the allocator are reset then).

    Args:
        example_inputs: convert when the `Trainer` is made, by this example, as `revwire.convert` takes it: for what
            wraps the model in a way that must come after conversion (FSDP).
        revert_at_end: give the model its original wiring back when training ends.
        recalibrate_every: after so many optimizer steps, fit the predictors of the ``"innovation"`` couplings to the
            last batch; None: never.
        **options: those of `revwire.convert` (``coupling=``, ``memory_budget=``, ``checkpoint=``, ``plan=``,
            ``calibrate=`` ...), but for ``strict``.

    Raises:
        ConversionError: no such option; or when training starts, a model that is wrapped (FSDP), or runs on several
            devices in one process (DataParallel).

    Example:
        >>> from transformers import Trainer
        >>> from revwire.huggingface import RevwireCallback
        >>> callback = RevwireCallback(coupling="bdia", revert_at_end=True)
        >>> trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        example_inputs: Any = None,
        revert_at_end: bool = False,
        recalibrate_every: int | None = None,
        **options: Any,
    ) -> None:
        self._network = InTraining(type(self).__name__, options, example_inputs, revert_at_end, recalibrate_every)
        self._saves: _SavesConfig | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Convert, if there is an example."""
        if self._network.example is not None:
            self._switch_off(kwargs["model"])
            self._network.prepare(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the first call convert the model; as its checkpoint says, where there is one."""
        model: nn.Module = kwargs["model"]
        trainer, folder = _caller(self)
        if trainer is not None:  # loggers come before callbacks: what is to be in their rows has to be there before
            handler = trainer.callback_handler
            handler.callbacks = [self, *(c for c in handler.callbacks if c is not self)]
        if args.n_gpu > 1 and self._network.example is None:
            raise ConversionError(
                f"RevwireCallback: got {args.n_gpu} devices in one process (DataParallel), which runs copies of the "
                "model; expected a process for each device: torchrun or accelerate launch; or pass example_inputs="
            )
        self._switch_off(model)
        config = Path(folder or _last_checkpoint(args, state)) / CONFIG_NAME
        trained = load_config(config, couplings=self._network.couplings()) if config.exists() else None
        self._network.begin(model, trained)
        if self._saves is None and hasattr(model, "save_pretrained"):
            self._saves = _SavesConfig(model)

    def _switch_off(self, model: nn.Module) -> None:
        """The model's own checkpointing, which is on by default in some trainers: what a plan saw under it, it could
        not make leaner.
        """
        if self._network.mine or not is_converted(model):
            switched(model, on=False)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at the clock."""
        self._network.step_begins()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the clock, and calibrate again where it is time."""
        self._network.step_ends()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add to the row of a step what it needs, and would have needed."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            metrics = self._network.metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the form beside weights, also of models that have no ``save_pretrained``."""
        folder = Path(_last_checkpoint(args, state))
        if args.should_save and folder.is_dir() and is_converted(kwargs["model"]):
            save_config(kwargs["model"], folder / CONFIG_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give back the original wiring, if that was asked for."""
        self._network.end()
        if self._saves is not None and not is_converted(kwargs["model"]):
            self._saves.remove()
            self._saves = None


class _SavesConfig:
    """Stands in for the ``save_pretrained`` of a model, and writes the form in which it is trained there too."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.original = model, vars(model).get("save_pretrained")
        vars(model)["save_pretrained"] = self

    def __call__(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> Any:
        if is_converted(self.model) and kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            save_config(self.model, Path(save_directory) / CONFIG_NAME)  # before: it may push the folder to a hub
        own: Any = type(self.model)
        plain = self.original or own.save_pretrained.__get__(self.model)
        return plain(save_directory, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there."""
        vars(self.model).pop("save_pretrained", None)
        if self.original is not None:
            vars(self.model)["save_pretrained"] = self.original


def _last_checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    """Where a `Trainer` saves at this step."""
    return str(Path(args.output_dir or ".") / f"checkpoint-{state.global_step}")


def _caller(callback: TrainerCallback) -> tuple[Trainer | None, str | None]:
    """The `Trainer` that calls a callback, and the checkpoint from which it resumes.

    A callback is told neither. Both are found on the stack: a method of the `Trainer` that has them calls it, and the
    name of the argument is that of its public ``train``.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            folder = frame.f_locals.get("resume_from_checkpoint")
            return caller, folder if isinstance(folder, str) else None
        frame = frame.f_back
    return None, None
