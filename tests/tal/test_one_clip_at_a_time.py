"""``memory=..+clips``: clips go through the backbone one after the other, gradients through all of them, and what it
keeps does not grow with their number.
"""

import dataclasses

import pytest
import torch

import revwire  # noqa: F401  the package under test is there
from benchmarks.tal import networks
from revwire.measure import peak_bytes

pytest.importorskip("lightning")
pytest.importorskip("transformers")

from benchmarks.tal import costs
from benchmarks.tal.config import load
from benchmarks.tal.schema import ConfigError

SMALL = (
    "backbone={name: videomae_s, weights: null, freeze_norms: false}",
    "backbone.options={frames: 4, side: 32, layers: 2, channels: 16, heads: 2, patch: 8}",
    *("sampling.crop=32", "sampling.frames=16", "sampling.steps=16"),
    "actionformer={channels: 8, levels: 2, window: 3, max_steps: 16, head_layers: 1, drop_path: 0.0}",
)
SWIN = (
    "backbone.options={embed_dim: 8, depths: [2], num_heads: [2], window_size: [2, 2, 2], drop_path_rate: 0.0}",
    *("sampling.crop=16", "sampling.frames=16", "sampling.steps=8"),
    "actionformer={channels: 8, levels: 2, window: 3, max_steps: 8, head_layers: 1, drop_path: 0.0}",
)


def configured(memory, frames=16, overrides=SMALL):
    config = costs.longer(load("synthetic", [*overrides, f"memory={memory}"]), frames)
    return dataclasses.replace(config, class_agnostic=True)


def learned(memory, overrides=SMALL, **options):
    """(losses, gradients of all parameters)."""
    config = configured(memory, overrides=overrides, **options)
    network = costs.network(config, 1, torch.device("cpu"))
    costs.step(network, costs.noise(config, 2, torch.device("cpu")), "32-true")()
    with torch.no_grad():
        losses = network.eval()(costs.noise(config, 2, torch.device("cpu")))
    return losses, {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("memory", ["stored", "checkpoint", "leanest", "re2tal"])
def test_clips_that_are_apart_learn_as_they_do_side_by_side(memory):
    """Rounding alone may differ: products of one clip are other products than those of four."""
    losses, gradients = learned(memory)
    in_clips, same = learned(f"{memory}+clips")
    torch.testing.assert_close(in_clips, losses, rtol=1e-5, atol=1e-6)
    assert same.keys() == gradients.keys()
    assert any("backbone" in name for name in same)
    torch.testing.assert_close(same, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("memory", ["stored", "re2tal"])
def test_clips_of_another_network_are_those_of_its_chunks(memory):
    """A network that looks from clip to clip is another one in chunks; with them, ``+clips`` changes nothing."""
    chunks = (*SWIN, "backbone.chunk=4")
    torch.testing.assert_close(learned(f"{memory}+clips", chunks), learned(memory, chunks), rtol=1e-4, atol=1e-6)
    whole, in_chunks = learned(memory, SWIN)[0], learned(memory, chunks)[0]
    assert any(not torch.allclose(whole[name], in_chunks[name], rtol=1e-4) for name in whole)


def backbone_bytes(memory, frames):
    """Peak of forward and backward of the backbone alone, above its rest."""
    config = configured(memory, frames)
    backbone = costs.network(config, 1, torch.device("cpu")).backbone
    clip = costs.noise(config, 1, torch.device("cpu")).frames
    return peak_bytes(lambda: backbone(clip).sum().backward(), torch.device("cpu"))


@pytest.mark.parametrize("memory", ["stored", "checkpoint", "re2tal"])
def test_what_the_backbone_keeps_is_flat_in_length(memory):
    """Eight times the clips: of each more, nothing is kept but its features, a number per channel and time, and states
    of the random generator by which it, and either of its blocks, is computed again.
    """
    short, long = (backbone_bytes(f"{memory}+clips", frames) for frames in (16, 128))
    features, states = 16 * 4, 3 * torch.get_rng_state().numel()  # of a step: channels, float32; of a clip
    assert long - short <= (128 - 16) * (4 * features + states / 4)
    whole, whole_long = (backbone_bytes(memory, frames) for frames in (16, 128))
    assert whole_long - whole > 5 * (long - short)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (SWIN, r"'\+clips' with video_swin_t, which looks from clip to clip .* expected backbone.chunk=N"),
        ((*SMALL, "backbone.options.adapters=all"), r"'\+clips' with videomae_s, which looks from clip to clip"),
        ((*SWIN, "memory=re2tal+clip"), r"'clips' for one clip after the other"),
    ],
)
def test_networks_that_look_from_clip_to_clip_are_told(overrides, message):
    config = load("synthetic", ["memory=stored+clips", *overrides])
    with pytest.raises(ConfigError, match=message):
        costs.network(config, 1, torch.device("cpu"))


def test_the_spelling_goes_with_any_other():
    assert networks.clips_of("bdia:1/8+2chunks+clips+stays") == ("bdia:1/8+2chunks+stays", True)
    assert networks.clips_of("stored") == ("stored", False)
