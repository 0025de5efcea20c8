"""The network of a run: a backbone, a localizer or a classifier, and the one line that says how activations are
kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import revwire
from benchmarks.tal import localizers
from benchmarks.tal.backbones import NETWORKS, Backbone, SlowFast, VideoMAE, VideoSwin, load_published
from benchmarks.tal.backbones.published import load_all, subtree
from benchmarks.tal.clips import Batch
from benchmarks.tal.schema import Config, ConfigError

STORED, CHECKPOINT, LEANEST, STAYS, FLOAT = "stored", "checkpoint", "leanest", "stays", "float"
"""Values of ``memory`` that are not couplings of `revwire.convert`."""

CLIPS = "clips"
"""Behind a plus in ``memory``: the backbone sees clips one after the other, and keeps none."""

EXAMPLE = 8
"""Frames on which a backbone is observed when it is rewired, in units of those that it needs a multiple of."""

NOWHERE = Path()
"""Where the weights of a network lie that has none."""


def build(config: Config, classes: int, root: Path) -> Network | Classifier:
    """The network of a configuration, its activations stored; `rewire` comes next.

    Args:
        classes: that it tells apart. root: where weights lie.

    Raises:
        ConfigError: there is no such file of weights, or options of a network do not fit together. KeyError: the file
            has other parameters.
    """
    with torch.random.fork_rng(devices=[]):  # a head's first weights are the same on extracted features
        backbone = None if config.data.features.path else _backbone(config, root)
    if config.task == "classification":
        assert backbone is not None  # `loading` has refused features
        return Classifier(backbone, classes)
    channels = config.data.features.channels if backbone is None else backbone.channels
    try:
        head = localizers.LOCALIZERS[config.localizer](channels, classes, **getattr(config, config.localizer))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.localizer}: {error}") from None
    return Network(backbone, head)


def _backbone(config: Config, root: Path) -> Backbone:
    options, (_, in_clips) = config.backbone, clips_of(config.memory)
    try:
        network = NETWORKS[options.name](**options.options)
        backbone = Backbone(
            network,
            steps=config.sampling.steps,
            clip_frames=options.chunk or (_clip(options.name, network) if in_clips else None),
            checkpoint_clips=in_clips and not options.frozen,
            freeze_norms=options.freeze_norms,
            frozen=options.frozen,
            mean=options.mean,
            std=options.std,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backbone: {error}") from None
    if options.weights is not None:
        load_weights(backbone.network, root / options.weights)
    return backbone


def _clip(name: str, network: Any) -> int:
    """Frames of a clip that a network sees by itself anyway.

    Raises:
        ConfigError: its clips see one another.
    """
    if not getattr(network, "clips_apart", False):
        raise ConfigError(
            f"memory: got '+{CLIPS}' with {name}, which looks from clip to clip (by attention, convolutions or "
            "adapters in time); expected backbone.chunk=N, with which each clip of N frames is seen alone: another "
            "function, and features of a clip's ends differ from those of the whole"
        )
    return int(network.frame_stride)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load weights by key: of the published backbone, of the model zoo's model, or of a run here; a classifier in them
    is left out.

    Raises:
        ConfigError: no such file. KeyError: it lacks parameters of the network.
    """
    if not path.is_file():
        raise ConfigError(
            f"backbone.weights: there is no {path}; the README says where to get it, and null means random weights"
        )
    if isinstance(network, VideoSwin | SlowFast | VideoMAE):
        load_published(network, path)
        return
    own = set(network.model.state_dict())
    state = subtree(path, next(name for name, _ in network.model.named_parameters()))
    load_all(network.model, {name: value for name, value in state.items() if name in own})


class Network(nn.Module):
    """A batch -> named losses; in eval mode `decode` gives detections.

    Attributes:
        backbone: frames -> features, or None where the data are features.
        head: the localizer.
        blocks: names of the modules that hold the backbone's residual units, in order; empty until `rewire`.
    """

    def __init__(self, backbone: Backbone | None, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.blocks: tuple[str, ...] = ()

    def features(self, batch: Batch) -> Tensor:
        """(batch, channels, steps)."""
        return batch.features if self.backbone is None else self.backbone(batch.frames, batch.mask)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.head.losses(self.features(batch), batch.mask, list(batch.segments), list(batch.labels))

    def decode(self, batch: Batch) -> list[Any]:
        """Detections of each clip, in steps."""
        return self.head.decode(self.features(batch), batch.mask)


class Classifier(nn.Module):
    """The paper's first stage: a backbone, and a linear layer over the mean of its features. A batch of clips -> named
    losses.
    """

    def __init__(self, backbone: Backbone, classes: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(backbone.channels, classes))
        self.blocks: tuple[str, ...] = ()

    def logits(self, frames: Tensor) -> Tensor:
        """(batch, classes)."""
        return self.head(self.backbone(frames).mean(2))

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        frames, labels = batch
        return {"classification": F.cross_entropy(self.logits(frames), labels)}


# -- how activations are kept ------------------------------------------------------------------------------------------


class Rewiring(NamedTuple):
    """What a spelling such as ``re2tal+8chunks+stays`` asks of `revwire.convert`.

    Attributes:
        coupling: its name.
        chunks: into how many chunks units are cut.
        checkpoint: ``"stays"`` where the blocks that cannot be rewired are checkpointed.
        exact: False where streams are floats, as OpenTAD's are; None: as the coupling has them by itself.
    """

    coupling: str
    chunks: int = 1
    checkpoint: str | None = None
    exact: bool | None = None


def clips_of(memory: str) -> tuple[str, bool]:
    """``memory`` without "+clips", and whether that stood there."""
    first, *rest = memory.split("+")
    return "+".join([first, *(part for part in rest if part != CLIPS)]), CLIPS in rest


def rewiring_of(memory: str) -> Rewiring:
    """What ``memory`` spells.

    Raises:
        ConfigError: what stands behind a plus is no number of chunks, nor "stays", nor "float".
    """
    found = Rewiring(memory.split("+")[0])
    for rest in memory.split("+")[1:]:
        count = rest.removesuffix("chunks")
        if rest == STAYS:
            found = found._replace(checkpoint=STAYS)
        elif rest == FLOAT:
            found = found._replace(exact=False)
        elif count != rest and count.isdecimal() and int(count) > 0:
            found = found._replace(chunks=int(count))
        else:
            raise ConfigError(
                f"memory: got {memory!r}; expected a coupling, and behind a plus its chunks, 'stays' to checkpoint "
                "the blocks that cannot be rewired, 'float' for streams of floats, or 'clips' for one clip after the "
                "other, as in 're2tal+8chunks+stays'"
            )
    return found


def rewire(network: Network | Classifier, frames: Tensor, memory: str) -> None:
    """Keep the backbone's activations in the way that ``memory`` says; its parameters, their names and their values
    stay.

    Args:
        frames: an example of what the backbone sees.
        memory: ``stored``: as PyTorch does. ``checkpoint``: none within the blocks that hold residual units; they run
            again in backward. ``leanest``: `revwire.convert` as it is called plainly. Else a coupling: those units are
            rewired by it; ``re2tal+8chunks``: and run in eight chunks; ``re2tal+stays``: and the blocks that cannot be
            rewired are checkpointed; ``re2tal+float``: streams are floats. Any with ``+clips``: of clips that go
            through one after the other, one at a time is kept in this way, and computed again in backward.

    Raises:
        ConfigError: what stands behind a plus is none of these.
    """
    backbone, (memory, _) = network.backbone, clips_of(memory)
    if backbone is None or backbone.frozen:
        return
    in_clips, backbone.checkpoint_clips = backbone.checkpoint_clips, False  # one clip is observed, as it is kept
    if memory in (STORED, CHECKPOINT, LEANEST):
        plan = revwire.plan(backbone, frames, rewire="everywhere")
    else:
        wish = rewiring_of(memory)
        options = wish._asdict()
        revwire.convert(backbone, frames, **options, rewire="everywhere")
        plan = revwire.report(backbone)
    network.blocks = tuple(dict.fromkeys(unit.host for chain in plan.chains for unit in chain.units))
    if memory == LEANEST:
        revwire.convert(backbone, frames)
    if memory == CHECKPOINT:
        for name in network.blocks:
            block = backbone.get_submodule(name)
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    backbone.checkpoint_clips = in_clips


def observe(network: Network | Classifier, config: Config) -> None:
    """`rewire` by a configuration, on a few frames of noise: a clip of another shape is observed when it comes.

    In chunks, or for the leanest layout, on as many as a clip has: windows, and what pays, are found for that size.
    """
    if network.backbone is None:
        return
    memory, _ = clips_of(config.memory)
    most = (
        EXAMPLE * network.backbone.network.frame_stride
        if memory != LEANEST and rewiring_of(memory).chunks == 1
        else config.sampling.frames
    )
    frames = network.backbone.clip_frames or min(config.sampling.frames, most)
    pixels = torch.randint(0, 256, (1, 3, frames, config.sampling.crop, config.sampling.crop), dtype=torch.uint8)
    rewire(network, pixels.to(next(network.parameters()).device), config.memory)


def layers(backbone: nn.Module, blocks: tuple[str, ...]) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(name, parameter, layer) of all parameters: the layer is the number of blocks, in the order of registration, up
    to its own.
    """
    position, current = {name: i + 1 for i, name in enumerate(_in_order(backbone, blocks))}, 0
    for name, parameter in backbone.named_parameters():
        own = next((i for block, i in position.items() if name.startswith(f"{block}.")), None)
        current = current if own is None else own
        yield name, parameter, current


def _in_order(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [name for name, _ in module.named_modules() if name in names]
