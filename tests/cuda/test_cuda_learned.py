"""Quantizers that learn their range, on a device: the CPU's bits, no wait, graphs, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from devices import assert_same_bits, no_sync
from sample_data import sample
from torch_ext import FakeQuantize, quantization_parameters

METHODS = [m for m in torch_ext.fake_quants() if m != "fake_quant"]
CHANNELS = {"qscheme": "per_channel_symmetric", "ch_axis": 1, "channel_len": 30}
KEYS: dict[str, dict[str, Any]] = {
    "lsq": {"method": "lsq"},
    "lsq channels": {"method": "lsq", "dtype": "int4", **CHANNELS},
    "lsq zero point": {
        "method": "lsq", "dtype": "uint4", "qscheme": "per_tensor_affine", "learn_zero_point": True
    },
    "pact": {"method": "pact", "dtype": "uint4"},
}  # fmt: skip
by_kind = pytest.mark.parametrize("kind", sorted(KEYS))


def batch(seed: int) -> Tensor:
    return sample("gauss", 40 * 30, seed).reshape(40, 30)


def train(quantizer: FakeQuantize, device: torch.device | str) -> list[Tensor]:
    """Three steps from the first batch on; outputs and gradients."""
    found = []
    for seed in range(3):
        x = batch(seed).to(device).requires_grad_()
        quantizer.zero_grad()
        out = quantizer(x)
        out.backward(batch(seed + 10).to(device))
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.sub_(parameter.grad, alpha=2.0**-6)
        found += [out.detach(), x.grad, *(p.grad for p in quantizer.parameters())]
    return found


@by_kind
def test_learning_without_a_wait_gives_the_cpus_bits(kind: str, device: torch.device):
    here, there = FakeQuantize(**KEYS[kind]), FakeQuantize(**KEYS[kind]).to(device)
    for quantizer in (here, there):
        quantizer.state = "qat"
    with no_sync(device):
        have = train(there, device)
    assert_same_bits(have, train(here, "cpu"))
    assert_same_bits(there.state_dict(), here.state_dict())
    assert_same_bits(there.calculate_qparams(), here.calculate_qparams())


@by_kind
def test_the_net_compiled_for_graphs_is_eager(kind: str, device: torch.device):
    """Of the quantizer alone: the steps between are the device's."""
    eager, quantizer = (FakeQuantize(**KEYS[kind]).to(device) for _ in range(2))
    for one in (eager, quantizer):
        one.state = "qat"
        one(batch(0).to(device))  # a range, so that nothing has to start
        one.state = "validation"
        one.state = "qat"
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    torch.compiler.reset()
    compiled: Any = torch.compile(quantizer, fullgraph=True, mode=mode)
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = batch(seed).to(device)
        have, want = compiled(x), eager(x)
        assert_same_bits(have, want, seed)
        have.sum().backward()
        want.sum().backward()
    pairs = zip(quantizer.parameters(), eager.parameters(), strict=True)
    for mine, theirs in pairs:
        assert_same_bits(mine.grad, theirs.grad)


def test_a_parameter_that_is_no_number_gives_no_plausible_one(device: torch.device):
    quantizer = FakeQuantize("lsq").to(device)
    quantizer.state = "qat"
    quantizer(batch(0).to(device))
    with torch.no_grad():
        quantizer.scale.fill_(torch.nan)
    if device.type == "cuda":  # a look would be a wait
        assert quantizer(batch(1).to(device)).isnan().all()
    with pytest.raises(ValueError, match="scale to be finite, got nan"):
        quantizer.state = "validation"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_with_a_scaler_keeps_scales_finite(
    method: str, dtype: torch.dtype, device: torch.device
):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 4))
    net.qconfig = torch_ext.get_default_qconfig(method, "lsq")
    net = torch_ext.prepare_qat(net).to(device)
    torch_ext.set_fake_quantize(net, "qat")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**120)
    for seed in range(20):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=dtype):
            out = net(batch(seed).to(device))
        scaler.scale(out.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    learned = quantization_parameters(net)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learned)
    torch_ext.set_fake_quantize(net, "validation")
    assert net(batch(0).to(device)).isfinite().all()
