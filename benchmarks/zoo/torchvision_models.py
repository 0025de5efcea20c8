"""torchvision: classification, detection, segmentation, video, optical flow; the smallest of each family, or every
registered name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.zoo.case import Built, Case

ZOO = "torchvision_models"
CLASSIFICATION = (
    *(
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "efficientnet_v2_s",
        "googlenet",
        "inception_v3",
        "maxvit_t",
    ),
    *(
        "mnasnet0_5",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "regnet_x_400mf",
        "regnet_y_400mf",
        "resnet18",
        "resnet50",
        "resnet101",
    ),
    *(
        "resnext50_32x4d",
        "wide_resnet50_2",
        "shufflenet_v2_x0_5",
        "squeezenet1_1",
        "swin_t",
        "swin_v2_t",
        "vgg11",
        "vgg11_bn",
        "vit_b_16",
    ),
)
DETECTION = (
    *(
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
    ),
    *("keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "retinanet_resnet50_fpn"),
    *("retinanet_resnet50_fpn_v2", "ssd300_vgg16", "ssdlite320_mobilenet_v3_large"),
)
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("mc3_18", "mvit_v1_b", "mvit_v2_s", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
FLOW = ("raft_small", "raft_large")
SIDES = {"inception": 299, "maxvit": 224, "vit_": 224}
"""Pixels by the start of the name, where the model does not take 96."""
CLIPS = {"mvit": (16, 224), "s3d": (16, 224)}
"""Frames and pixels by the start of the name, where the model does not take 8 frames of 96 pixels."""
BACKBONES = {"weights_backbone": None}


def cases(everything: bool = False) -> list[Case]:
    """At least one model of each family; with ``everything``, each registered name that this file can feed."""
    names = _registered() if everything else (*CLASSIFICATION, *DETECTION, *SEGMENTATION, *VIDEO, *FLOW)
    return [Case(name, ZOO, partial(_build, name)) for name in names]


def _registered() -> list[str]:
    from torchvision import models

    return [name for name in models.list_models() if not name.startswith("quantized_")]


def _build(name: str) -> Built:
    from torchvision import models

    torch.manual_seed(0)
    kind = models.get_model_builder(name).__module__.removeprefix("torchvision.models.").split(".")[0]
    options: dict[str, Any] = {"weights": None}
    if kind in ("detection", "segmentation"):
        options |= BACKBONES
    if kind == "detection":
        options |= {"num_classes": 5} | ({"min_size": 128, "max_size": 160} if not name.startswith("ssd") else {})
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = models.get_model(name, **options)
    return Built(model.train(), _example(kind, name))


def _example(kind: str, name: str) -> Any:
    if kind == "detection":
        return _pictures_and_boxes(keypoints="keypoint" in name)
    if kind == "video":
        frames, side = next((size for start, size in CLIPS.items() if name.startswith(start)), (8, 96))
        return torch.randn(1, 3, frames, side, side)
    if kind == "optical_flow":
        return {"image1": torch.randn(1, 3, 128, 128), "image2": torch.randn(1, 3, 128, 128), "num_flow_updates": 3}
    side = next((s for start, s in SIDES.items() if name.startswith(start)), 96)
    return torch.randn(2, 3, side, side)


def _pictures_and_boxes(keypoints: bool) -> tuple[Any, ...]:
    """Two pictures as a list, and a target with boxes, labels, masks and, if asked for, keypoints for each."""
    target: dict[str, torch.Tensor] = {
        "boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0], [30.0, 40.0, 90.0, 100.0]]),
        "labels": torch.tensor([1, 1 if keypoints else 2]),
        "masks": torch.zeros(2, 128, 128, dtype=torch.uint8),
    }
    target["masks"][0, 10:60, 10:60] = target["masks"][1, 40:100, 30:90] = 1
    if keypoints:
        x, y = torch.linspace(15, 55, 17), torch.linspace(15, 55, 17)
        target["keypoints"] = torch.stack([x, y, torch.ones(17)], dim=1).repeat(2, 1, 1)
    return [torch.rand(3, 128, 128) for _ in range(2)], [target, target]
