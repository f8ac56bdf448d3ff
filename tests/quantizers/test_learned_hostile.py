"""Quantizers that learn their range against optimizers and users that mean them harm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from nets.learned_net import in_state, prepared
from nets.tiny_net import images
from snapshots import same, snapshot
from torch_ext import (
    FakeQuantize,
    FakeQuantState,
    describe,
    load_observer_params,
    quantization_parameters,
    save_observer_params,
    set_fake_quantize,
)

LEARNED = [m for m in torch_ext.fake_quants() if m != "fake_quant"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -3.0, 1e-38, 3e38, -1e-30])
def test_no_finite_parameter_gives_anything_but_finite_numbers(method: str, value: float):
    quantizer = in_state("qat", method=method)
    quantizer(torch.randn(8))
    parameter = next(quantizer.parameters())
    with torch.no_grad():
        parameter.fill_(value)
    x = torch.randn(8, requires_grad=True)
    out = quantizer(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert parameter.grad.isfinite().all()
    quantizer.state = "validation"
    scale, _ = quantizer.calculate_qparams()
    assert (scale > 0).all()
    assert scale.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", LEARNED)
def test_a_parameter_that_is_no_number_is_named(method: str, value: float, tmp_path: Path):
    net = prepared(method, "lsq")
    set_fake_quantize(net, "qat")
    net(images(4))
    victim = net.get_submodule("conv2.input_quantizers.input")
    name = f"conv2.input_quantizers.input.{'scale' if method == 'lsq' else 'alpha'}"
    text = f"expected {name} to be finite, got {value} in channel 0"
    with torch.no_grad():
        next(victim.parameters()).fill_(value)
    before = snapshot(net)
    with pytest.raises(ValueError, match=text):
        net(images(4))
    with pytest.raises(ValueError, match=text):
        set_fake_quantize(net, "validation")
    assert victim.state is FakeQuantState.QAT
    with pytest.raises(ValueError, match=text):
        save_observer_params(net, tmp_path / "params.safetensors")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=text):
        load_observer_params(net, prepared(method, "lsq"))
    assert same(snapshot(net), before)
    shown = next(r for r in describe(net).quantizers if r.name == "conv2.input_quantizers.input")
    assert shown.scale == "not finite"


def test_infinite_gradients_under_a_grad_scaler_leave_scales_alone():
    net = prepared("lsq", "lsq")
    set_fake_quantize(net, "qat")
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before: list[Tensor] = []
    for step in range(3):
        optimizer.zero_grad()
        loss = (net(images(4)) * (1e30 if step == 1 else 1e-38)).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        infinite = any(not p.grad.isfinite().all() for p in net.parameters())
        assert infinite == (step == 1)
        before = [p.detach().clone() for p in net.parameters()]
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert moved == (step != 1)
    assert all(p.isfinite().all() for p in quantization_parameters(net))


CHANNELS = {"qscheme": "per_channel_symmetric", "ch_axis": 0, "channel_len": 2}


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"method": "pact", **CHANNELS}, ValueError, "qscheme to be per_tensor_symmetric, got per"),
        ({"method": "pact", "qscheme": "per_tensor_affine"}, ValueError, "qscheme to be"),
        ({"method": "pact", "scale_rule": "tvm"}, ValueError, "scale_rule to be grid, got tvm"),
        ({"method": "pact", "alpha": 0.0}, ValueError, "alpha to be finite and above 0, got 0.0"),
        ({"method": "pact", "alpha": math.nan}, ValueError, "alpha to be finite"),
        ({"method": "pact", "alpha": "6"}, TypeError, "alpha to be a number, got '6'"),
        ({"method": "pact", "use_grad_scaling": False}, ValueError, "only lsq scales gradients"),
        ({"method": "pact", "learn_zero_point": True}, ValueError, "only lsq learns one"),
        ({"method": "lsq", "learn_zero_point": True}, ValueError, "on an affine qscheme"),
        ({"method": "lsq", "alpha": 6.0}, ValueError, "to be None, got 6.0: only pact has one"),
        ({"method": "lsq", "power_of_two": True}, ValueError, "power_of_two to be False"),
        ({"method": "lsq", "quant_max": 0}, ValueError, "quant_max to be at least 1, got 0"),
        ({"method": "lsq", "use_grad_scaling": 1}, TypeError, "use_grad_scaling to be True or"),
        ({"alpha": 6.0}, ValueError, "FakeQuantize(fake_quant): expected alpha to be None"),
        ({"use_grad_scaling": False}, ValueError, "use_grad_scaling to be True, got False"),
        ({"learn_zero_point": True}, ValueError, "learn_zero_point to be False, got True: only"),
    ],
)
def test_bad_keys_are_refused(keys: dict[str, Any], kind: type[Exception], text: str):
    with pytest.raises(kind) as raised:
        FakeQuantize(**keys)
    assert text in str(raised.value)
    assert "got" in str(raised.value)
