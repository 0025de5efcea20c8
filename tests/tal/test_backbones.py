"""The backbones: what surrounds a network, published names, clips, and torchvision's and pytorchvideo's models."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import revwire
from benchmarks.tal.backbones import NETWORKS, Backbone, SlowFast, VideoSwin, load_published
from benchmarks.tal.backbones.slowfast import BlockSpec, PathwaySpec

SMALL_SWIN = {"embed_dim": 4, "depths": (2, 2), "num_heads": (1, 2), "window_size": (2, 3, 3)}


def small_swin():
    torch.manual_seed(0)
    return VideoSwin(**SMALL_SWIN)


def small_slowfast(**blocks):
    torch.manual_seed(0)
    return SlowFast(
        (2, 3, 1, 1),
        4,
        PathwaySpec(8, (1, 7, 7), (0, 0, 1, 1)),
        PathwaySpec(1, (5, 7, 7), (1,) * 4),
        blocks=BlockSpec(**blocks),
    )


def frames(count=8, size=32, batch=1, seed=0):
    return torch.randint(
        0, 256, (batch, 3, count, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("make", [small_swin, small_slowfast])
def test_features_are_a_sequence(make):
    network = make()
    out = Backbone(network, steps=6)(frames(batch=2))
    assert out.shape == (2, network.channels, 6)
    assert out.dtype == torch.float32


def test_the_length_comes_from_the_mask_or_the_longest_pathway():
    mask = torch.tensor([[True, True, False]])
    backbone = Backbone(small_slowfast()).eval()
    out = backbone(frames(), mask)
    assert out.shape[2] == 3
    assert out[:, :, :2].any()
    assert not out[:, :, 2].any()
    assert backbone(frames()).shape[2] == 8


def test_a_clip_at_a_time_is_the_network_on_each_clip():
    network = small_swin()
    whole, clips = Backbone(network), Backbone(network, clip_frames=4)
    video = frames(10)
    parts = torch.cat([whole(video[:, :, :4]), whole(video[:, :, 4:8]), whole(video[:, :, 8:])], 2)
    torch.testing.assert_close(clips(video), parts)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_clips_have_gradients_and_are_reversible(checkpointed):
    video = frames(12).float().requires_grad_()
    gradients = []
    for rewired in (False, True):
        backbone = Backbone(small_swin(), clip_frames=4, checkpoint_clips=checkpointed, freeze_norms=False)
        if rewired:
            revwire.convert(backbone, video.detach(), coupling="bdia:1/128")
            assert revwire.report(backbone).coverage == 1
        video.grad = None
        backbone(video).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in (video, *backbone.parameters())]))
    assert (
        torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
    )  # bdia with γ = 1/128 is nearly the same function


def test_clips_of_a_converted_network_rebuild_to_the_bit():
    backbone = revwire.convert(Backbone(small_swin(), clip_frames=4), frames(12), coupling="re2tal")
    assert revwire.verify(backbone, frames(12, seed=1)).bit_exact


def test_clips_must_fit_the_network():
    with pytest.raises(ValueError, match="clips of 6 frames; expected a multiple of 4"):
        Backbone(small_slowfast(), clip_frames=6)


def test_clips_are_not_counted_twice():
    with pytest.raises(ValueError, match="batch norms that train; they would count each clip twice: freeze_norms=True"):
        Backbone(small_slowfast(), clip_frames=4, checkpoint_clips=True, freeze_norms=False)


def test_frozen_norms_stay_in_eval_mode_and_learn_nothing():
    backbone = Backbone(small_slowfast()).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items() if ".bn." in name}
    backbone(frames(batch=2)).sum().backward()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm3d)]
    assert not any(m.training or m.weight.requires_grad for m in norms)
    assert all(torch.equal(backbone.state_dict()[name], value) for name, value in before.items())
    assert backbone.network.slow_path.conv1.conv.weight.grad.any()


def test_norms_may_be_trained():
    backbone = Backbone(small_slowfast(), freeze_norms=False).train()
    assert all(m.training and m.weight.requires_grad for m in backbone.modules() if isinstance(m, nn.BatchNorm3d))


def test_a_frozen_network_has_no_graph():
    backbone = Backbone(small_swin(), frozen=True).train()
    assert not backbone(frames()).requires_grad
    assert not any(m.training for m in backbone.network.modules())
    assert not any(p.requires_grad for p in backbone.parameters())


def test_frames_that_the_network_cannot_take_are_refused():
    with pytest.raises(ValueError, match="got 6 frames; expected a multiple of the resample rate, 4"):
        Backbone(small_slowfast())(frames(6))
    with pytest.raises(ValueError, match="got 16 slow and 1 fast channels; expected a ratio of 8"):
        SlowFast(slow=PathwaySpec(16, (1, 7, 7), (0,) * 4), fast=PathwaySpec(1, (5, 7, 7), (1,) * 4))
    with pytest.raises(ValueError, match="resample rate 6; expected a multiple of the speed ratio, 4"):
        SlowFast(resample_rate=6)


@pytest.mark.parametrize("wrapped", ["module.backbone.model.backbone.", "backbone.", ""])
@pytest.mark.parametrize("make", [small_swin, small_slowfast])
def test_published_names_load_with_any_prefix(make, wrapped, tmp_path):
    source, target = make(), make()
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    state = {wrapped + published_name(name): value for name, value in source.state_dict().items()}
    torch.save(
        {"state_dict": state | {"module.head.weight": torch.zeros(1)} if wrapped else state}, tmp_path / "epoch.pth"
    )
    load_published(target, tmp_path / "epoch.pth")
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())


def published_name(name):
    """As Re2TAL's wrappers spell it: the inverse of `own_name`, written independently of it."""
    parts = name.split(".")
    if "blocks" in parts:  # Swin: layers.0.blocks.1.norm1.weight
        inner = "Gm" if parts[4] in ("norm2", "mlp") else "Fm"
        return ".".join([*parts[:4], "inv_block", inner, *parts[4:]])
    if parts[1].startswith("layer") and not parts[1].endswith(
        "lateral"
    ):  # SlowFast: slow_path.layer1.0.conv1.conv.weight
        around = [] if parts[3] == "downsample" else ["Fm"] if parts[2] == "0" else ["inv_block", "Fm"]
        return ".".join([*parts[:2], "blocks", parts[2], *around, *parts[3:]])
    return name


def test_weights_of_the_average_are_taken_first():
    source, target = small_swin(), VideoSwin(**SMALL_SWIN)
    load_published(target, {"state_dict": {}, "state_dict_ema": source.state_dict()})
    assert torch.equal(source.norm3.weight, target.norm3.weight)


def test_weights_that_do_not_fit_are_refused():
    state = small_swin().state_dict()
    with pytest.raises(KeyError, match=r"got 0 parameters named 'slow_path\.conv1\.conv\.weight'; expected one"):
        load_published(small_slowfast(), state)
    with pytest.raises(KeyError, match="got 2 parameters named"):
        load_published(small_swin(), state | {f"teacher.{name}": value for name, value in state.items()})
    del state["norm3.bias"]
    with pytest.raises(KeyError, match=r"missing from the checkpoint: norm3\.bias; not of the module: extra"):
        load_published(small_swin(), state | {"extra": torch.zeros(1)})


def test_the_network_before_rewiring_has_its_activation_after_the_sum():
    block = small_slowfast(activation="sum").slow_path.layer1[0].eval()
    x = torch.randn(1, 10, 2, 4, 4)
    torch.testing.assert_close(block(x), torch.relu(block.conv3(block.conv2(block.conv1(x))) + block.downsample(x)))


@pytest.mark.parametrize(("style", "kernels"), [("3x1x1", ((3, 1, 1), (1, 3, 3))), ("3x3x3", ((1, 1, 1), (3, 3, 3)))])
def test_which_convolution_goes_along_time(style, kernels):
    block = small_slowfast(temporal_style=style).slow_path.layer3[0]
    assert (block.conv1.conv.kernel_size, block.conv2.conv.kernel_size) == kernels


def test_a_window_that_fits_is_torchvisions():
    """Where no window is clipped, no token is padding, and axes are as long as two windows, both are the same
    network.
    """
    ours = VideoSwin(embed_dim=8, depths=(2,), num_heads=(2,), window_size=(2, 2, 2), patch_size=(2, 4, 4)).double()
    video = pytest.importorskip("torchvision").models.video.swin_transformer
    theirs = video.SwinTransformer3d([2, 4, 4], 8, [2], [2], [2, 2, 2], stochastic_depth_prob=0.0).double()
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in (
            ("layers.0.blocks", "features.0"),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.3"),
            ("norm3", "norm"),
        ):
            name = name.replace(old, new)
        state[name] = value
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("head") or "position_index" in name for name in missing)
    x = torch.rand(2, 3, 8, 16, 24, dtype=torch.float64)
    expected = theirs.norm(theirs.features(theirs.patch_embed(x))).permute(0, 4, 1, 2, 3)
    torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "channels", "units"), [("swin3d_t", 768, 24), ("slowfast_r50", 2304, 24)])
def test_models_of_the_zoos(name, channels, units):
    if name.startswith("slowfast"):
        pytest.importorskip("pytorchvideo")
    backbone = Backbone(NETWORKS[name](), steps=4)
    video = frames(8)
    assert backbone(video).shape == (1, channels, 4)
    plan = revwire.plan(backbone, video, coupling="re2tal")
    assert len(plan.units) == units
    assert plan.coverage == 1


def test_weights_of_the_zoos_load_without_their_classifier():
    torchvision = pytest.importorskip("torchvision")
    source = torchvision.models.video.swin3d_t()
    loaded = NETWORKS["swin3d_t"](state=source.state_dict())
    assert torch.equal(loaded.model.norm.weight, source.norm.weight)
    assert torch.equal(loaded.model.features[0][0].mlp[0].weight, source.features[0][0].mlp[0].weight)


def test_the_blocks_of_a_slowfast_that_change_shape_can_be_checkpointed():
    video = frames().float()
    backbone = Backbone(small_slowfast(), freeze_norms=False).train()
    revwire.convert(backbone, video, checkpoint="stays")
    assert (
        len(revwire.report(backbone).checkpointed) == 10
    )  # of each pathway the first of each stage, and a block that stands alone
    found = []
    for stored in (False, True):
        with revwire.stored_activations(backbone) if stored else nullcontext():
            found.append(torch.autograd.grad(backbone(video).square().sum(), list(backbone.parameters())))
    assert all(map(torch.equal, *found))
