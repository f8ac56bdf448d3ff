"""The net of the examples: 62,000 weights, with every kind of layer a mobile vision net has."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.data import CLASSES, DataError

WEIGHTS_FOLDER = Path(__file__).resolve().parents[1] / "weights"


def conv_bn(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution that keeps the image's size (over the stride), and its BatchNorm."""
    conv = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return [conv, nn.BatchNorm2d(outputs)]


class DownSample(nn.Sequential):
    """Depthwise 3x3 that halves the image, then pointwise."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            *conv_bn(inputs, inputs, 3, stride=2, groups=inputs),
            nn.ReLU(),
            *conv_bn(inputs, outputs, 1),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """relu(x + body(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(channels, channels, 3), nn.ReLU(), *conv_bn(channels, channels, 1)
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu(x + self.body(x))
        return out


class SmallNet(nn.Sequential):
    """[N,1,28,28] in [0,1] -> class scores [N,10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(1, 16, 3), nn.ReLU())
        self.down1 = DownSample(16, 32)
        self.residual1 = Residual(32)
        self.down2 = DownSample(32, 64)
        self.residual2 = Residual(64)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(64, 96)
        self.relu = nn.ReLU()
        self.scores = nn.Linear(96, CLASSES)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """The percentage of the images whose highest score is their label's."""
    right = 0
    for part, wanted in zip(images.split(batch), labels.split(batch), strict=True):
        right += int((model(part).argmax(1) == wanted).sum())
    return 100 * right / len(labels)


def trained(name: str) -> SmallNet:
    """The net with the weights that train_float.py made for this data set, in eval mode."""
    model = SmallNet()
    path = WEIGHTS_FOLDER / f"{name}.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{path}: it cannot be loaded: {error}; train_float.py makes it") from error
    return model.eval()
