"""Real architectures of torchvision and timm, small and with random weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from zoo import operators


def _torchvision(name: str, **keys: object) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision: run `make test`")
    made: nn.Module = getattr(models, name)(**keys)
    return made


def _timm(name: str, **keys: object) -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs timm: run `make test`")
    made: nn.Module = timm.create_model(name, **keys)
    return made


_SWIN = {"img_size": 56, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
_VIT = {"image_size": 32, "num_classes": 10}

# Name -> how it is made, and the size of its images.
ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: _torchvision("resnet18", num_classes=10), 48),
    "mobilenet_v3_small": (lambda: _torchvision("mobilenet_v3_small", num_classes=10), 48),
    "efficientnet_b0": (lambda: _torchvision("efficientnet_b0", num_classes=10), 48),
    "vit_b_16": (lambda: _torchvision("vit_b_16", **_VIT, dropout=0.1), 32),
    "convnext_atto": (lambda: _timm("convnext_atto", num_classes=10, drop_path_rate=0.1), 48),
    "swin": (lambda: _timm("swin_tiny_patch4_window7_224", **_SWIN, drop_path_rate=0.1), 56),
}

# More with batch norms: before convolutions, with activations inside, with convolutions of timm's.
NORMS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "densenet121": (lambda: _torchvision("densenet121", num_classes=10), 48),
    "efficientnet_lite0": (lambda: _timm("efficientnet_lite0", num_classes=10), 48),
    "tf_efficientnet_lite0": (lambda: _timm("tf_efficientnet_lite0", num_classes=10), 48),
    "resnetv2_18": (lambda: _timm("resnetv2_18", num_classes=10), 48),
}

# With a clip behind each layer.
CLIPS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mobilenet_v2": (lambda: _torchvision("mobilenet_v2", num_classes=10), 32),
}


def architecture(name: str, count: int = 2) -> tuple[nn.Module, Tensor]:
    """A model without zeros for weights, so that what is not quantized shows, and images."""
    operators.declare()
    torch.manual_seed(0)
    make, size = (ZOO | NORMS | CLIPS)[name]
    model = make()
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model, torch.randn(count, 3, size, size)
