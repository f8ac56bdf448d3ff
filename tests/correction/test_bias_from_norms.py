"""correct_bias without data: means that batch norms tell, against integrals and against data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from corrections import CHANNELS, Normed, batches, calibrated, depthwise, filled
from snapshots import same, snapshot
from torch_ext import correct_bias
from torch_ext.correction.biases.means_of_norms import clipped_mean

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = batches()
# Nothing is lost at activations, which the closed form leaves out.
WEIGHTS = torch_ext.get_default_qconfig(
    activation_fake_quant=None, weight_qkwargs={"dtype": "int4"}
)


@pytest.mark.parametrize("high", [6.0, float("inf")])
@pytest.mark.parametrize(
    ("mean", "deviation"), [(0, 1), (-2, 0.5), (3, 4), (1, 0), (-1, 0), (9, 1)]
)
def test_a_clipped_normal_distribution(mean: float, deviation: float, high: float) -> None:
    """Against the sum over a fine grid of the distribution."""
    given = [torch.tensor([v], dtype=torch.float64) for v in (mean, deviation)]
    z = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    want = float(((mean + deviation * z).clamp(0, high) * density).sum() / density.sum())
    assert float(clipped_mean(*given, 0.0, high)) == pytest.approx(want, abs=1e-6)


class Chain(nn.Module):
    """A layer of each kind behind a norm that makes what it reads."""

    def __init__(self, layer: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.act = act
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(self.norm(x)))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2),
    "transposed in groups": lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False),
}


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.Identity])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_normal_inputs_give(kind: str, act: type[nn.Module]) -> None:
    """The norm's input is standard normal, as its statistics say: data agrees with the formula."""
    net: Any = filled(Chain(KINDS[kind](), act()))
    net.norm.running_mean.zero_()
    net.norm.running_var.fill_(1 - net.norm.eps)
    with torch.no_grad():
        net.norm.weight.mul_(2)
    data = list(torch.randn(40, 4, 64, 64).split(20))
    models: list[Any] = [calibrated(net, data, WEIGHTS) for _ in range(2)]
    report = correct_bias(models[0])
    measured = correct_bias(models[1], data)
    assert [row.name for row in report.rows] == ["layer"]
    largest = measured.rows[0].shift
    assert largest > 0.02
    gap = (models[0].layer.bias - models[1].layer.bias).abs().max()
    assert float(gap) < 0.03 * largest
    assert str(report).startswith("1 of 1 layers corrected\n")


def test_sums_and_averages_are_followed() -> None:
    net = filled(Normed())
    model = calibrated(net, DATA, WEIGHTS)
    report = correct_bias(model)
    # conv2 and conv3 read a ReLU behind a norm, fc the average of the sum of such and a norm.
    assert [row.name for row in report.rows] == ["conv2", "conv3", "fc"]
    assert report.left == {"conv1": "no batch norm tells the mean of what it reads"}


def test_after_fuse_data_is_needed() -> None:
    net = torch_ext.fuse(filled(Normed()), example_inputs=DATA[0])
    model = calibrated(net, DATA)
    before = snapshot(model)
    with pytest.raises(ValueError, match="expected data, or layers whose input batch norms descr"):
        correct_bias(model)
    with pytest.raises(ValueError, match=r"pass data$"):
        correct_bias(calibrated(depthwise(2), DATA))
    assert same(snapshot(model), before)
    with pytest.raises(ValueError, match="correct_bias: expected data with forward and checkpoint"):
        correct_bias(model, forward=lambda m, x: m(x), checkpoint="x.safetensors")


def test_a_forward_that_cannot_be_traced() -> None:
    class Branching(Normed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else -x)

    model = calibrated(filled(Branching()), DATA, captured=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the forward cannot be traced"):
        correct_bias(model)
    assert same(snapshot(model), before)


def test_a_norm_that_is_not_finite() -> None:
    model: Any = calibrated(filled(Normed()), DATA)
    model.bn1.bias.data[0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="expected finite weights and batch norms, got others in"):
        correct_bias(model)
    assert same(snapshot(model), before)


def test_without_ranges_it_raises() -> None:
    net = filled(Normed())
    net.qconfig = torch_ext.get_default_qconfig()
    model = torch_ext.prepare_qat(net)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="correct_bias: expected every quantizer to have"):
        correct_bias(model)
    assert same(snapshot(model), before)
    assert len(model.bn1.bias) == CHANNELS


class OverLength(nn.Module):
    """Linear layers over the length of a signal, and over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.length = nn.Linear(8, 6)
        self.flat = nn.Linear(48, 5)
        self.flat_norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.length(torch.relu(self.norm(self.conv(x))))  # 8 values of length, and 8 channels
        out: Tensor = self.head(torch.relu(self.flat_norm(self.flat(x.flatten(1)))))
        return out


def test_a_linear_layer_reads_the_last_axis() -> None:
    net = filled(OverLength())
    model = calibrated(net, [torch.randn(16, 4, 8)], WEIGHTS)
    report = correct_bias(model)
    assert [row.name for row in report.rows] == ["head"]
    assert set(report.left) == {"conv", "length", "flat"}


class Scaled(Normed):
    def __init__(self, alpha: int) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        made = torch.relu(self.bn1(self.conv1(x)))
        keys = {} if self.alpha == 1 else {"alpha": self.alpha}
        out: Tensor = self.conv2(torch.add(made, made, **keys))
        return out


def test_a_sum_of_multiples_is_not_followed() -> None:
    report = correct_bias(calibrated(filled(Scaled(1)), DATA, WEIGHTS))
    assert [row.name for row in report.rows] == ["conv2"]
    with pytest.raises(ValueError, match="expected data, or layers whose input batch norms descr"):
        correct_bias(calibrated(filled(Scaled(2)), DATA, WEIGHTS))
