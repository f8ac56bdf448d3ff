"""A net with every kind of layer that is rounded, calibrated; the weights it computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import torch_ext
from batch_norms import shake
from torch_ext import calibrate, get_default_qconfig, prepare_qat
from torch_ext.quantizers.find import PreparedModel

INT4 = {"dtype": "int4"}


class Net(nn.Module):
    """Every kind of layer: grouped, depthwise and transposed convolutions, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 3, stride=2, groups=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.fc(x.mean((2, 3)))


ORDER = ["first", "depthwise", "grouped", "up", "twice", "fc"]


def net() -> nn.Module:
    torch.manual_seed(3)
    return shake(Net())


def data(count: int = 3, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 9, 9, generator=generator) for _ in range(count)]


def made(
    weight: dict[str, Any] | None = None,
    activation: dict[str, Any] | None = None,
    method: Any = "fake_quant",
    example: bool = True,
    **keys: Any,
) -> nn.Module:
    """The net, calibrated, in VALIDATION."""
    model = net()
    model.qconfig = get_default_qconfig(
        "fake_quant", method, "min_max", "min_max", activation, INT4 if weight is None else weight
    )
    given = data()[0] if example else None
    prepared = prepare_qat(model, example_inputs=given, **keys)
    calibrate(prepared, data(), progress=False)
    return prepared


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What the quantizers of weights make of them."""
    prepared = PreparedModel("test", model)
    found = {}
    for quantizer, source in prepared.weights.items():
        grid = (quantizer.observer.quant_min, quantizer.observer.quant_max)
        qparams = (t.detach() for t in quantizer.calculate_qparams())
        found[source.owner] = torch_ext.ops.fake_quant(
            source.read(), *qparams, *grid, quantizer.observer.ch_axis
        )
    return found
