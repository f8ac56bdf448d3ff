"""An uncalibrated lsq starts from the first values that are not zero, each channel on its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import torch_ext
from host_reads import HostReads
from nets.learned_net import in_state
from snapshots import same_bits
from torch_ext import quantization_parameters

PER_CHANNEL = {"qscheme": "per_channel_symmetric", "ch_axis": 0, "channel_len": 3}


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_a_batch_of_zeros_starts_nothing(dtype: str):
    quantizer = in_state("qat", method="lsq", dtype=dtype)
    for batch in (torch.zeros(4), torch.tensor([0.0, torch.inf]), torch.zeros(0)):
        quantizer(batch)
        assert (quantizer.solved.item(), quantizer.scale.item()) == (0, 1.0)
    x = torch.tensor([0.5, 0.0, 1.5, 0.0])
    out = quantizer(x)
    levels = quantizer.observer.quant_max
    assert quantizer.scale.item() == pytest.approx(1 / math.sqrt(levels))
    assert quantizer.solved.item() == 1
    assert torch.allclose(out, x, atol=quantizer.scale.item() / 2)
    before = quantizer.scale.detach().clone()
    quantizer(x * 9)
    assert same_bits(quantizer.scale.detach(), before)


def test_each_channel_waits_for_its_first_value_that_is_not_zero():
    quantizer = in_state("qat", method="lsq", transient=True, **PER_CHANNEL)
    quantizer(torch.zeros(3, 8))
    assert quantizer.solved.item() == 0
    want = torch.ones(3)
    for channel, value in ((1, 0.5), (0, 2.0), (2, 0.25)):
        x = torch.zeros(3, 8)
        x[channel] = value
        x[1] = value * 3 if channel != 1 else value  # a channel that has started keeps its scale
        quantizer(x)
        want[channel] = 2 * value / math.sqrt(127)
        assert torch.allclose(quantizer.scale.detach(), want)
        assert quantizer.solved.item() == 1
    quantizer(torch.full((3, 8), 7.0))
    assert torch.allclose(quantizer.scale.detach(), want)


def test_learned_scales_stay_while_another_channel_waits():
    quantizer = in_state("qat", method="lsq", transient=True, **PER_CHANNEL)
    x = torch.zeros(3, 8)
    x[:2] = 1.5
    quantizer(x)
    with torch.no_grad():
        quantizer.scale.mul_(torch.tensor([3.0, 0.5, 1.0]))  # as an optimizer would
    learned = quantizer.scale.detach().clone()
    quantizer(x * 4)
    assert same_bits(quantizer.scale.detach(), learned)
    quantizer.state = "float"
    quantizer.state = "qat"
    x[2] = 0.5
    quantizer(x)
    assert same_bits(quantizer.scale[:2].detach(), learned[:2])
    assert quantizer.scale[2].item() == pytest.approx(1 / math.sqrt(127))


@pytest.mark.parametrize("keys", [PER_CHANNEL, {}], ids=["per channel", "per tensor"])
def test_a_calibration_of_zeros_is_no_start_either(keys: dict[str, Any]):
    quantizer = in_state("calibration", method="lsq", **keys)
    quantizer(torch.zeros(3, 8))
    with pytest.warns(torch_ext.QuantizationWarning, match="nothing to scale"):
        quantizer.state = "validation"
    assert quantizer.solved.item() == 1
    quantizer.state = "qat"
    quantizer(torch.zeros(3, 8))
    assert bool((quantizer.scale == 1).all())
    quantizer(torch.full((3, 8), 0.5))
    assert torch.allclose(quantizer.scale.detach(), torch.tensor(1 / math.sqrt(127)))
    quantizer(torch.full((3, 8), 50.0))
    assert torch.allclose(quantizer.scale.detach(), torch.tensor(1 / math.sqrt(127)))


def test_a_branch_that_begins_at_zero_learns():
    """LoRA's B: with a scale of 1 its small values would stay 0 for ever."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = x @ torch.randn(8, 8) * 0.3
    net = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 8, bias=False))
    torch.nn.init.zeros_(net[1].weight)
    net.qconfig = torch_ext.get_default_qconfig("lsq", "lsq")
    made = torch_ext.prepare_qat(net)
    torch_ext.set_fake_quantize(made, "qat")
    groups = [
        {"params": quantization_parameters(made), "lr": 1e-4},
        {"params": torch_ext.float_parameters(made)},
    ]
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = (made(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * target.square().mean().item()
    assert bool((made[1].parametrizations.weight[0].scale < 0.1).all())
    torch_ext.set_fake_quantize(made, "validation")


@pytest.mark.parametrize("keys", [PER_CHANNEL, {}], ids=["per channel", "per tensor"])
def test_a_start_reads_no_value_on_the_host(keys: dict[str, Any]):
    quantizer = in_state("qat", method="lsq", **keys)
    x = torch.randn(3, 8)
    x[1] = 0
    with HostReads():
        quantizer(x)
        quantizer(x + 1)
