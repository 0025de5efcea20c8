"""The two parts of the demo, each the same story: plan, predictions, checks, costs, fine-tuning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import revwire
from revwire.demo import clips, photos
from revwire.demo.finetune import Batch, accuracy, fine_tune
from revwire.demo.show import Show
from revwire.testing import deterministic_kernels, holds


def images(show: Show, options: dict[str, Any], *, quick: bool) -> bool:
    """EfficientNet-Lite0 on photographs: fine-tuned to tell from a crop which photograph it is from."""
    show.title("EfficientNet-Lite0, ImageNet weights, six photographs")
    model, pictures = photos.classifier(), photos.photographs()
    inputs = torch.stack([photos.EVALUATION(picture) for picture in pictures])
    before, after = _converted(show, model, inputs, options)
    show.predictions(photos.PHOTOGRAPHS, before, after, photos.CATEGORIES)
    passed = _checked(show, model, inputs, repeats=1 if quick else 3)

    model._fc = nn.Linear(model._fc.in_features, len(pictures))  # type: ignore[arg-type, union-attr]
    torch.manual_seed(0)
    batches = [photos.crops(pictures, each=2) for _ in range(5 if quick else 10)]
    unseen = photos.crops(pictures, each=4)
    return (
        _fine_tuned(show, model, batches, unseen, "which photograph is this crop from?", learning_rate=1e-3) and passed
    )


def video(show: Show, options: dict[str, Any], *, quick: bool, pretrained: bool) -> bool:
    """Video Swin-T on clips: trained to tell from a window of frames which clip it is from."""
    show.title(f"Video Swin-T, {'Kinetics-400' if pretrained else 'random'} weights, three clips")
    window = clips.Window(frames=8, side=112) if quick else clips.Window(frames=16, side=224)
    model = clips.backbone(pretrained)
    with show.working("decoding"):
        shots = [clips.decoded(name) for name in clips.CLIPS]
    inputs = window.cut(shots[0])[None]
    before, after = _converted(show, model, inputs, options)
    if pretrained:
        show.predictions(clips.CLIPS[:1], before, after, clips.CATEGORIES)
    else:
        moved = ((after - before).norm() / before.norm()).item()
        show.say(
            "random weights (--pretrained fetches Kinetics-400's), so no predictions; conversion moved the logits by "
            f"{moved:.2%}"
        )
    passed = _checked(show, model, inputs, repeats=1 if quick else 2)

    model.head = nn.Linear(model.head.in_features, len(shots))  # type: ignore[arg-type, union-attr]
    torch.manual_seed(0)
    small = clips.Window(frames=8, side=112)
    batches = [clips.windows(shots, small, each=1) for _ in range(5 if quick else 10)]
    unseen = clips.windows(shots, small, each=2)
    return _fine_tuned(show, model, batches, unseen, "which clip is this window from?", learning_rate=3e-5) and passed


def _converted(show: Show, model: nn.Module, inputs: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Convert in place; the logits before and after, both in evaluation mode."""
    with torch.no_grad():
        before = model(inputs)
    with show.working("converting"):
        revwire.convert(model, inputs, **options)
    show.say(revwire.report(model))
    with torch.no_grad():
        return before, model(inputs)


def _checked(show: Show, model: nn.Module, inputs: Tensor, repeats: int) -> bool:
    """Reconstruction, gradients, memory and time of a training step."""
    model.train()
    with show.working("checking reconstruction and gradients"):
        check = revwire.verify(model, inputs)
    show.say(f"\n{check}\n")
    with show.working("measuring memory and time"):
        show.say(revwire.profile(model, inputs, repeats=repeats))
    return holds(model, check)


def _fine_tuned(
    show: Show, model: nn.Module, batches: list[Batch], unseen: Batch, task: str, *, learning_rate: float
) -> bool:
    """Train, and train a twin with stored activations: the losses must agree to the bit. Then go back to the original
    wiring.
    """
    show.say(f"\nfine-tuning, {len(batches)} steps: {task}")
    twin = copy.deepcopy(model)
    with deterministic_kernels():  # on two threads the gradient of Swin's position biases varies by itself
        losses = _losses(show, model, batches, learning_rate, "reversible")
        with revwire.stored_activations(twin):
            expected = _losses(show, twin, batches, learning_rate, "stored activations")
    show.losses(losses)
    same, down = losses == expected, losses[-1] < losses[0]
    show.say(
        f"the loss went {'down' if down else 'UP'}; {'the same to the bit' if same else 'NOT THE SAME'} with stored "
        "activations"
    )
    right = accuracy(model, unseen)
    revwire.revert(model)
    back = accuracy(model, unseen)
    show.say(f"unseen: {right:.0%} right as converted, {back:.0%} back in the original wiring")
    return same and down


def _losses(show: Show, model: nn.Module, batches: list[Batch], learning_rate: float, what: str) -> list[float]:
    torch.manual_seed(1)  # the same dropout for the model and its twin
    return list(show.counted(fine_tune(model, batches, learning_rate), len(batches), what))
