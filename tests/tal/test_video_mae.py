"""VideoMAE: clips side by side, frames of another size, published files by key, and adapters under each ``memory``."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import VideoMAEModel

import revwire
from benchmarks.tal import networks
from benchmarks.tal.backbones import NETWORKS, Backbone, VideoMAE, load_published

SMALL = {"frames": 4, "side": 32, "layers": 3, "channels": 16, "heads": 2, "patch": 8, "hidden": 48}


def video_mae(**options):
    torch.manual_seed(0)
    made = VideoMAE(**SMALL | options)
    for name, parameter in made.named_parameters():
        if ".adapter.up_proj." in name:
            nn.init.normal_(parameter, std=0.1)  # a new adapter adds nothing
    return made


def pixels(frames=8, height=32, width=32):
    return torch.randn(2, 3, frames, height, width, generator=torch.Generator().manual_seed(0))


def test_clips_do_not_meet_but_in_adapters():
    x = pixels()
    plain = video_mae()
    apart = torch.cat([plain(x[:, :, :4]), plain(x[:, :, 4:])], 2)
    torch.testing.assert_close(plain(x), apart)
    joined = video_mae(adapters=[1])
    apart = torch.cat([joined(x[:, :, :4]), joined(x[:, :, 4:])], 2)
    assert not torch.allclose(joined(x), apart, atol=1e-3)
    assert joined(x).shape == (2, 16, 4, 4, 4)


def test_it_is_hugging_faces_own():
    made = video_mae()
    theirs = VideoMAEModel(made.model.config)
    theirs.load_state_dict(made.model.state_dict())
    expected = theirs(pixel_values=pixels(4).transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(made(pixels(4)).flatten(2).transpose(1, 2), expected)


def test_tokens_stay_in_float32_under_autocast():
    """Positions are added to them in float32, as in the reference, and blocks add to that."""
    with torch.autocast("cpu", torch.bfloat16):
        assert video_mae(adapters="all")(pixels()).dtype == torch.float32


def test_a_new_adapter_adds_nothing():
    torch.manual_seed(0)
    plain = VideoMAE(**SMALL)
    adapted = VideoMAE(**SMALL, adapters="all")
    load_published(adapted, {f"model.{name}": value for name, value in plain.model.state_dict().items()})
    assert adapted.adapters == (0, 1, 2)
    torch.testing.assert_close(adapted(pixels()), plain(pixels()))


def test_frames_of_another_size_have_positions_in_between():
    made = video_mae()
    made.positions.copy_(torch.linspace(0, 1, 4)[:, None].expand_as(made.positions))  # grows along columns
    found = made._positions(3, 8).unflatten(1, (2, 3, 8))
    assert found.shape == (1, 2, 3, 8, 16)
    assert (found[..., 1:, :] - found[..., :-1, :] > -1e-2).all()
    torch.testing.assert_close(found[0, 0, 0], found[0, 1, 2])
    torch.testing.assert_close(found[0, 0, 0, 3:5, 0].mean(), torch.tensor(0.5), atol=1e-5, rtol=0)
    assert made(pixels(4, 24, 64)).shape == (2, 16, 2, 3, 8)


def test_adapters_train_alone():
    made = video_mae(adapters=[0, 2])
    trains = {name for name, p in made.named_parameters() if p.requires_grad}
    assert {name.split(".adapter.")[0] for name in trains} == {f"model.encoder.layer.{i}" for i in (0, 2)}
    assert all(p.requires_grad for p in video_mae().parameters())
    with pytest.raises(ValueError, match=r"got adapters in blocks \[3\]; expected numbers below 3, or 'all'"):
        video_mae(adapters=[3])
    with pytest.raises(ValueError, match="with temporal adapters, which join clips"):
        Backbone(made, clip_frames=4)
    with pytest.raises(ValueError, match="got 6 frames; expected a multiple of 4"):
        made(pixels(6))


def hugging_face(state):
    """As its files were written: biases of queries and values beside them, a classifier, a norm."""
    names = {"query.bias": "q_bias", "value.bias": "v_bias"}
    for now, then in names.items():
        state = {
            name.replace(f"attention.attention.{now}", f"attention.attention.{then}"): v for name, v in state.items()
        }
    return {f"videomae.{n}": v for n, v in state.items()} | {"classifier.weight": torch.zeros(2, 16)}


def openmmlab(state, mlp=("layers.0.0", "layers.1"), embed="projection"):
    """mmaction2's names."""
    table = {
        "embeddings.patch_embeddings.projection": f"patch_embed.{embed}",
        "encoder.layer.": "blocks.",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": f"mlp.{mlp[0]}",
        "output.dense": f"mlp.{mlp[1]}",
        "attention.attention.query.bias": "attn.q_bias",
        "attention.attention.value.bias": "attn.v_bias",
    }
    found = {"fc_norm.weight": torch.ones(16), "pos_embed": torch.zeros(1, 32, 16)}
    for name, value in state.items():
        for now, then in table.items():
            name = name.replace(now, then)
        if name.endswith("attention.attention.query.weight"):
            before = name.removesuffix("attention.attention.query.weight")
            parts = [
                state[f"encoder.layer.{before.split('.')[1]}.attention.attention.{p}.weight"]
                for p in ("query", "key", "value")
            ]
            found[f"{before}attn.qkv.weight"] = torch.cat(parts)
        elif "attention.attention" not in name:
            found[name] = value
    return found


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


FORMS = {
    "hugging face": hugging_face,
    "mmaction2": lambda state: {"state_dict": under("backbone.", openmmlab(state)) | {"cls_head.w": torch.zeros(1)}},
    "opentad": lambda state: {"state_dict_ema": under("module.backbone.model.backbone.", openmmlab(state))},
    "the authors": lambda state: {"module": openmmlab(state, ("fc1", "fc2"), "proj")},
}


@pytest.mark.parametrize("adapters", [(), (1,)], ids=["plain", "adapters"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_published_files(form, adapters, tmp_path):
    source, target = video_mae(adapters=adapters), VideoMAE(**SMALL, adapters=adapters)
    torch.save(form(source.model.state_dict()), tmp_path / "published.pth")
    assert not torch.allclose(target(pixels()), source(pixels()), atol=1e-3)
    networks.load_weights(target, tmp_path / "published.pth")
    assert torch.equal(target(pixels()), source(pixels()))


def test_safetensors(tmp_path):
    source, target = video_mae(), VideoMAE(**SMALL)
    save_file(
        {n: v.contiguous() for n, v in hugging_face(source.model.state_dict()).items()}, tmp_path / "a.safetensors"
    )
    load_published(target, tmp_path / "a.safetensors")
    assert torch.equal(target(pixels()), source(pixels()))


def test_other_files_are_refused():
    state = openmmlab(video_mae(adapters=[1]).model.state_dict())
    with pytest.raises(KeyError, match=r"not of the module: encoder.layer.1.adapter.conv.bias"):
        load_published(video_mae(), state)
    del state["blocks.1.adapter.gamma"], state["blocks.0.norm1.bias"]
    missing = r"missing from the checkpoint: encoder.layer.0.layernorm_before.bias, encoder.layer.1.adapter.gamma"
    with pytest.raises(KeyError, match=missing):
        load_published(video_mae(adapters=[1]), state)
    with pytest.raises(KeyError, match=r"it has no VideoMAE; expected a parameter embeddings.patch_embeddings"):
        load_published(video_mae(), {"head.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("memory", "adapters"),
    [(memory, adapters) for memory in ("checkpoint", "leanest", "bdia") for adapters in ((), "all")]
    + [("re2tal", (1, 2))],
)
def test_each_way_of_keeping_activations(memory, adapters):
    """Checkpointing gives the plain gradients; what is rewired rebuilds to the bit."""
    frames = torch.randint(0, 256, (1, 3, 8, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def gradients(memory):
        backbone = Backbone(video_mae(adapters=adapters, drop_path=0.2), freeze_norms=False)
        network = networks.Network(backbone, nn.Identity())
        networks.rewire(network, frames, memory)
        torch.manual_seed(1)
        backbone(frames).square().mean().backward()
        return network, {name: p.grad for name, p in backbone.named_parameters() if p.requires_grad}

    network, found = gradients(memory)
    assert len(network.blocks) == 3
    assert all(
        gradient is not None and gradient.any() for name, gradient in found.items() if not name.endswith("key.bias")
    )
    if memory == "checkpoint":
        for name, gradient in gradients("stored")[1].items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    else:
        check = revwire.verify(network.backbone, frames)
        assert check.bit_exact
        assert check.gradient_error == 0


@pytest.mark.parametrize(
    ("name", "layers", "channels", "hidden", "patch"),
    [("videomae_s", 12, 384, 1536, 16), ("videomae_l", 24, 1024, 4096, 16), ("videomae_v2_g", 40, 1408, 6144, 14)],
)
def test_parameters_of_the_published_networks(name, layers, channels, hidden, patch):
    with torch.device("meta"):
        count = sum(p.numel() for p in NETWORKS[name](side=patch).parameters())
    matrices, vectors = 4 * channels**2 + 2 * channels * hidden, 8 * channels + hidden
    assert count == layers * (matrices + vectors) + channels * (3 * 2 * patch**2 + 1)
