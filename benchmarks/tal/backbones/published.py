"""Published weights, found by key: checkpoints of mmaction2, OpenTAD and Hugging Face, reversible or not, of a
backbone or of a whole detector.

A checkpoint names a network's parameters as here, but for two things:

- a prefix, such as ``backbone.``, or ``module.backbone.model.backbone.``: whatever stands before the network's
  ``anchor``;
- what Re2TAL's wrappers insert, which the network's ``own_name`` takes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tal.backbones.slowfast import BlockSpec, LateralSpec, PathwaySpec, SlowFast
from benchmarks.tal.backbones.video_mae import VideoMAE
from benchmarks.tal.backbones.video_mae_keys import anchor_of, own_state
from benchmarks.tal.backbones.video_swin import VideoSwin

Checkpoint = str | Path | Mapping[str, Any]
Network = VideoSwin | SlowFast | VideoMAE

_DERIVED = ("relative_position_index", "num_batches_tracked")
"""Buffers that a checkpoint may leave out, or hold where this module does not."""


def load_published(network: Network, checkpoint: Checkpoint) -> None:
    """Load published weights into a backbone, converted by revwire or not.

    Raises:
        KeyError: the network's parameters are not there, twice there, or others than these.
    """
    if isinstance(network, VideoMAE):
        known = read(checkpoint)
        state = own_state(subtree(known, anchor_of(known)))
        if not any(".adapter." in name for name in state):  # of the pretrained network; new ones add nothing yet
            state |= {name: value for name, value in network.model.state_dict().items() if ".adapter." in name}
        load_all(network.model, state)
        return
    state = {network.own_name(name): value for name, value in subtree(checkpoint, network.anchor).items()}
    load_all(network, state)


def load_all(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state by key, all of it.

    Raises:
        KeyError: names what is missing from the state, and what does not belong to the module.
    """
    known = {name for name in state if not name.endswith(_DERIVED)}
    own = {name for name in module.state_dict() if not name.endswith(_DERIVED)}
    if known != own:
        raise KeyError(
            f"{type(module).__name__}: missing from the checkpoint: {_few(own - known)}; not of the module: "
            f"{_few(known - own)}"
        )
    module.load_state_dict({name: state[name] for name in own}, strict=False)


def subtree(checkpoint: Checkpoint, anchor: str) -> dict[str, Tensor]:
    """The parameters that stand beside one named ``anchor``, without the prefix that they share.

    Args:
        checkpoint: a file, or what it holds: a state, alone or under ``state_dict_ema`` (taken first, as it is the one
            evaluated), ``state_dict``, ``module`` or ``model``.

    Raises:
        KeyError: no such parameter, or several.
    """
    state = read(checkpoint)
    prefixes = [name.removesuffix(anchor) for name in state if name == anchor or name.endswith(f".{anchor}")]
    if len(prefixes) != 1:
        raise KeyError(
            f"checkpoint: got {len(prefixes)} parameters named {anchor!r}; expected one; there are {_few(set(state))}"
        )
    return {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}


def read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The state of a checkpoint; no code of the file is run."""
    held = checkpoint
    if isinstance(checkpoint, str | Path) and str(checkpoint).endswith(".safetensors"):
        from safetensors.torch import load_file  # comes with transformers

        held = load_file(checkpoint)
    elif isinstance(checkpoint, str | Path):
        held = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for key in ("state_dict_ema", "state_dict", "module", "model"):
        if key in held:
            held = held[key]
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def network_of(reference: Mapping[str, Any]) -> Network:
    """The backbone of a reference file: an object with ``config`` and ``state_dict``, as OpenTAD's configurations spell
    them.
    """
    config = dict(reference["config"])
    build = _video_mae if "embed_dims" in config else _video_swin if "embed_dim" in config else _slowfast
    network = build(config)
    load_published(network, reference)
    return network


def _video_swin(config: Mapping[str, Any]) -> VideoSwin:
    return VideoSwin(**config)


def _video_mae(config: Mapping[str, Any]) -> VideoMAE:
    return VideoMAE(
        side=config["img_size"],
        layers=config["depth"],
        channels=config["embed_dims"],
        heads=config["num_heads"],
        patch=config["patch_size"],
        hidden=int(config["embed_dims"] * config["mlp_ratio"]),
        adapters=config.get("adapter_index", ()),
        drop_path=config["drop_path_rate"],
    )


def _slowfast(config: Mapping[str, Any]) -> SlowFast:
    def pathway(name: str) -> PathwaySpec:
        kernel = tuple(config[f"{name}_conv1_kernel"])
        return PathwaySpec(config[f"{name}_base_channels"], kernel, tuple(config[f"{name}_inflate"]))

    blocks = BlockSpec(
        temporal_style=config["inflate_style"],
        conv1_stride=(config["conv1_stride_t"], config["conv1_stride_s"]),
        pool1_stride=(config["pool1_stride_t"], config["pool1_stride_s"]),
        temporal_strides=tuple(config["temporal_strides"]),
        spatial_strides=tuple(config["spatial_strides"]),
    )
    lateral = LateralSpec(config["channel_ratio"], config["speed_ratio"], config["fusion_kernel"])
    network = SlowFast(
        tuple(config["stage_blocks"]), config["resample_rate"], pathway("slow"), pathway("fast"), lateral, blocks
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps, module.momentum = config["bn_eps"], config["bn_momentum"]
    return network


def _few(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "") or "nothing"
