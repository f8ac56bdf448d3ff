"""torchvision: every classification, segmentation, video and flow family, and its detectors."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn

from zoo import operators
from zoo.entry import Entry, Inputs, image

# Model -> its image size; where it matters, other arguments.
_CLASSIFIERS = {
    "alexnet": 96,
    "convnext_tiny": 64,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "efficientnet_v2_s": 64,
    "googlenet": 96,
    "inception_v3": 160,
    "maxvit_t": 224,
    "mnasnet0_5": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mobilenet_v3_large": 64,
    "regnet_x_400mf": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "resnet50": 64,
    "resnext50_32x4d": 64,
    "wide_resnet50_2": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_0": 64,
    "squeezenet1_1": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 64,
    "vgg11_bn": 64,
    "vit_b_16": 32,
}
_SEGMENTATION = (
    "deeplabv3_mobilenet_v3_large",
    "deeplabv3_resnet50",
    "fcn_resnet50",
    "lraspp_mobilenet_v3_large",
)
_VIDEO = ("mc3_18", "r3d_18", "r2plus1d_18", "s3d", "mvit_v1_b", "mvit_v2_s", "swin3d_t")
_DETECTORS = (
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
)


def _make(module: str, name: str, **keys: Any) -> nn.Module:
    models = importlib.import_module(f"torchvision.models{module}")
    made: nn.Module = getattr(models, name)(weights=None, **keys)
    return made


def _clip() -> Inputs:
    return (torch.randn(2, 3, 16, 64, 64),), {}


def _long_clip() -> Inputs:
    return (torch.randn(1, 3, 16, 224, 224),), {}


def _pair() -> Inputs:
    return (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)), {"num_flow_updates": 3}


def _photos() -> Inputs:
    return ([torch.rand(3, 96, 128), torch.rand(3, 96, 96)],), {}


def entries() -> list[Entry]:
    operators.declare()  # and imports, once for all processes
    importlib.import_module("torchvision.models")
    found = []
    for name, size in _CLASSIFIERS.items():
        keys: dict[str, Any] = {"num_classes": 10}
        if name in ("googlenet", "inception_v3"):
            keys["init_weights"] = False
        if name == "vit_b_16":
            keys["image_size"] = size
        found.append((name, functools.partial(_make, "", name, **keys), image(size)))
    for name in _SEGMENTATION:
        keys = {"num_classes": 5, "weights_backbone": None}
        if "lraspp" not in name:
            keys["aux_loss"] = True
        found.append((name, functools.partial(_make, ".segmentation", name, **keys), image(64)))
    for name in _VIDEO:
        inputs = _long_clip if "mvit" in name or name == "s3d" else _clip
        found.append((name, functools.partial(_make, ".video", name, num_classes=10), inputs))
    for name in ("raft_small", "raft_large"):
        found.append((name, functools.partial(_make, ".optical_flow", name), _pair))
    for name in _DETECTORS:
        keys = {"weights_backbone": None}
        if not name.startswith("ssd"):
            keys |= {"min_size": 96, "max_size": 128}
        found.append((name, functools.partial(_make, ".detection", name, **keys), _photos))
    return [Entry(f"torchvision/{name}", make, inputs) for name, make, inputs in found]
