"""The four parts of the demo: what a conversion changes, what it costs and gains, and where it gains nothing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import revwire
from revwire.demo import clips, curve, photos, texts
from revwire.demo.costs import REVWIRE, Cost, Inputs, costs, verdict, without_revwire
from revwire.demo.finetune import Batch, accuracy, fine_tune
from revwire.demo.show import Show
from revwire.testing import deterministic_kernels, holds

Options = dict[str, Any]


def deep(show: Show, options: Options, picture: Path, *, quick: bool) -> bool:
    """A deep ViT, where revwire gains most; and what it does with more memory than it needs."""
    from timm.models.vision_transformer import VisionTransformer

    depth, width, side = (16, 64, 160) if quick else (36, 128, 160)
    show.title(f"A ViT of {depth} blocks, random weights, two photographs")
    torch.manual_seed(0)
    model = VisionTransformer(side, 16, num_classes=6, embed_dim=width, depth=depth, num_heads=width // 32)
    seen = photos.photographs()[:2]
    inputs = (nn.functional.interpolate(torch.stack([photos.EVALUATION(picture) for picture in seen]), side),)
    plain, ways = copy.deepcopy(model), without_revwire(model, inputs)
    show.moved(*_converted(show, model, inputs, options))
    passed = _checked(show, model, inputs)

    ways[REVWIRE] = model
    peaks = revwire.report(model).peaks
    assert peaks is not None  # nothing runs in chunks
    for share in (0.4,) if quick else (0, 0.3):  # of the way from checkpointing's bytes to stored activations'
        budget = peaks.checkpointing + int(share * (peaks.stored - peaks.checkpointing))
        planned = revwire.convert(copy.deepcopy(plain).train(), inputs, memory_budget=budget, **options)
        ways[f"memory_budget={budget / curve.MIB:.1f} MiB"] = planned
    table = _measured(show, ways, inputs, quick)
    show.plain("\n" + curve.drawn(table))
    curve.saved(table, f"A ViT of {depth} blocks", picture)
    show.say(f"saved as a picture: {picture}")
    return passed


def text(show: Show, options: Options, *, quick: bool) -> bool:
    """all-MiniLM-L6-v2 on PyTorch's documentation: search, and fine-tuning to tell from which text an excerpt is."""
    show.title("all-MiniLM-L6-v2, its pretrained weights, PyTorch's own documentation")
    length, words = (24, 10) if quick else (128, 24)
    model, documents = texts.Reader(), texts.passages()
    inputs = texts.tokens(documents, length)
    ways, before = without_revwire(model, inputs), texts.nearest(model, length)
    show.moved(*_converted(show, model, inputs, options))
    show.found(before, texts.nearest(model, length))
    passed = _checked(show, model, inputs)
    _measured(show, ways | {REVWIRE: model}, inputs, quick)

    model.head = nn.Linear(384, len(documents))
    torch.manual_seed(0)
    batches = 2 * [texts.excerpts(documents, each=1, words=words) for _ in range(2 if quick else 5)]  # two epochs
    unseen = texts.excerpts(documents, each=2 if quick else 6, words=words)
    return _fine_tuned(show, model, batches, unseen, "which passage is this excerpt from?") and passed


def video(show: Show, options: Options, *, quick: bool, pretrained: bool) -> bool:
    """Video Swin-T on a clip, as it is and in chunks."""
    show.title(f"Video Swin-T, {'Kinetics-400' if pretrained else 'random'} weights, a real clip")
    model = clips.backbone(pretrained)
    window = clips.Window(frames=16, side=56 if quick else 64)
    with show.working("decoding"):
        inputs = (window.cut(clips.decoded(clips.CLIP))[None],)
    plain, ways = copy.deepcopy(model), without_revwire(model, inputs)
    before, after = _converted(show, model, inputs, options)
    show.moved(before, after)
    if pretrained:
        show.predictions([clips.CLIP], before, after, clips.CATEGORIES)
    passed = _checked(show, model, inputs)
    ways[REVWIRE] = model
    if not quick:
        with show.working("converting, in chunks"):
            ways[f"{REVWIRE}, chunks=4"] = revwire.convert(plain.train(), inputs, chunks=4, **options)
    _measured(show, ways, inputs, quick)
    return passed


def images(show: Show, options: Options, *, quick: bool) -> bool:
    """EfficientNet-Lite0 on photographs: a network whose blocks change shape, where revwire gains nothing."""
    show.title("EfficientNet-Lite0, ImageNet weights, photographs")
    names = photos.PHOTOGRAPHS[: 1 if quick else 4]
    model = photos.classifier()
    inputs = (torch.stack([photos.EVALUATION(picture) for picture in photos.photographs()[: len(names)]]),)
    ways = without_revwire(model, inputs)
    before, after = _converted(show, model, inputs, options)
    show.predictions(names, before, after, photos.CATEGORIES)
    passed = _checked(show, model, inputs)
    _measured(show, ways | {REVWIRE: model}, inputs, quick)
    return passed


@torch.no_grad()
def _outcome(model: nn.Module, inputs: Inputs) -> Tensor:
    out: Tensor = model.eval()(*inputs)
    return out


def _converted(show: Show, model: nn.Module, inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """Convert in place, for training; what the model gives before and after, both in evaluation mode."""
    before = _outcome(model, inputs)
    with show.working("converting"), warnings.catch_warnings():
        warnings.simplefilter("ignore", revwire.NothingToRewireWarning)  # the plan says so, and why
        plan = revwire.report(revwire.convert(model.train(), inputs, **options))
    show.plan(plan)
    return before, _outcome(model, inputs)


def _checked(show: Show, model: nn.Module, inputs: Inputs) -> bool:
    """Rebuilt states and gradients, against stored activations."""
    with show.working("checking reconstruction and gradients"):
        check = revwire.verify(model.train(), inputs)
    passed = holds(model, check)
    show.check(check, passed)
    return passed


def _measured(show: Show, ways: dict[str, nn.Module], inputs: Inputs, quick: bool) -> list[Cost]:
    with show.working("measuring memory and time"):
        table = costs(ways, inputs, rounds=1 if quick else 2)
    show.costs(table)
    for line in verdict(table):
        show.say(line)
    return table


def _fine_tuned(show: Show, model: nn.Module, batches: list[Batch], unseen: Batch, task: str) -> bool:
    """Train, and train a twin with stored activations: the losses must agree to the bit, and be less in the second
    epoch. Then go back to the original wiring.
    """
    show.say(f"\nfine-tuning, {len(batches)} steps: {task}")
    twin = copy.deepcopy(model)
    with deterministic_kernels():
        losses = _losses(show, model, batches, "reversible")
        with revwire.stored_activations(twin):
            expected = _losses(show, twin, batches, "stored activations")
    show.losses(losses)
    half = len(losses) // 2
    same, down = losses == expected, sum(losses[half:]) < sum(losses[:half])
    show.say(
        f"the loss went {'down' if down else 'UP'}; {'the same to the bit' if same else 'NOT THE SAME'} with stored "
        "activations"
    )
    right = accuracy(model, unseen)
    revwire.revert(model)
    back = accuracy(model, unseen)
    show.say(f"unseen: {right:.0%} right as converted, {back:.0%} back in the original wiring")
    return same and down


def _losses(show: Show, model: nn.Module, batches: list[Batch], what: str) -> list[float]:
    torch.manual_seed(1)  # the same dropout for the model and its twin
    return list(show.counted(fine_tune(model, batches, learning_rate=5e-4), len(batches), what))
