"""torch_ext.pt2e: prepare, convert, and the scales of the converted graph against known ones."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx import GraphModule

import torch_ext
from snapshots import same, snapshot

from pt2e_graphs import WEIGHT, of_input, prepared, quantizations  # isort: skip

from torchao.quantization.pt2e import disable_fake_quant, disable_observer, enable_fake_quant
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from torch_ext import pt2e

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3)) + 0.3
Y = 2 * X.flip(0)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def observed(activation: Any = None, weight: Any = None) -> GraphModule:
    weight = weight or pt2e.observer_spec(**WEIGHT)
    return prepared(net(), X, activation or pt2e.observer_spec(), weight)


def trained(activation: Any = None) -> GraphModule:
    weight = pt2e.fake_quant_spec(averaging_constant=1.0, **WEIGHT)
    return prepared(net(), X, activation or pt2e.fake_quant_spec(), weight, qat=True)


# ---- calibration -------------------------------------------------------------------------------


def test_scales_are_those_of_the_range() -> None:
    """By the formula: 2 max|x| / 255, and for each row of the weight."""
    model = observed()
    model(X)
    model(Y)
    done = convert_pt2e(model)
    largest = float(torch.cat([X, Y]).abs().max())
    assert of_input(done) == (float(np.float32(2 * largest / 255)), 0, -128, 127, torch.int8)
    weights = [m.weight.detach() for m in net() if hasattr(m, "weight")]
    for weight, (scale, zero_point, *rest) in zip(
        weights, quantizations(done, per_channel=True), strict=True
    ):
        rows = weight.flatten(1).abs().amax(1).double()
        assert torch.equal(scale, (2 * rows / 255).float())
        assert torch.equal(zero_point, torch.zeros(len(rows), dtype=torch.int32))
        assert rest == [0, -128, 127, torch.int8]


GRIDS = {
    "int8": ({"dtype": "int8"}, -128, 127, torch.int8),
    "int4": ({"dtype": "int4"}, -8, 7, torch.int8),
    "narrow": ({"dtype": torch.int8, "quant_min": -127}, -127, 127, torch.int8),
    "uint8 affine": ({"dtype": "quint8", "qscheme": "per_tensor_affine"}, 0, 255, torch.uint8),
    "uint4 affine": ({"dtype": "uint4", "qscheme": "per_tensor_affine"}, 0, 15, torch.uint8),
    "int16": ({"dtype": torch.int16}, -32768, 32767, torch.int16),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_are_held_by_a_dtype_of_torch(grid: str) -> None:
    keys, low, high, dtype = GRIDS[grid]
    model = observed(pt2e.observer_spec(**keys))
    model(X)
    done = convert_pt2e(model)
    least, most = float(X.min()), float(X.max())
    scale, zero_point, *rest = of_input(done)
    assert rest == [low, high, dtype]
    if "qscheme" in keys:
        assert np.float32(scale) == np.float32((most - least) / (high - low))
        assert zero_point == round(low - least * (high - low) / (most - least))
    else:
        assert np.float32(scale) == np.float32(2 * max(-least, most) / (high - low))
        assert zero_point == 0
    assert done(X).isfinite().all()


@pytest.mark.parametrize("rule", torch_ext.observers())
def test_every_rule(rule: str) -> None:
    """Per tensor over two batches and per channel: what the observer finds in both at once."""
    model = observed(pt2e.observer_spec(rule), pt2e.observer_spec(rule, **WEIGHT))
    model(X)
    model(Y)
    done = convert_pt2e(model)
    observer = torch_ext.Observer(rule)
    observer(torch.cat([X, Y]))
    scale, zero_point = observer.calculate_qparams()
    assert of_input(done)[:2] == (float(scale), int(zero_point))
    weight = net()[0].weight.detach()
    per_channel = torch_ext.Observer(rule, channel_len=4, **WEIGHT)
    per_channel(weight)
    assert torch.equal(
        quantizations(done, per_channel=True)[0][0], per_channel.calculate_qparams()[0]
    )


def test_options_pass_through() -> None:
    keys = {"percentile": 90.0, "power_of_two": True}
    model = observed(pt2e.observer_spec("percentile", **keys))
    model(X)
    scale = of_input(convert_pt2e(model))[0]
    ordered = np.sort(X.abs().flatten().numpy())
    threshold = float(ordered[int(np.ceil(0.9 * len(ordered))) - 1])
    assert scale == 2 ** np.ceil(np.log2(2 * threshold / 255))


def test_convert_needs_data() -> None:
    with pytest.raises(RuntimeError, match=r"expected every observer to have seen data.*min_max"):
        convert_pt2e(observed())
    model = observed()
    model(torch.full_like(X, float("nan")))
    with pytest.raises(RuntimeError, match="expected every observer to have seen data"):
        convert_pt2e(model)


def test_a_state_dict_brings_the_channels() -> None:
    model, other = observed(), observed()
    model(X)
    other.load_state_dict(model.state_dict())
    left, right = convert_pt2e(model), convert_pt2e(other)
    assert of_input(left) == of_input(right)
    pairs = zip(quantizations(left, True), quantizations(right, True), strict=True)
    assert all(torch.equal(a[0], b[0]) for a, b in pairs)


# ---- training ----------------------------------------------------------------------------------


def test_the_range_follows_the_batches() -> None:
    model = trained()
    model(X).sum().backward()
    model(Y)
    # Symmetric: the moving average of each end, and the larger decides.
    first, second = X.double(), Y.double()
    low = first.min() + 0.01 * (second.min() - first.min())
    high = first.max() + 0.01 * (second.max() - first.max())
    want = 2 * float(torch.maximum(-low, high)) / 255
    assert of_input(convert_pt2e(model))[0] == pytest.approx(want, rel=1e-6)


# What a quantizer of X holds after its first batch.
STARTS: dict[str, Callable[[], float]] = {
    "fake_quant": lambda: 2 * float(X.abs().max()) / 255,
    "lsq": lambda: 2 * float(X.abs().mean()) / 127**0.5,
    "pact": lambda: 2 * 1 / 255,
}


@pytest.mark.parametrize("method", torch_ext.fake_quants())
def test_every_method(method: str) -> None:
    model = trained(pt2e.fake_quant_spec(method, **({"alpha": 1.0} if method == "pact" else {})))
    learned = [p for name, p in model.named_parameters() if ".inner." in name]
    assert (len(learned) > 0) == (method != "fake_quant")
    model(X).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learned)
    kept = copy.deepcopy(model)
    # A log-linear histogram leans low by at most 2^-10.
    assert of_input(convert_pt2e(kept))[0] == pytest.approx(STARTS[method](), rel=1e-3)
    if learned:
        torch.optim.SGD(learned, lr=1e-3).step()
        assert of_input(convert_pt2e(model))[0] != of_input(kept)[0]


def test_switches_choose_the_state() -> None:
    model = trained()
    quantizers = [m for m in model.modules() if isinstance(m, torch_ext.FakeQuantize)]
    assert quantizers

    def state() -> str:
        (found,) = {quantizer.state.value for quantizer in quantizers}
        return found

    assert state() == "qat"
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="expected every quantizer to have a range"):
        model.apply(disable_observer)
    assert same(before, snapshot(model))

    model.apply(disable_fake_quant)
    assert state() == "calibration"
    plain = torch.export.export(net().train(), (X,)).module()
    assert torch.equal(model(X), plain(X))
    model(Y)
    quantizers = [m for m in model.modules() if isinstance(m, torch_ext.FakeQuantize)]
    unsolved = copy.deepcopy(model)
    model.apply(enable_fake_quant)
    assert state() == "qat"
    model.apply(disable_observer)
    assert state() == "validation"
    want = np.float32(2 * float(torch.cat([X, Y]).abs().max()) / 255)
    # Whether the calibration was ended before or not.
    assert of_input(convert_pt2e(model))[0] == of_input(convert_pt2e(unsolved))[0] == float(want)


def test_the_workflow_of_the_package_works_on_the_graph() -> None:
    model = trained()
    torch_ext.set_fake_quantize(model, "calibration")
    with torch.no_grad():
        model(X)
    torch_ext.set_fake_quantize(model, "validation")
    torch_ext.resolve(model, activation_observer="clip", xmin=-0.5, xmax=0.5)
    assert of_input(convert_pt2e(model))[0] == float(np.float32(2 * 0.5 / 255))


def test_converting_an_untrained_graph_is_refused() -> None:
    with pytest.raises(RuntimeError, match="expected every fake-quant to have a range, got none"):
        convert_pt2e(trained())
    model = trained()
    model.apply(disable_fake_quant)
    with pytest.raises(RuntimeError, match=r"expected every observer to have seen data.*min_max"):
        convert_pt2e(model)


# ---- bad input ---------------------------------------------------------------------------------

BAD = {
    "rule": ({"observer": "histogram"}, 'unknown observer "histogram"; known: min_max'),
    "dtype": ({"dtype": "float8"}, "unknown dtype 'float8'; known: int4"),
    "wide dtype": ({"dtype": torch.int32}, "unknown dtype torch.int32"),
    "scheme": ({"qscheme": "per_row"}, "unknown qscheme 'per_row'"),
    "axis missing": ({"qscheme": "per_channel_affine"}, "expected ch_axis to be 0 or more"),
    "axis unused": ({"ch_axis": 1}, "expected ch_axis to be -1 with per_tensor_symmetric, got 1"),
    "bits": ({"observer": "kl", "dtype": "int16"}, "at most 8 bits"),
    "grid": ({"quant_min": 5}, "expected quant_min < quant_max"),
    "beyond int4": ({"dtype": "int4", "quant_max": 9}, "to be between -8 and 7, got -8 and 9"),
    "option": ({"observer": "percentile", "percentile": 101.0}, "percentile to be between"),
    "key": ({"percentile": 99.0}, 'unknown key "percentile"; known: '),
    "channels": ({"channel_len": 3}, 'unknown key "channel_len"'),
}


@pytest.mark.parametrize("make", [pt2e.observer_spec, pt2e.fake_quant_spec])
@pytest.mark.parametrize("case", BAD)
def test_bad_specs_are_refused_where_they_are_made(case: str, make: Callable[..., Any]) -> None:
    keys, message = BAD[case]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        make(**keys)
    assert message in str(caught.value)


def test_unknown_method_and_dynamic_specs_are_refused() -> None:
    with pytest.raises(ValueError, match='unknown fake-quant "dorefa"; known: fake_quant'):
        pt2e.fake_quant_spec("dorefa")
    with pytest.raises(ValueError, match="expected qscheme to be per_tensor_symmetric"):
        pt2e.fake_quant_spec("pact", **WEIGHT)
    spec = pt2e.observer_spec()
    with pytest.raises(ValueError, match="expected is_dynamic to be False, got True"):
        spec.observer_or_fake_quant_ctr.with_args(is_dynamic=True)()


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    monkeypatch.delitem(sys.modules, "torch_ext.pt2e")
    with pytest.raises(ImportError, match=r'pip install "torch_ext\[pt2e\]"'):
        importlib.import_module("torch_ext.pt2e")
    assert "pt2e" not in torch_ext.__all__
