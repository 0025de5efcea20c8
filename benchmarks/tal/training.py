"""Training under Lightning: what a step is, what is logged, how parameters move.

Note [Randomness of a step]
    The k-th batch of a run draws from generators that are seeded with (seed, k, process) when it begins. So a run that
    is resumed there goes on as if it had never stopped, and no generator's state has to be kept.

Note [One pass]
    A run is one Lightning epoch of ``steps x accumulate`` batches, cut from an endless sequence of shuffled passes over
    the data (`loading.Batches`). Evaluation comes every so many steps, not at the end of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from benchmarks.tal.networks import Classifier, Network, layers
from benchmarks.tal.prediction import Scorer
from benchmarks.tal.schema import Training


class Run(L.LightningModule):
    """What localization and classification share: losses, optimizer, schedule, randomness, sharding.

    Args:
        network: whose call takes a batch and returns named losses; their sum is minimised.
        training: how.
        seed: of the run.
        origin: what its checkpoints say of it, in plain values.
    """

    figure: str
    """Of a test, the one by which weights are better."""

    def __init__(
        self, network: Network | Classifier, training: Training, seed: int, origin: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.origin = dict(origin or {})
        self.network = network
        self.options = training
        self.seed = seed
        self._sharded = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint can be used without the run's configuration and annotations."""
        checkpoint["origin"] = self.origin

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """See Note [Randomness of a step]."""
        torch.manual_seed(hash((self.seed, batch_idx, self.global_rank)) % 2**63)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the losses, each of which is logged."""
        losses = self.network(batch)
        total = torch.stack(list(losses.values())).sum()
        self.log_dict({f"train/{name}": loss.detach() for name, loss in losses.items()}, batch_size=1)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=1)
        return total

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW, its rates warmed up linearly, then annealed by a cosine; per step."""
        optimizer = torch.optim.AdamW(groups(self.network, self.options))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, annealed(self.options))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        """Under FSDP: shard each block of the backbone, then the rest of the network."""
        if not isinstance(self.trainer.strategy, ModelParallelStrategy) or self._sharded:
            return
        _without_scalars(self.network)
        mesh = self.device_mesh["data_parallel"]
        for name in self.network.blocks:
            fully_shard(self.network.backbone.get_submodule(name), mesh=mesh)
        fully_shard(self.network, mesh=mesh)
        for method in ("decode", "logits"):  # called in testing, where weights must be gathered as they are for forward
            if hasattr(self.network, method):
                register_fsdp_forward_method(self.network, method)
        self._sharded = True


def _without_scalars(network: nn.Module) -> None:
    """Scalar parameters as vectors of one number, for `fully_shard` takes no others; a checkpoint of either loads into
    either.
    """
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


class Localization(Run):
    """Training and testing of a localizer, end to end or on a frozen backbone."""

    figure = "mAP"

    def __init__(
        self,
        network: Network,
        training: Training,
        seed: int,
        scorer: Scorer,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(network, training, seed, origin)
        self.scorer = scorer

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self.scorer.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Keep what is detected."""
        self.scorer.add(batch, self.network.decode(batch))

    def on_validation_epoch_end(self) -> None:
        """Merge windows and processes, thin out, and score."""
        self.log_dict({f"test/{name}": value for name, value in self.scorer.score().items()})


class Classification(Run):
    """Training and testing of a backbone on labelled clips."""

    network: Classifier
    figure = "top1"

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Top-1 accuracy."""
        frames, labels = batch
        right = (self.network.logits(frames).argmax(1) == labels).float().mean()
        self.log("test/top1", right, batch_size=len(labels), sync_dist=True, prog_bar=True)


# -- optimizer ---------------------------------------------------------------------------------------------------------


def groups(network: Network | Classifier, options: Training) -> list[dict[str, Any]]:
    """Parameters by rate and decay: rates fall by ``layer_decay`` per layer towards the input; norms and biases do not
    decay.
    """
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, rate in _rates(network, options):
        if parameter.requires_grad:
            decay = 0.0 if sum(extent > 1 for extent in parameter.shape) <= 1 else options.weight_decay
            found.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in sorted(found.items(), key=lambda g: g[0])
    ]


def _rates(network: Network | Classifier, options: Training) -> Iterable[tuple[nn.Parameter, float]]:
    if network.backbone is not None:
        last = len(network.blocks)
        for _, parameter, layer in layers(network.backbone, network.blocks):
            yield parameter, options.backbone_lr * options.layer_decay ** (last - layer)
    for parameter in network.head.parameters():
        yield parameter, options.lr


def annealed(options: Training) -> Callable[[int], float]:
    """Step -> factor of the learning rates."""
    end = options.schedule or options.steps

    def factor(step: int) -> float:
        if step < options.warmup:
            return (step + 1) / options.warmup
        done = min(1.0, (step - options.warmup) / max(1, end - options.warmup))
        return options.final + (1 - options.final) * (1 + math.cos(math.pi * done)) / 2

    return factor
