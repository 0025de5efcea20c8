"""Localizers from OpenTAD's configurations and weights, by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tal.backbones.published import Checkpoint, load_all, subtree
from benchmarks.tal.localizers.actionformer import ActionFormer

Localizer = ActionFormer

_ANCHORS = {ActionFormer: "projection.embed.0.conv.weight"}
_PARTS = ("projection.", "neck.", "rpn_head.", "roi_head.")


def load_published(localizer: Localizer, checkpoint: Checkpoint) -> None:
    """Load OpenTAD's weights, of a detector with or without its backbone.

    Raises:
        KeyError: the localizer's parameters are not there, or others than these.
    """
    state = subtree(checkpoint, _ANCHORS[type(localizer)])
    load_all(localizer, {name: value for name, value in state.items() if name.startswith(_PARTS)})


def localizer_of(reference: Mapping[str, Any]) -> Localizer:
    """The localizer of a reference file: an object with ``config`` and ``state_dict``, as OpenTAD's configurations spell them."""
    localizer = _actionformer(reference["config"])
    load_published(localizer, reference)
    return localizer


def _actionformer(config: Mapping[str, Any]) -> ActionFormer:
    embed, stem, branch = config["arch"]
    strides = [2**level for level in range(branch + 1)]
    if list(config["strides"]) != strides:
        raise ValueError(f"ActionFormer: got strides {config['strides']}; expected {strides}")
    return ActionFormer(
        config["in_channels"],
        config["num_classes"],
        channels=config["out_channels"],
        embed_layers=embed,
        stem_layers=stem,
        levels=branch + 1,
        heads=config["n_head"],
        window=config["n_mha_win_size"],
        positions=config["use_abs_pe"],
        max_steps=config["max_seq_len"],
        ranges=config["regression_range"],
        label_smoothing=config["label_smoothing"],
        regression_weight=config["loss_weight"],
        loss_normalizer=config["loss_normalizer"],
        drop_path=config["path_pdrop"],
    )
