"""Localizers from OpenTAD's configurations and weights, by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tal.backbones.published import Checkpoint, load_all, subtree
from benchmarks.tal.localizers.actionformer import ActionFormer
from benchmarks.tal.localizers.localizer import Localizer
from benchmarks.tal.localizers.tridet import TriDet
from benchmarks.tal.localizers.vsgn import VSGN

_ANCHORS = {
    ActionFormer: "projection.embed.0.conv.weight",
    TriDet: "projection.embed.0.conv.weight",
    VSGN: "projection.stem_convs.conv.weight",
}
_PARTS = ("projection.", "neck.", "rpn_head.", "roi_head.")


def load_published(localizer: Localizer, checkpoint: Checkpoint) -> None:
    """Load OpenTAD's weights, of a detector with or without its backbone.

    Raises:
        KeyError: the localizer's parameters are not there, or others than these.
    """
    state = subtree(checkpoint, _ANCHORS[type(localizer)])
    averages = {
        name: value for name, value in localizer.named_buffers() if name.startswith("loss_normalizer_")
    }  # VSGN's are not published
    load_all(localizer, averages | {name: value for name, value in state.items() if name.startswith(_PARTS)})


def localizer_of(reference: Mapping[str, Any]) -> Localizer:
    """The localizer of a reference file: an object with ``config`` and ``state_dict``, as OpenTAD's configurations
    spell them.
    """
    config = reference["config"]
    if (
        "embed_dims" in config
    ):  # a detector with its backbone, whose features these are; OpenTAD's defaults are left out
        config = {"in_channels": config["embed_dims"], "max_seq_len": config["interpolate_size"]} | config
        config = {"arch": (2, 2, config["levels"] - 1), "n_head": 4, "n_mha_win_size": -1, "path_pdrop": 0.1} | config
    build = _vsgn if "pyramid_levels" in config else _tridet if "sgp_win_size" in config else _actionformer
    localizer = build(config)
    load_published(localizer, reference)
    return localizer


def _actionformer(config: Mapping[str, Any]) -> ActionFormer:
    return ActionFormer(
        config["in_channels"],
        config["num_classes"],
        **_pyramid(config),
        heads=config["n_head"],
        window=config["n_mha_win_size"],
        regression_weight=config["loss_weight"],
        drop_path=config["path_pdrop"],
    )


def _tridet(config: Mapping[str, Any]) -> TriDet:
    return TriDet(
        config["in_channels"],
        config["num_classes"],
        **_pyramid(config),
        hidden=config["sgp_mlp_dim"],
        window=config["sgp_win_size"],
        wide=config["k"],
        bins=config["num_bins"],
        boundary_kernel=config["boundary_kernel_size"],
        iou_power=config["iou_weight_power"],
        drop_path=config.get("path_pdrop", 0.1),
    )


def _pyramid(config: Mapping[str, Any]) -> dict[str, Any]:
    """What localizers over a pyramid of points share."""
    embed, stem, branch = config["arch"]
    strides = [2**level for level in range(branch + 1)]
    if list(config["strides"]) != strides:
        raise ValueError(f"got strides {config['strides']}; expected {strides}")
    return {
        "channels": config["out_channels"],
        "embed_layers": embed,
        "stem_layers": stem,
        "levels": branch + 1,
        "positions": config["use_abs_pe"],
        "max_steps": config["max_seq_len"],
        "ranges": config["regression_range"],
        "label_smoothing": config["label_smoothing"],
        "loss_normalizer": config["loss_normalizer"],
    }


def _vsgn(config: Mapping[str, Any]) -> VSGN:
    graph, loss, columns = config["gcn_kwargs"], config["loss_cls"], config["num_classes"]
    known = {"nfeat_mode": "feat_ctr", "agg_type": "max", "edge_weight": "false"}
    if config["use_gcn"] and {key: graph[key] for key in known} != known:
        raise ValueError(f"VSGN: got a graph of {graph}; expected {known}")
    if loss["type"] != ("FocalLoss" if columns == 1 else "BalancedCELoss"):
        raise ValueError(
            f"VSGN: got {loss['type']} for {columns} columns; expected FocalLoss for one, and BalancedCELoss for more"
        )
    return VSGN(
        config["in_channels"],
        max(columns - 1, 1),
        channels=config["channels"],
        strides=config["pyramid_levels"],
        max_steps=config["tscale"],
        scales=config["anchor_scale"],
        layers=config["num_layers"],
        neighbours=graph["num_neigh"] if config["use_gcn"] else None,
        match_iou=config["rpn_iou_thr"],
        refine_iou=config["roi_iou_thr"],
        focal_alpha=loss.get("alpha", 0.25),
        focal_gamma=loss.get("gamma", 2.0),
    )
