"""For Lightning: callbacks that convert a network when training starts, move its coupling while it trains, and keep in
checkpoints the form in which it was trained. Needs ``pip install 'revwire[lightning]'``.

Nothing else in revwire needs Lightning, and ``import revwire`` does not import this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from math import inf
from typing import Any, Literal

from torch import nn

from revwire._api import config
from revwire._api.in_training import InTraining
from revwire._api.schedule import CouplingSchedule, Shape
from revwire._errors import ConversionError, CouplingError, FunctionLostWarning
from revwire._forwards.converted import converted
from revwire._plan.plan import Plan
from revwire.couplings.base import Coupling

try:
    from lightning.pytorch import Callback, LightningModule, Trainer  # type: ignore[import-not-found, unused-ignore]
except ImportError as error:
    raise ImportError("revwire.lightning: Lightning is not installed; pip install 'revwire[lightning]'") from error


CHECKPOINT_KEY = "revwire"
"""Under which name a checkpoint holds the plans of converted networks, by their names in the LightningModule."""


class ConfigCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Keeps in Lightning's checkpoints the form in which a converted network is trained: its plan, with the couplings
    that it has when the checkpoint is saved (see `revwire.save_config`); `config_of` reads it.

    A checkpoint that is loaded into a network of another form warns (`revwire.FunctionLostWarning`) where that loses
    what was trained.

    Args:
        submodule: name of the converted network inside the LightningModule; None: the only one there is.

    Raises:
        CouplingError: when a checkpoint is saved, no converted network of that name.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from revwire.lightning import ConfigCallback
        >>> options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        >>> trainer = Trainer(max_epochs=3, callbacks=[ConfigCallback()], **options)
    """

    def __init__(self, submodule: str | None = None) -> None:
        super().__init__()
        self.submodule = submodule

    @property
    def state_key(self) -> str:
        """Under which name Lightning keeps its state: one for each network."""
        return f"{type(self).__qualname__}[{self.submodule}]"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the form down."""
        name, network = self._network(pl_module)
        checkpoint.setdefault(CHECKPOINT_KEY, {})[name] = config.config_of(network).to_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warn where the network has another form than that in which its weights were trained."""
        for name, data in checkpoint.get(CHECKPOINT_KEY, {}).items():
            network = dict(pl_module.named_modules()).get(name)
            if network is not None and self.submodule in (None, name):
                with suppress(CouplingError):  # of a coupling that is not known here, nothing can be said
                    self._compare(network, name, Plan.from_dict(data, couplings=_couplings_of(network)))

    def _compare(self, network: nn.Module, name: str, trained: Plan) -> None:
        here = _couplings_of(network)
        then = [u.scheme for u in trained.units]
        names = config.lost(then, here or repeat(None))
        if names:
            where = "the form that it has here" if here else "the original wiring"
            warnings.warn(config.lost_words(name or trained.model, names, where), FunctionLostWarning, stacklevel=2)

    def _network(self, module: nn.Module) -> tuple[str, nn.Module]:
        found: dict[str, nn.Module] = {name: m for name, m in module.named_modules() if _is_converted(m)}
        wanted = list(found) if self.submodule is None else [self.submodule]
        if len(wanted) != 1 or wanted[0] not in found:
            names = ", ".join(map(repr, found)) or "none"
            raise CouplingError(
                f"{type(self).__name__}: got converted networks {names} in {type(module).__name__}; expected "
                + ("one" if self.submodule is None else repr(self.submodule))
                + "; pass submodule=, and convert before training starts"
            )
        return wanted[0], found[wanted[0]]


class RevwireCallback(ConfigCallback):
    """Converts a network inside of a LightningModule by its first call in training, with the arguments, the precision
    and the device of training; sanity checks before it do not count. Keeps its form in checkpoints, as a
    `ConfigCallback` does, and takes it from there where a run is resumed, whatever the options say.

    Logs for each step, to whichever loggers the `Trainer` has, ``revwire/step_seconds``; in MiB what a step needs at
    its peak above rest, ``revwire/planned_mib``, and would have needed, ``revwire/checkpointing_mib`` (each block
    checkpointed) and ``revwire/stored_mib`` (as it was); and on accelerators ``revwire/peak_mib``, what was allocated
    at most since conversion (statistics of the allocator are reset then).

    Args:
        submodule: name of the network inside the LightningModule; None: its only child that has parameters.
        example_inputs: convert in ``setup``, by this example, as `revwire.convert` takes it: for what wraps the network
            in a way that must come after conversion (FSDP).
        revert_at_end: give the network its original wiring back when fitting ends.
        recalibrate_every: after so many optimizer steps, fit the predictors of the ``"innovation"`` couplings to the
            last batch; None: never.
        **options: those of `revwire.convert` (``coupling=``, ``memory_budget=``, ``checkpoint=``, ``plan=``,
            ``calibrate=`` ...), but for ``strict``.

    Raises:
        ConversionError: no such option; or when training starts, no such network, or one that is wrapped (FSDP).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from revwire.lightning import RevwireCallback
        >>> callback = RevwireCallback("model", coupling="bdia", revert_at_end=True)
        >>> options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        >>> trainer = Trainer(max_epochs=3, callbacks=[callback], **options)
    """

    def __init__(
        self,
        submodule: str | None = None,
        *,
        example_inputs: Any = None,
        revert_at_end: bool = False,
        recalibrate_every: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(submodule)
        self._training = InTraining(type(self).__name__, options, example_inputs, revert_at_end, recalibrate_every)
        self._trained: Plan | None = None
        self._seen = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert, if there is an example."""
        if stage == "fit" and self._training.example is not None:
            self._training.prepare(self._to_convert(pl_module)[1])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the form in which weights were trained."""
        data = checkpoint.get(CHECKPOINT_KEY, {}).get(self._to_convert(pl_module)[0])
        self._trained = data and Plan.from_dict(data, couplings=self._training.couplings(), where="checkpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the first call convert the network; as its checkpoint says, where there is one."""
        self._training.begin(self._to_convert(pl_module)[1], self._trained)
        self._trained, self._seen = None, trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the clock, with the first batch of an optimizer step."""
        if trainer.global_step != self._seen or batch_idx == 0:
            self._seen = trainer.global_step
            self._training.step_begins()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look at the clock, calibrate again where it is time, and log."""
        if trainer.global_step == self._seen:  # gradients accumulate
            return
        self._training.step_ends(trainer.precision_plugin.forward_context())
        pl_module.log_dict(self._training.metrics(), on_step=True, on_epoch=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the form down, once there is one."""
        name, network = self._to_convert(pl_module)
        if _is_converted(network):
            checkpoint.setdefault(CHECKPOINT_KEY, {})[name] = config.config_of(network).to_dict()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give back the original wiring, if that was asked for, once everything is saved."""
        self._training.end()

    def _to_convert(self, module: LightningModule) -> tuple[str, nn.Module]:
        found = {name: m for name, m in module.named_children() if any(True for _ in m.parameters())}
        if self.submodule is not None:
            found = {name: m for name, m in module.named_modules() if name == self.submodule}
        if len(found) != 1:
            names = ", ".join(repr(name) for name, m in module.named_children()) or "none"
            raise ConversionError(
                f"{type(self).__name__}: got the networks {names} in {type(module).__name__}; expected "
                + ("one with parameters" if self.submodule is None else repr(self.submodule))
                + "; pass submodule="
            )
        return next(iter(found.items()))


class CouplingCallback(ConfigCallback):
    """Steps a `revwire.CouplingSchedule` after each optimizer step or epoch, and keeps its state in Lightning's
    checkpoints, as a `ConfigCallback` keeps the form of the network.

    The way begins at the coupling that the network has when training starts. Accumulated gradients count as the one
    optimizer step that they make.

    Args:
        target: the coupling at the end.
        interval: ``"step"``: after each optimizer step; ``"epoch"``: after each training epoch.
        total: optimizer steps or epochs after which the target is reached; None: all that the trainer is going to do.
        shape, milestones: as for `revwire.CouplingSchedule`.
        submodule: name of the converted network inside the LightningModule; None: the only one there is.

    Raises:
        CouplingError: no such interval; or, when training starts, no converted network of that name, a trainer without
            an end and no ``total``, or what `revwire.CouplingSchedule` raises.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from revwire.lightning import CouplingCallback
        >>> callback = CouplingCallback("dr2net:0,1", shape="cosine")  # for a network converted with "dr2net:1,1/16"
        >>> options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
        >>> trainer = Trainer(max_epochs=3, callbacks=[callback], **options)
    """

    def __init__(
        self,
        target: str | Coupling,
        *,
        interval: Literal["step", "epoch"] = "step",
        total: int | None = None,
        shape: Shape = "linear",
        milestones: Sequence[int] = (),
        submodule: str | None = None,
    ) -> None:
        super().__init__(submodule)
        if interval not in ("step", "epoch"):
            raise CouplingError(f"CouplingCallback: got interval {interval!r}; expected 'step' or 'epoch'")
        self.target, self.interval = target, interval
        self.total, self.shape, self.milestones = total, shape, tuple(milestones)
        self.schedule: CouplingSchedule | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._seen = 0  # optimizer steps of the trainer that the schedule has heard of

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the way, or go on where the checkpoint was."""
        network = self._network(pl_module)[1]
        if self.schedule is None or self.schedule.model is not network:
            total = None if self.shape == "step" else self._total(trainer)
            self.schedule = CouplingSchedule(
                network, self.target, total=total, shape=self.shape, milestones=self.milestones
            )
        if self._resumed is not None:
            self.schedule.load_state_dict(self._resumed)
            self._resumed = None
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Step once for each optimizer step of the batch: none while gradients accumulate."""
        made, self._seen = trainer.global_step - self._seen, trainer.global_step
        if self.interval == "step":
            self._step(made)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step, where epochs count."""
        if self.interval == "epoch":
            self._step(1)

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule; empty before training."""
        return {} if self.schedule is None else self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when training starts: Lightning restores callbacks before it has a network."""
        self._resumed = dict(state_dict) or None

    def _step(self, times: int) -> None:
        assert self.schedule is not None, "on_train_start comes first"
        for _ in range(times):
            self.schedule.step()

    def _total(self, trainer: Trainer) -> int:
        if self.total is not None:
            return self.total
        whole: float | None = trainer.estimated_stepping_batches if self.interval == "step" else trainer.max_epochs
        if whole is None or not 0 < whole < inf:
            raise CouplingError(
                f"CouplingCallback: got no total, and a trainer without an end ({whole}); expected either; pass total="
            )
        return int(whole)


def _is_converted(module: nn.Module) -> bool:
    try:
        converted(module)
    except ConversionError:
        return False
    return True


def _couplings_of(module: nn.Module) -> list[Coupling]:
    """Those of the units of a network; none where it is not converted."""
    return [c for chain in converted(module).chains for c in chain.couplings] if _is_converted(module) else []


def config_of(checkpoint: Mapping[str, Any], name: str | None = None, *, couplings: Iterable[Coupling] = ()) -> Plan:
    """The form in which a network in a checkpoint was trained, for ``revwire.convert(network, x, plan=...)``.

    Args:
        checkpoint: what `torch.load` gives of the file.
        name: of the network inside the LightningModule; None: the only one there is.
        couplings: those of your own that it had.

    Raises:
        ConversionError: the checkpoint has no such record.
    """
    found = checkpoint.get(CHECKPOINT_KEY, {})
    wanted = list(found) if name is None else [name]
    if len(wanted) != 1 or wanted[0] not in found:
        raise ConversionError(
            f"config_of: got a checkpoint with records of {list(found) or 'no network'}; expected "
            + ("one" if name is None else repr(name))
            + "; pass name=, and train with a ConfigCallback or CouplingCallback"
        )
    return Plan.from_dict(found[wanted[0]], couplings=couplings, where="checkpoint")
