"""torch_ext.pt2e on models of torchvision, calibrated and trained, to the converted graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pt2e_graphs import WEIGHT, prepared, quantizations  # isort: skip

from torchao.quantization.pt2e import disable_observer
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from nets.architectures import architecture
from torch_ext import pt2e

Scales = tuple[set[float], set[tuple[float, ...]]]


def ours(model: GraphModule) -> Scales:
    """Scales of our modules in a prepared graph: per tensor, and per channel."""
    kinds = (pt2e.PT2EObserver, pt2e.PT2EFakeQuantize)
    modules = [m for m in model.modules() if isinstance(m, kinds)]
    scales = [(m.ch_axis, m.calculate_qparams()[0]) for m in modules]
    return (
        {float(scale) for axis, scale in scales if axis < 0},
        {tuple(scale.tolist()) for axis, scale in scales if axis >= 0},
    )


def converted(model: GraphModule, weights: int) -> GraphModule:
    """Checked: so many weights are quantized, and all scales are those found."""
    per_tensor, per_channel = ours(model)
    assert len(per_channel) == weights
    assert len(per_tensor) >= weights / 2
    done = convert_pt2e(model)
    assert {scale for scale, *_ in quantizations(done)} == per_tensor
    scales = [tuple(scale.tolist()) for scale, *_ in quantizations(done, per_channel=True)]
    assert len(scales) == weights
    assert set(scales) == per_channel
    return done


def noise_ratio(want: Tensor, have: Tensor) -> float:
    """Signal to noise in dB."""
    return float(10 * torch.log10(want.square().sum() / (want - have).square().sum()))


@torch.no_grad()
def test_calibrated() -> None:
    """A ResNet: 20 convolutions and a linear layer; prepare_pt2e folds its BatchNorms."""
    model, images = architecture("resnet18", 4)
    specs = pt2e.observer_spec("percentile"), pt2e.observer_spec("mse", **WEIGHT)
    graph = prepared(model.eval(), images, *specs)
    want = model(images)
    torch.testing.assert_close(graph(images), want, rtol=1e-3, atol=1e-4)
    assert noise_ratio(want, converted(graph, 21)(images)) > 15


def test_trained() -> None:
    """A net without BatchNorm, which torchao takes half a minute to fold after training."""
    architecture("resnet18")  # so that torchvision can be imported
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model, images = models.squeezenet1_1(num_classes=10, dropout=0.0), torch.randn(4, 3, 48, 48)
    weight = pt2e.fake_quant_spec(averaging_constant=1.0, **WEIGHT)
    graph = prepared(model, images, pt2e.fake_quant_spec("lsq"), weight, qat=True)
    optimizer = torch.optim.SGD(graph.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(graph(images), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    graph.apply(disable_observer)
    with torch.no_grad():
        want = graph(images)
        assert noise_ratio(want, converted(graph, 26)(images)) > 20
