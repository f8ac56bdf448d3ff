"""What leaving CALIBRATION says about odd data: non-finite values, dead channels, cut negatives."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

from nets.tiny_net import images, prepared
from snapshots import same, snapshot
from states import CALIBRATION, VALIDATION, forward
from torch_ext import (
    QConfig,
    QuantizationWarning,
    get_default_qconfig,
    ops,
    prepare_qat,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_non_finite_data_is_left_out_and_named() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    x = images()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.inf, torch.nan
    forward(net, x)
    with pytest.warns(QuantizationWarning) as caught:
        set_fake_quantize(net, VALIDATION)
    text = str(caught[0].message)
    assert "conv1.input_quantizers.input: 1 infinite and 1 NaN values were left out" in text
    assert net.conv1.input_quantizers.input.range.isfinite().all()


def test_only_non_finite_data_is_no_data() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    forward(net, torch.full((1, 1, 8, 8), torch.nan))
    with pytest.raises(RuntimeError, match=r"conv1\.input_quantizers\.input \(only non-finite"):
        set_fake_quantize(net, VALIDATION)


def test_a_weight_without_finite_values_is_no_weight() -> None:
    net = prepared()
    with torch.no_grad():
        net.fc.parametrizations.weight.original.fill_(torch.nan)
    set_fake_quantize(net, CALIBRATION)
    forward(net, images())
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="the weight has no finite value"):
        set_fake_quantize(net, VALIDATION)
    after = snapshot(net)
    assert before.keys() == after.keys()
    states = {key: before[key] for key in before if key.endswith((".state", ".solved", ".range"))}
    assert same({key: after[key] for key in states}, states)


def test_a_weight_channel_without_finite_values_has_scale_one() -> None:
    net = prepared()
    with torch.no_grad():
        net.fc.parametrizations.weight.original[1] = torch.nan
    set_fake_quantize(net, CALIBRATION, "*.parametrizations.*")
    with pytest.warns(QuantizationWarning, match="0 infinite and 4 NaN values were left out"):
        set_fake_quantize(net, VALIDATION, "*.parametrizations.*")
    quantizer = net.fc.parametrizations.weight[0]
    assert quantizer.scale[1] == 1
    assert quantizer.range[1].tolist() == [0.0, 0.0]
    assert bool(net.fc.weight[[0, 2]].isfinite().all())


def test_dead_channels_and_cut_negatives_are_named() -> None:
    config = get_default_qconfig(activation_qkwargs={"dtype": "uint8"})
    net = prepared(config)
    with torch.no_grad():
        net.conv1.parametrizations.weight.original[2] = 0
    set_fake_quantize(net, CALIBRATION)
    forward(net, images())
    with pytest.warns(QuantizationWarning) as caught:
        set_fake_quantize(net, VALIDATION)
    text = str(caught[0].message)
    assert "conv1.parametrizations.weight.0: nothing to scale in [2] of 4 channels, scale 1" in text
    assert "conv1.input_quantizers.input: negative values, down to -" in text
    assert "conv2.input_quantizers" not in text
    assert net.conv1.parametrizations.weight[0].scale[2] == 1


def test_a_statistic_that_a_device_solves_to_nan_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU the op itself refuses it; elsewhere it cannot look, and gives NaN."""
    model = prepared()
    set_fake_quantize(model, "calibration")
    with torch.no_grad():
        model(images())
    before = snapshot(model)
    real = ops.solve_many

    def solve_many(*arguments: Any, **keys: Any) -> Any:
        ranges, scales, zero_points = real(*arguments, **keys)
        ranges[-1].fill_(torch.nan)
        return ranges, scales, zero_points

    monkeypatch.setattr(ops, "solve_many", solve_many)
    with pytest.raises(RuntimeError, match=r"solve: expected .* got contradictory ones in \S+$"):
        set_fake_quantize(model, "validation")
    assert same(snapshot(model), before)


class Summed(torch.nn.Module):
    """What no rule recognises as a mask: the example has none, and no softmax reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out((self.one(x) + mask).sigmoid())
        return out


CONFIG = get_default_qconfig()
HALF = torch.finfo(torch.float16).min
FILLS = {
    "-inf": (-torch.inf, "mask: 3 infinite and 0 NaN values were left out"),
    "least": (torch.finfo(torch.float32).min, r"mask: its values reach -3.403e\+38, near the end"),
    "least half": (HALF, "mask: its values reach the least value of float16, as masks do"),
    "half of it": (HALF / 2, "mask: its values reach half the least value of float16"),
    "-1e4": (-1e4, "mask: its values reach -1e4, as masks do"),
    "-1e4, bfloat16": (-9984.0, "mask: its values reach -1e4, as masks do"),
    "-1e9": (-1e9, "mask: its values reach -1e9, as masks do"),
}


def summed(own: QConfig | None = CONFIG, **keys: Any) -> torch.nn.Module:
    """``own``: the configuration of the module that adds the mask; its layers have the default."""
    net = Summed()
    net.qconfig, net.one.qconfig, net.out.qconfig = own, CONFIG, CONFIG  # type: ignore[assignment]
    return prepare_qat(net, example_inputs=(torch.randn(3, 4), torch.randn(3, 4)), **keys)


def padded(value: float) -> torch.Tensor:
    mask = torch.zeros(3, 4)
    mask[:, -1] = value
    return mask


@pytest.mark.parametrize("fill", FILLS)
def test_a_mask_is_named_with_a_way_out(fill: str) -> None:
    value, message = FILLS[fill]
    net, x = summed(), torch.randn(3, 4)
    set_fake_quantize(net, CALIBRATION)
    want = net(x, padded(value))
    with pytest.warns(QuantizationWarning, match=message) as caught:
        set_fake_quantize(net, VALIDATION)
    (advice,) = re.findall(r"set_fake_quantize\(.*\)(?= after)", str(caught[0].message))
    assert advice == 'set_fake_quantize(model, "float", "input_quantizers.mask")'
    exec(advice, {"model": net, "set_fake_quantize": set_fake_quantize})
    assert (net(x, padded(value)) - want).abs().max() < 0.05
    # The other ways: the argument, or the module.
    for way in ({"input_qconfig": None}, {"own": None}):
        made = summed(**way)
        set_fake_quantize(made, CALIBRATION)
        made(x, padded(value))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_fake_quantize(made, VALIDATION)


@pytest.mark.parametrize("value", [-65000.0, -9999.0, -123.0, 1e9])
def test_data_is_not_taken_for_a_mask(value: float) -> None:
    net = summed()
    set_fake_quantize(net, CALIBRATION)
    net(torch.randn(3, 4), padded(value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_fake_quantize(net, VALIDATION)


def test_a_mask_that_a_range_followed_is_named_after_training() -> None:
    net = summed()
    set_fake_quantize(net, "qat")
    net(torch.randn(3, 4), padded(torch.finfo(torch.float32).min))
    net(torch.randn(3, 4), padded(0.0))
    with pytest.warns(QuantizationWarning, match=r"mask: its range reaches -3\.\d+e\+38"):
        set_fake_quantize(net, VALIDATION)
    with warnings.catch_warnings():  # once, not at every change
        warnings.simplefilter("error")
        set_fake_quantize(net, "qat")
