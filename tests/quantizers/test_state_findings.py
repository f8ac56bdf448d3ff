"""What leaving CALIBRATION says about odd data: non-finite values, dead channels, cut negatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nets.tiny_net import TinyNet, images, prepared, tiny_net
from snapshots import same, snapshot
from torch_ext import (
    FakeQuantState,
    QuantizationWarning,
    get_default_qconfig,
    ops,
    set_fake_quantize,
)

CALIBRATION, QAT = FakeQuantState.CALIBRATION, FakeQuantState.QAT
VALIDATION, FLOAT = FakeQuantState.VALIDATION, FakeQuantState.FLOAT

QCONFIGS: dict[str, dict[str, Any]] = {
    "min_max": {},
    "histogram": {"activation_observer": "percentile", "weight_observer": "kl"},
    "frozen": {"activation_qkwargs": {"averaging_constant": 0.0}},
    "affine": {
        "activation_qkwargs": {"dtype": "uint8", "qscheme": torch.per_tensor_affine},
        "weight_qkwargs": {"qscheme": torch.per_tensor_affine, "dtype": "int4"},
    },
    "given": {"activation_observer": "fixed_scale", "activation_qkwargs": {"scale": 0.125}},
    "weights only": {"activation_fake_quant": None},
    "activations only": {"weight_fake_quant": None},
}

# What a forward in each state does to the quantizers: the statistic grows, the range moves, the
# output differs from the float model's.
EFFECT = {
    CALIBRATION: (True, False, False),
    QAT: (False, True, True),
    VALIDATION: (False, False, True),
    FLOAT: (False, False, False),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(5)  # the same dropout for all
    with torch.no_grad():
        out: torch.Tensor = net(x)
    return out


def bring(kind: str, state: FakeQuantState) -> tuple[TinyNet, TinyNet]:
    """A calibrated model in the state, and the float model it came from."""
    config = get_default_qconfig(**QCONFIGS[kind])
    net = prepared(config)
    set_fake_quantize(net, CALIBRATION)
    forward(net, images())
    if state is not CALIBRATION:
        set_fake_quantize(net, state)
    return net, tiny_net().eval()


def test_non_finite_data_is_left_out_and_named() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    x = images()
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.inf, torch.nan
    forward(net, x)
    with pytest.warns(QuantizationWarning) as caught:
        set_fake_quantize(net, VALIDATION)
    text = str(caught[0].message)
    assert "input_quantizers.x: 1 infinite and 1 NaN values were left out" in text
    assert net.input_quantizers.x.range.isfinite().all()


def test_only_non_finite_data_is_no_data() -> None:
    net = prepared()
    set_fake_quantize(net, CALIBRATION)
    forward(net, torch.full((1, 1, 8, 8), torch.nan))
    with pytest.raises(RuntimeError, match=r"input_quantizers\.x \(only non-finite values\)"):
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
    assert "input_quantizers.x: negative values, down to -" in text
    assert "relu1" not in text
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
    with pytest.raises(ValueError, match=r"solve: expected .* got contradictory ones in \S+$"):
        set_fake_quantize(model, "validation")
    assert same(snapshot(model), before)
