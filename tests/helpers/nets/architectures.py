"""Real architectures of torchvision and timm, small and with random weights.

PyPI's torchvision is linked against the CUDA build of torch and does not load its operators next
to a CPU build. Its models need none of them, so their schemas are declared here instead.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

_declared: list[torch.library.Library] = []


def declare_operators() -> None:
    with contextlib.suppress(ImportError, RuntimeError):
        importlib.import_module("torchvision")
        return
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    source = Path(found.origin).with_name("_meta_registrations.py").read_text()
    names = {*re.findall(r"torchvision::(\w+)", source), *re.findall(r'_meta\("(\w+)"', source)}
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    _declared.append(library)


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


def architecture(name: str, count: int = 2) -> tuple[nn.Module, Tensor]:
    """A model without zeros for weights, so that what is not quantized shows, and images."""
    if not _declared:
        declare_operators()
    torch.manual_seed(0)
    make, size = (ZOO | NORMS)[name]
    model = make()
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model, torch.randn(count, 3, size, size)
