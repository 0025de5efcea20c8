"""VideoMAE with temporal adapters against OpenTAD's AdaTAD: outputs, blocks, gradients, what trains, and the detector.

In float64 where the reference has it: a wrong epsilon shows at 2e-5 only.
"""

import pytest
import torch
from reference import F64, NAMES, PRECISIONS, SECOND, assert_near, assert_post, load, relative_error
from test_backbones_reference import KeepMask

from benchmarks.tal.backbones import Backbone, network_of
from benchmarks.tal.localizers import localizer_of
from benchmarks.tal.localizers.transformer import ScaledPath
from benchmarks.tal.normalization import MEAN, STD

OUTPUTS, GRADIENTS, LOSSES = 1e-5, 1e-4, 1e-5
"""Relative, for float32, as suggested by the reference set."""
LOSS_NAMES = {"classification": "cls_loss", "regression": "reg_loss"}
PREFIX = "backbone.model.backbone.blocks."


@pytest.fixture(scope="module", params=[0, 1], ids=["thumos", "anet"])
def variant(request):
    return load("adatad_videomae", SECOND)["variants"][request.param]


def backbone(variant, dtype, **changes):
    config = variant["config"] | {"drop_path_rate": 0.0} | changes
    network = network_of({"config": config, "state_dict": variant["state_dict"]})
    mean, std = (torch.tensor(numbers).tolist() for numbers in (MEAN, STD))  # float32 buffers in the reference
    made = Backbone(network, steps=config["interpolate_size"], freeze_norms=False, mean=mean, std=std)
    return made.to(dtype).train()


def tolerance(dtype, otherwise):
    return F64 if dtype == torch.float64 else otherwise


def own_name(name):
    """Of an adapter's parameter, in a `Backbone`."""
    return f"network.model.encoder.layer.{name.removeprefix(PREFIX)}"


def check_gradients(made, expected, allowed):
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    assert found.keys() == {own_name(name) for name in expected}
    for name, value in expected.items():
        assert relative_error(found[own_name(name)], value) < allowed, name


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_outputs_and_gradients(variant, dtype):
    made = backbone(variant, dtype)
    blocks, adapters = [], []
    for layer in made.network.model.encoder.layer:
        layer.register_forward_hook(lambda module, args, out: blocks.append((args[0], out)))
        if layer.adapter is not None:
            layer.adapter.register_forward_hook(lambda module, args, out: adapters.append(args[0]))
    out = made(variant["frames"][:, 0])
    assert relative_error(out, variant["output_f64"]) < tolerance(dtype, OUTPUTS)
    assert relative_error(out, variant["output"]) < OUTPUTS
    assert relative_error(blocks[0][0], variant["tokens"]) < OUTPUTS
    for (_, found), expected in zip(blocks, variant["block_outputs"], strict=False):  # some have the first alone
        assert relative_error(found, expected) < OUTPUTS
    for found, expected in zip(adapters, variant["pre_adapter"], strict=False):
        assert relative_error(found, expected) < OUTPUTS
    loss = (out * variant["loss_weight"].to(dtype)).sum()
    assert loss.item() == pytest.approx(variant["loss_f64"], rel=tolerance(dtype, LOSSES))
    loss.backward()
    check_gradients(made, variant["adapter_grads_f64"], tolerance(dtype, GRADIENTS))


def test_what_trains(variant):
    made = backbone(variant, torch.float32)
    trains = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trains == {own_name(name) for name in variant["optimizer_backbone_groups"][0]["names"]}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_stochastic_depth_of_frozen_blocks(variant, dtype):
    dropped = variant["droppath_train"]
    made = backbone(variant, dtype, drop_path_rate=dropped["drop_path_rate"])
    layers = made.network.model.encoder.layer
    assert [layer.output.dropout.p for layer in layers] == pytest.approx(dropped["drop_probs"])
    for layer, keep, rate in zip(layers, dropped["keep_mask"], dropped["drop_probs"], strict=True):
        layer.attention.output.dropout = KeepMask(keep[0].to(dtype), rate)
        layer.output.dropout = KeepMask(keep[1].to(dtype), rate)
    out = made(variant["frames"][:, 0])
    loss = (out * variant["loss_weight"].to(dtype)).sum()
    loss.backward()
    assert relative_error(out, dropped["output_f64"]) < tolerance(dtype, OUTPUTS)
    assert loss.item() == pytest.approx(dropped["loss_f64"], rel=tolerance(dtype, LOSSES))
    check_gradients(made, dropped["adapter_grads_f64"], tolerance(dtype, GRADIENTS))


def detector(variant, dtype, train):
    head = localizer_of(variant).to(dtype).train(train)
    for module in head.modules():
        if isinstance(module, ScaledPath):
            module.rate = 0.0  # as in the reference
    return backbone(variant, dtype).train(train), head


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_the_detector_trains_its_adapters(variant, dtype):
    stored = variant["detector"]
    made, head = detector(variant, dtype, train=True)
    for step, expected in enumerate(stored["train_steps_f64"]):
        losses = head.losses(made(variant["frames"][:, 0]), stored["masks"], stored["gt_segments"], stored["gt_labels"])
        found = {LOSS_NAMES[name]: value.item() for name, value in losses.items()}
        assert found | {"cost": sum(found.values())} == pytest.approx(expected["losses"], rel=tolerance(dtype, LOSSES))
        if step == 0:
            sum(losses.values()).backward()
    check_gradients(made, stored["adapter_grads_f64"], tolerance(dtype, GRADIENTS))
    norms = {name: 0.0 if p.grad is None else p.grad.norm().item() for name, p in head.named_parameters()}
    for name, norm in stored["head_grad_norms_f64"].items():
        assert norms[name] == pytest.approx(norm, rel=tolerance(dtype, GRADIENTS), abs=1e-7), name


def test_detections(variant):
    stored = variant["detector"]
    made, head = detector(variant, torch.float32, train=False)
    with torch.no_grad():
        features = made(variant["frames"][:, 0])
        proposed = head.propose(features, stored["masks"])
    for (segments, scores), expected, score in zip(proposed, stored["proposals"], stored["scores"], strict=True):
        assert_near(segments, expected, 5e-5)
        assert_near(scores, score, 5e-6)
    assert_post(head.decode(features, stored["masks"]), stored["post"], stored["post"]["nms"])
