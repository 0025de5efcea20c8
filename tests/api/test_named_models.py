"""The models that the library promises by name: each converts whole, is exact, keeps what users hold on to, and goes
back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import revwire
from toys import encoder

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
hub = pytest.importorskip("pytorchvideo.models.hub")
resnet = pytest.importorskip("pytorchvideo.models.resnet")

Case = tuple[Callable[[], nn.Module], Any, int]


def video(frames: int, side: int) -> Tensor:
    return torch.randn(2, 3, frames, side, side)


class Loop(nn.Module):
    """A plain loop over a `ModuleList`, with a tap."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.2), nn.GELU()) for _ in range(4)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            if i == 1:
                tap = x
        return x, tap


def small_mvit() -> nn.Module:
    """As mvit_v2_s, with two stages: torchvision's own takes no smaller clip."""
    video_models = torchvision.models.video.mvit
    stages = [(1, 24, 24, 1), (1, 24, 24, 1), (1, 24, 24, 1), (2, 24, 48, 2), *[(2, 48, 48, 1)] * 3]
    return video_models.MViT(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=[
            video_models.MSBlockConfig(heads, inside, out, [3, 3, 3], [3, 3, 3], [1, side, side], [1, 2, 2])
            for heads, inside, out, side in stages
        ],
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        stochastic_depth_prob=0.2,
        num_classes=8,
    )


# name: (factory, example, units that must be rewired)
CASES: dict[str, Case] = {
    "loop": (Loop, torch.randn(3, 5, 8), 4),
    "encoder pre-norm": (lambda: encoder(activation="gelu"), torch.randn(2, 5, 16), 6),
    "encoder post-norm": (lambda: encoder(norm_first=False, activation="gelu"), torch.randn(2, 5, 16), 6),
    "vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, drop_path_rate=0.2),
        torch.randn(2, 3, 64, 64),
        24,
    ),
    "swin_tiny": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=2, drop_path_rate=0.2),
        torch.randn(2, 3, 64, 64),
        24,
    ),
    "convnext_atto": (lambda: timm.create_model("convnext_atto", drop_path_rate=0.2), torch.randn(2, 3, 64, 64), 12),
    "resnet50": (lambda: timm.create_model("resnet50", drop_path_rate=0.2), torch.randn(2, 3, 64, 64), 12),
    "swin3d_t": (lambda: torchvision.models.get_model("swin3d_t"), video(4, 64), 24),
    "r3d_18": (lambda: torchvision.models.get_model("r3d_18"), video(4, 32), 2),
    "mvit": (small_mvit, torch.randn(2, 3, 4, 32, 32), 13),
    "slow_r50": (lambda: resnet.create_resnet(model_depth=50, head_pool_kernel_size=(4, 2, 2)), video(4, 64), 12),
    "slowfast_r50": (
        lambda: hub.slowfast_r50(pretrained=False, head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2))),
        [video(2, 64), video(8, 64)],
        24,
    ),
}
COUPLINGS = ("re2tal", "bdia:1/2", "bdia:1/16")
# Heavy models take one coupling; under autocast so do those whose convolutions are slow in bfloat16 on most processors.
HEAVY = {"swin_tiny", "mvit", "slow_r50", "slowfast_r50", "swin3d_t", "r3d_18"}
HEAVY_IN_16_BITS = HEAVY | {"resnet50"}


def taken(heavy: set[str]) -> list[tuple[str, str]]:
    """The models, each with the couplings that it takes."""
    return [(name, c) for name in CASES for c in COUPLINGS if name not in heavy or c == "bdia:1/16"]


def built(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    factory, example, _ = CASES[name]
    return factory().train(), list(example) if isinstance(example, list) else example


def outputs(model: nn.Module, example: Any) -> tuple[Tensor, ...]:
    out = model(list(example) if isinstance(example, list) else example)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning")
@pytest.mark.parametrize(("name", "coupling"), taken(HEAVY))
def test_every_residual_block_is_rewired_and_exact(name: str, coupling: str) -> None:
    model, example = built(name)
    revwire.convert(model, example, coupling=coupling, rewire="everywhere")
    assert len(revwire.report(model).units) == CASES[name][2]
    check = revwire.verify(model, example)
    assert check.bit_exact, str(check)
    assert len(check.units) == CASES[name][2]


@pytest.mark.parametrize(("name", "coupling"), [(n, c) for n, c in taken(HEAVY_IN_16_BITS) if n not in HEAVY])
def test_exact_under_bfloat16_autocast(name: str, coupling: str) -> None:
    model, example = built(name)
    revwire.convert(model, example, coupling=coupling, rewire="everywhere")
    with torch.autocast("cpu", torch.bfloat16):
        check = revwire.verify(model, example)
    assert check.bit_exact, str(check)


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="convolutions over time in bfloat16 take ten minutes each on this processor",
)
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning")
@pytest.mark.parametrize("name", sorted(HEAVY))
def test_heavy_models_are_exact_under_bfloat16_autocast(name: str) -> None:
    model, example = built(name)
    revwire.convert(model, example, rewire="everywhere")
    with torch.autocast("cpu", torch.bfloat16):
        check = revwire.verify(model, example)
    assert check.bit_exact, str(check)


@pytest.mark.parametrize("name", list(CASES))
def test_what_users_hold_on_to_is_kept_and_revert_is_the_identity(name: str) -> None:
    model, example = built(name)
    model.eval()
    kind, keys, parameters = type(model), list(model.state_dict()), dict(model.named_parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        plain = outputs(model, example)
    assert revwire.convert(model, example, rewire="everywhere") is model
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    with torch.no_grad():
        rewired = outputs(model, example)
    revwire.revert(model)
    with torch.no_grad():
        again = outputs(model, example)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, rewired, strict=True)), (
        "the coupled network is another function"
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_recurrence_is_the_one_of_the_design() -> None:
    """re2tal and bdia on the plain loop, against the two-term recurrence written out."""
    model, x = built("loop")
    model.eval()
    blocks = copy.deepcopy(model).blocks
    for name, (a, b, c) in {"re2tal": (0.0, 1.0, 1.0), "bdia:1/4": (0.75, 0.25, 1.25)}.items():
        revwire.convert(model, x, coupling=name, rewire="everywhere")
        with torch.no_grad():
            out, _ = model(x)
            previous, current = x, x
            for block in blocks:
                previous, current = current, a * current + b * previous + c * block(current)
        expected = (previous + current) / 2 if name == "re2tal" else current
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
        revwire.revert(model)


def test_post_activation_blocks_follow_the_paper_under_re2tal() -> None:
    """x_{k+1} = x_{k-1} + relu(F(x_k)): the skip is dropped, and the activation moves into the branch."""
    model, _ = built("resnet50")
    model.eval()
    stage = model.layer3[1:]
    x = torch.randn(2, 1024, 4, 4).relu()
    with torch.no_grad():
        previous, current = x, x
        for block in copy.deepcopy(stage):
            block.act3 = nn.Identity()
            branch = (block(current) - current).relu()
            previous, current = current, previous + branch
        revwire.convert(stage, x, coupling="re2tal")
        out = stage(x)
    torch.testing.assert_close(out, (previous + current) / 2, rtol=1e-5, atol=1e-5)
