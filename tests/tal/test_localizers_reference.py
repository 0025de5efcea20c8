"""ActionFormer and VSGN against OpenTAD's: outputs, targets, losses, gradients, decoded and post-processed segments."""

import pytest
import torch
from reference import F64, NAMES, PRECISIONS, assert_near, assert_post, load, relative_error

from benchmarks.tal.localizers import ActionFormer, localizer_of
from benchmarks.tal.localizers.anchors import Matches
from benchmarks.tal.localizers.transformer import ScaledPath
from benchmarks.tal.localizers.vsgn import boundary_targets

FILES = ["actionformer_thumos", "actionformer_anet", "vsgn_anet", "vsgn_thumos"]
LOGITS, SEGMENTS, SCORES = 2e-5, 3e-4, 5e-6
"""Absolute, for references in float32; segments in steps."""
LOSSES, GRADIENTS, FEATURES = 1e-5, 1e-4, 1e-5
"""Relative, for references in float32."""
LOSS_NAMES = {
    "classification": "cls_loss",
    "regression": "reg_loss",
    "boundaries": "loss_tem",
    "refinement": "loss_stage2_loc",
}
VSGN_NAMES = LOSS_NAMES | {"classification": "loss_stage1_cls", "regression": "loss_stage1_reg"}


def of(prefix):
    return [f for f in FILES if f.startswith(prefix)]


def localizer(data, dtype, train=True):
    made = localizer_of(data).to(dtype).train(train)
    for module in made.modules():
        if isinstance(module, ScaledPath):
            module.rate = 0.0  # as in the reference
    return made


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
@pytest.mark.parametrize("file", of("actionformer"))
def test_actionformer_outputs(file, dtype):
    data = load(file)
    model = localizer(data, dtype, train=False)
    if "pos_embed" in data:
        assert_near(model.projection.positions, data["pos_embed"], 1e-7)
    for case in data["cases"]:
        features, mask, raw = case["feats"].to(dtype), case["masks"], case["eval_raw"]
        outputs = model(features, mask)
        for level, (logits, offsets, valid) in enumerate(
            zip(raw["cls_logits"], raw["reg"], raw["level_masks"], strict=True)
        ):
            assert_near(outputs.logits[level], logits, LOGITS)
            assert_near(outputs.offsets[level], offsets, LOGITS)
            assert torch.equal(outputs.masks[level], valid)
        points = model.points(outputs.masks, features)
        columns = torch.stack([points.position, points.low, points.high, points.stride], 1)
        assert torch.equal(columns.float(), torch.cat(raw["points"]))
        for (segments, scores), expected, score in zip(
            model.propose(features, mask), case["proposals"], case["scores"], strict=True
        ):
            assert_near(segments, expected, SEGMENTS)
            assert_near(scores, score, SCORES)


@pytest.mark.parametrize("file", of("actionformer"))
def test_actionformer_pyramid(file):
    data = load(file)
    case = data["cases"][0]
    model = localizer(data, torch.float32, train=False)
    levels, _ = model.projection(*model._padded(case["feats"], case["masks"]))
    assert all(
        relative_error(got, expected) < FEATURES
        for got, expected in zip(levels, case["eval_raw"]["proj_feats"], strict=True)
    )


@pytest.mark.parametrize("file", of("actionformer"))
def test_actionformer_targets(file):
    data = load(file)
    model = localizer(data, torch.float32)
    for case in (c for c in data["cases"] if "targets" in c):
        outputs = model(case["feats"], case["masks"])
        points = model.points(outputs.masks, case["feats"])
        valid = torch.cat(outputs.masks, 1)
        for video, (segments, labels) in enumerate(zip(case["gt_segments"], case["gt_labels"], strict=True)):
            classes, offsets = points.targets(segments, labels, model.num_classes, model.center_radius)
            assert torch.equal(classes, case["targets"]["gt_cls"][video])
            assert_near(offsets, case["targets"]["gt_reg"][video], 1e-5)
            assert torch.equal((classes.sum(1) > 0) & valid[video], case["pos_mask"][video])


@pytest.mark.parametrize("file", of("actionformer"))
def test_actionformer_losses_in_eval_mode(file):
    data = load(file)
    model = localizer(data, torch.float32, train=False)
    before = model.rpn_head.loss_normalizer.clone()
    for case in (c for c in data["cases"] if "loss_eval_mode" in c):
        losses = model.losses(case["feats"], case["masks"], case["gt_segments"], case["gt_labels"])
        assert {LOSS_NAMES[n]: v.item() for n, v in losses.items()} == pytest.approx(
            {n: v for n, v in case["loss_eval_mode"].items() if n != "cost"}, rel=LOSSES
        )
    assert torch.equal(before, model.rpn_head.loss_normalizer)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
@pytest.mark.parametrize("file", FILES)
def test_losses_and_gradients(file, dtype):
    data = load(file)
    names = LOSS_NAMES if file in of("actionformer") else VSGN_NAMES
    for case in (c for c in data["cases"] if "train_steps" in c):
        model = localizer(data, dtype)
        features = case["feats"].to(dtype).requires_grad_()
        exact = dtype == torch.float64
        for step, stored in enumerate(case["train_steps"]):
            losses = model.losses(features, case["masks"], case["gt_segments"], case["gt_labels"])
            stored64 = case["train_steps_f64"][step]
            for expected, tolerance in (
                (stored["losses"], LOSSES),
                (stored64.get("losses", stored64), F64 if exact else LOSSES),
            ):
                got = {names[n]: v.item() for n, v in losses.items()}
                assert got | {"cost": sum(got.values())} == pytest.approx(expected, rel=tolerance)
            _check_normalizers(model, stored)
            if step == 0:
                sum(losses.values()).backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        _check_gradients(gradients, case)
        if "input_grad" in case:
            assert relative_error(features.grad, case["input_grad"]) < GRADIENTS


def _check_normalizers(model, stored):
    if isinstance(model, ActionFormer):
        assert model.rpn_head.loss_normalizer.item() == pytest.approx(stored["loss_normalizer_after"], rel=1e-6)
        return
    for name, key in (
        ("classification", "loss_normalizer_cls"),
        ("regression", "loss_normalizer_reg"),
        ("refinement", "roi_loss_normalizer_reg"),
    ):
        assert getattr(model, f"loss_normalizer_{name}").item() == pytest.approx(stored[f"{key}_after"], rel=1e-6)


def _check_gradients(gradients, case):
    """Every parameter: by value where that is stored, else by norm."""
    expected = case.get("param_grads", case.get("param_grad_norms"))
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(
            ("attn.key.bias", "attn.key_norm.bias")
        ):  # zero: softmax does not see what all keys have in common
            assert gradients[name].abs().max() < 1e-6, name
        elif isinstance(value, torch.Tensor):
            assert relative_error(gradients[name], value) < GRADIENTS, name
        else:
            assert gradients[name].double().norm().item() == pytest.approx(value, rel=GRADIENTS, abs=1e-7), name


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
@pytest.mark.parametrize("file", of("vsgn"))
def test_vsgn_outputs(file, dtype):
    data = load(file)
    model = localizer(data, dtype)
    for case in data["cases"]:
        features, mask = case["feats"].to(dtype), case["masks"]
        levels, masks = model.projection(features, mask)
        neck = model.neck(levels, masks)
        assert all(torch.equal(got, expected) for got, expected in zip(masks, case["proj_masks"], strict=True))
        for got, expected in zip([*levels, *neck], [*case["proj_feats"], *case["neck_feats"]], strict=True):
            assert relative_error(got, expected) < FEATURES
        outputs = model(features, mask)
        for got, expected in zip(
            [*outputs.logits, *outputs.offsets], [*case["cls_logits"], *case["offsets"]], strict=True
        ):
            assert_near(got, expected, LOGITS)
        assert_near(outputs.boundaries, case["tem_logits"], LOGITS)
        assert torch.equal(model.anchors.float(), case["anchors"])
        assert_near(outputs.proposals, case["rpn_proposals"], SEGMENTS)
        assert_near(model.scores(outputs), case["rpn_scores"], SCORES)
        same = case[
            "corner_index_agrees_f32_f64"
        ]  # elsewhere the ends of a proposal lie on the border of two positions
        assert_near(outputs.refined[same], case["roi_proposals"][same], SEGMENTS)
        looked = (
            model.roi_head.look(neck[0], outputs.proposals)
            .transpose(2, 3)
            .flatten(3)
            .flatten(0, 1)[: len(case["roi_feats"])]
        )
        assert_near(looked[same.flatten()[: len(looked)]], case["roi_feats"][same.flatten()[: len(looked)]], LOGITS)


@pytest.mark.parametrize("file", of("vsgn"))
def test_vsgn_targets(file):
    data = load(file)
    model = localizer(data, torch.float32)
    for case in data["cases"]:
        proposals, truth = case["rpn_proposals"], (case["gt_segments"], case["gt_labels"])
        expected = {
            "anchor_labels": (model.anchors.expand_as(proposals), model.match_iou, "anchor_targets"),
            "proposal_labels_rpn": (proposals, model.match_iou, None),
            "proposal_labels_roi": (proposals, model.refine_iou, "roi_targets"),
        }
        for name, (boxes, threshold, segments) in expected.items():
            matches = Matches.of(boxes, *truth, threshold)
            assert torch.equal(matches.labels.flatten().int(), case[name])
            if segments is not None:
                assert torch.equal(matches.segments.flatten(0, 1), case[segments])
        assert torch.equal(boundary_targets(case["gt_segments"], case["tem_logits"]).long(), case["tem_targets"])


@pytest.mark.parametrize("file", FILES)
def test_decoded_suppressed_and_in_seconds(file):
    """From features to what OpenTAD writes: `decode`, then suppression, seconds, and the scores of an external
    classifier.
    """
    data = load(file)
    model = localizer(data, torch.float32, train=False)
    for case in data["cases"]:
        nms = data.get("nms", data.get("post_nms"))
        assert_post(model.decode(case["feats"], case["masks"]), case["post"], nms)
