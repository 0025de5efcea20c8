"""For Lightning: a callback that moves the coupling of a converted network while it trains. Needs ``pip install
'revwire[lightning]'``.

Nothing else in revwire needs Lightning, and ``import revwire`` does not import this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Literal

from torch import nn

from revwire._api.schedule import CouplingSchedule, Shape
from revwire._errors import ConversionError, CouplingError
from revwire._forwards.converted import converted
from revwire.couplings.base import Coupling

try:
    from lightning.pytorch import Callback, LightningModule, Trainer  # type: ignore[import-not-found, unused-ignore]
except ImportError as error:
    raise ImportError("revwire.lightning: Lightning is not installed; pip install 'revwire[lightning]'") from error


class CouplingCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Steps a `revwire.CouplingSchedule` after each optimizer step or epoch, and keeps its state in Lightning's
    checkpoints.

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
        super().__init__()
        if interval not in ("step", "epoch"):
            raise CouplingError(f"CouplingCallback: got interval {interval!r}; expected 'step' or 'epoch'")
        self.target, self.interval, self.submodule = target, interval, submodule
        self.total, self.shape, self.milestones = total, shape, tuple(milestones)
        self.schedule: CouplingSchedule | None = None
        self._resumed: Mapping[str, Any] | None = None
        self._seen = 0  # optimizer steps of the trainer that the schedule has heard of

    @property
    def state_key(self) -> str:
        """Under which name Lightning keeps its state: one for each network."""
        return f"{type(self).__qualname__}[{self.submodule}]"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the way, or go on where the checkpoint was."""
        if self.schedule is None or self.schedule.model is not self._network(pl_module):
            total = None if self.shape == "step" else self._total(trainer)
            network = self._network(pl_module)
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

    def _network(self, module: nn.Module) -> nn.Module:
        found: dict[str, nn.Module] = {name: m for name, m in module.named_modules() if _is_converted(m)}
        wanted = list(found) if self.submodule is None else [self.submodule]
        if len(wanted) != 1 or wanted[0] not in found:
            names = ", ".join(map(repr, found)) or "none"
            raise CouplingError(
                f"CouplingCallback: got converted networks {names} in {type(module).__name__}; expected "
                + ("one" if self.submodule is None else repr(self.submodule))
                + "; pass submodule=, and convert before training starts"
            )
        return found[wanted[0]]


def _is_converted(module: nn.Module) -> bool:
    try:
        converted(module)
    except ConversionError:
        return False
    return True
