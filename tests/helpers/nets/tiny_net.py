"""A small net with BatchNorm and Dropout, images for it, and the net prepared and calibrated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torch_ext


class TinyNet(nn.Module):
    """A residual net for [N,1,8,8] images with every usual kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.add = torch_ext.Add()
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.add(self.bn2(self.conv2(x)), x)
        return self.fc(self.dropout(x.mean((2, 3))))


ACTIVATIONS = [
    "conv1.input_quantizers.input",
    "conv2.input_quantizers.input",
    "add.input_quantizers.a",
    "add.input_quantizers.b",
    "fc.input_quantizers.input",
]
WEIGHTS = [
    "conv1.parametrizations.weight.0",
    "conv2.parametrizations.weight.0",
    "fc.parametrizations.weight.0",
]


def tiny_net(seed: int = 1) -> TinyNet:
    """With running statistics that differ from the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    net = TinyNet()
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        for norm in (net.bn1, net.bn2):
            norm.running_mean.copy_(torch.randn(4, generator=generator))
            norm.running_var.copy_(torch.rand(4, generator=generator) + 0.5)
    return net


def images(count: int = 6, seed: int = 2) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared(qconfig: Any = None, **kwargs: Any) -> TinyNet:
    net = tiny_net().eval()
    net.qconfig = qconfig or torch_ext.get_default_qconfig()
    return torch_ext.prepare_qat(net, **kwargs)


def calibrated(qconfig: Any = None) -> TinyNet:
    """In VALIDATION."""
    net = prepared(qconfig)
    torch_ext.set_fake_quantize(net, "calibration")
    with torch.no_grad():
        net(images())
    torch_ext.set_fake_quantize(net, "validation")
    return net
