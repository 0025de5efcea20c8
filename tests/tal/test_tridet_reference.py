"""TriDet against OpenTAD's: outputs, targets, losses, gradients, decoded and post-processed segments.

In float64 where the reference has it: a wrong epsilon shows at 2e-5 only.
"""

import pytest
import torch
from reference import F64, NAMES, PRECISIONS, SECOND, assert_near, assert_post, load, relative_error

from benchmarks.tal.localizers import localizer_of
from benchmarks.tal.localizers.transformer import ScaledPath

OFFSETS = 5e-5
"""Absolute, for references in float32, in strides; and logits."""
LOSSES, GRADIENTS = 1e-5, 1e-4
"""Relative, for references in float32."""
LOSS_NAMES = {"classification": "cls_loss", "regression": "reg_loss"}


@pytest.fixture(scope="module", params=[0, 1], ids=["thumos", "anet"])
def variant(request):
    return load("tridet", SECOND)["variants"][request.param]


def localizer(variant, dtype, train):
    made = localizer_of(variant).to(dtype).train(train)
    for module in made.modules():
        if isinstance(module, ScaledPath):
            module.rate = 0.0  # as in the reference
    return made


def named(losses):
    found = {LOSS_NAMES[name]: value.item() for name, value in losses.items()}
    return found | {"cost": sum(found.values())}


def tolerance(dtype, otherwise):
    return F64 if dtype == torch.float64 else otherwise


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_outputs(variant, dtype):
    model = localizer(variant, dtype, train=False)
    if variant["pos_embed"] is not None:
        assert_near(model.projection.positions, variant["pos_embed"], 1e-7)
    for case in variant["cases"]:
        raw = case["eval_raw"]
        outputs = model(case["feats"].to(dtype), case["masks"])
        assert all(torch.equal(*both) for both in zip(outputs.masks, raw["level_masks"], strict=True))
        parts = {
            "cls_logits": outputs.logits,
            "start_logits": outputs.starts,
            "end_logits": outputs.ends,
            "reg_bins": outputs.bins,
        }
        for name, levels in parts.items():
            for level, found in enumerate(levels):
                assert_near(found, raw[name][level], OFFSETS)
                if f"{name}_f64" in raw:
                    assert relative_error(found, raw[f"{name}_f64"][level]) < tolerance(dtype, LOSSES), name
        logits, offsets, valid = outputs.joined()
        points = model.points(outputs.masks, logits)
        columns = torch.stack([points.position, points.low, points.high, points.stride], 1)
        assert torch.equal(
            columns.float(), torch.cat(raw["points"]) if isinstance(raw["points"], list) else raw["points"]
        )
        assert relative_error(offsets, case["offsets_f64"]) < tolerance(dtype, LOSSES)
        assert relative_error(logits.sigmoid() * valid[..., None], case["scores_f64"]) < tolerance(dtype, LOSSES)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_pyramid(variant, dtype):
    case = variant["cases"][0]
    model = localizer(variant, dtype, train=False)
    levels, _ = model.projection(*model._padded(case["feats"].to(dtype), case["masks"]))
    for found, expected in zip(levels, case["eval_raw"]["proj_feats_f64"], strict=True):
        assert relative_error(found, expected) < tolerance(dtype, LOSSES)


def test_targets(variant):
    model = localizer(variant, torch.float32, train=False)
    for case in (c for c in variant["cases"] if "targets" in c):
        outputs = (
            model(case["feats"], case["masks"])
            if case["name"] == "full"
            else model.train()(case["feats"], case["masks"])
        )
        classes, extents = model.targets(
            model.points(outputs.masks, case["feats"]), case["gt_segments"], case["gt_labels"]
        )
        positive = (classes.sum(2) > 0) & torch.cat(outputs.masks, 1)
        assert [m.shape[1] for m in outputs.masks] == case["train_mode_level_lengths"]
        assert torch.equal(classes, case["targets"]["gt_cls"])
        assert_near(extents, case["targets"]["gt_reg"], 1e-5)
        assert torch.equal(positive, case["pos_mask"])
        assert positive.sum() == case["num_pos"]


def test_losses_in_eval_mode(variant):
    model = localizer(variant, torch.float32, train=False)
    before = model.rpn_head.loss_normalizer.clone()
    for case in (c for c in variant["cases"] if "loss_eval_mode" in c):
        losses = model.losses(case["feats"], case["masks"], case["gt_segments"], case["gt_labels"])
        assert named(losses) == pytest.approx(case["loss_eval_mode"], rel=LOSSES)
    assert torch.equal(before, model.rpn_head.loss_normalizer)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_losses_and_gradients(variant, dtype):
    for case in (c for c in variant["cases"] if "train_steps" in c):
        model = localizer(variant, dtype, train=True)
        features = case["feats"].to(dtype).requires_grad_()
        for step, (stored, stored64) in enumerate(zip(case["train_steps"], case["train_steps_f64"], strict=True)):
            losses = model.losses(features, case["masks"], case["gt_segments"], case["gt_labels"])
            assert named(losses) == pytest.approx(stored["losses"], rel=LOSSES)
            assert named(losses) == pytest.approx(stored64["losses"], rel=tolerance(dtype, LOSSES))
            average = model.rpn_head.loss_normalizer.item()
            assert average == pytest.approx(stored64["loss_normalizer_after"], rel=tolerance(dtype, 1e-6))
            if step == 0:
                sum(losses.values()).backward()
        assert relative_error(features.grad, case["input_grad_f64"]) < tolerance(dtype, GRADIENTS)
        _check_gradients(model, case, tolerance(dtype, GRADIENTS))


def _check_gradients(model, case, allowed):
    """Every parameter: by value where that is stored, else by norm."""
    expected = case.get("param_grads_f64", case.get("param_grad_norms_f64"))
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name in case["zero_gradient_names"]:
            assert found[name].abs().max() < 1e-6, name
        elif isinstance(value, torch.Tensor):
            assert relative_error(found[name], value) < allowed, name
        else:
            assert found[name].double().norm().item() == pytest.approx(value, rel=allowed), name


def test_boundaries_do_not_train_the_pyramid_and_overlap_trains_the_boundaries(variant):
    case = variant["cases"][0]
    for loss, name in LOSS_NAMES.items():
        model = localizer(variant, torch.float64, train=True)
        model.losses(case["feats"].double(), case["masks"], case["gt_segments"], case["gt_labels"])[loss].backward()
        for parameter, norm in case["grad_norms_by_loss_f64"][name].items():
            gradient = model.get_parameter(parameter).grad
            assert (0.0 if gradient is None else gradient.norm().item()) == pytest.approx(norm, rel=F64), parameter


def test_decoded_suppressed_and_in_seconds(variant):
    model = localizer(variant, torch.float32, train=False)
    for case in variant["cases"]:
        detections = model.decode(case["feats"], case["masks"])
        for found, expected in zip(detections, case["pre_nms"], strict=True):
            assert len(found.scores) == len(expected["scores"])
            assert_near(found.scores.sort().values, expected["scores"].sort().values, 5e-6)
        assert_post(detections, case["post"], case["post"]["nms"])
