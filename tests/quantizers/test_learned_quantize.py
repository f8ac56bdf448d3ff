"""Quantizers that learn their range: where they start, what they learn, what breaks them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from nets.learned_net import in_state, prepared
from nets.tiny_net import images, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    FakeQuantState,
    LearnedFakeQuantize,
    float_parameters,
    load_observer_params,
    ops,
    quantization_parameters,
    save_observer_params,
    set_fake_quantize,
)

LEARNED = [m for m in torch_ext.fake_quants() if m != "fake_quant"]


pytestmark = pytest.mark.usefixtures("one_thread")


def calibrated(x: Tensor, **keys: Any) -> LearnedFakeQuantize:
    quantizer = in_state("calibration", **keys)
    assert quantizer(x) is x
    quantizer.state = "validation"
    return quantizer


def test_the_registry_lists_them():
    assert torch_ext.fake_quants() == ("fake_quant", "lsq", "pact")
    lsq = FakeQuantize("lsq", qscheme="per_channel_symmetric", ch_axis=0, channel_len=3)
    assert [(n, p.shape) for n, p in lsq.named_parameters()] == [("scale", (3,))]
    pact = FakeQuantize("pact")
    assert [(n, p.tolist()) for n, p in pact.named_parameters()] == [("alpha", [6.0])]
    assert not list(FakeQuantize().parameters())


# ---- where they start ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4"])
def test_lsq_starts_from_the_mean_magnitude_of_its_first_batch(dtype: str):
    quantizer = in_state("qat", method="lsq", dtype=dtype)
    x = torch.randn(64, 50).bfloat16().float()  # a statistic holds bfloat16 values exactly
    x[0, :2] = torch.tensor([torch.nan, torch.inf])
    quantizer(x)
    finite = x[x.isfinite()].double()
    want = 2 * finite.abs().mean() / math.sqrt(quantizer.observer.quant_max)
    assert quantizer.scale.item() == pytest.approx(want.item(), rel=1e-7)
    assert quantizer.solved.item() == 1
    before = quantizer.scale.detach().clone()
    quantizer(x.nan_to_num(0, 0) * 9)
    assert same_bits(quantizer.scale.detach(), before)


def test_lsq_starts_each_channel_on_its_own():
    keys = {"qscheme": "per_channel_symmetric", "ch_axis": 0, "channel_len": 3, "dtype": "int4"}
    quantizer = in_state("qat", method="lsq", transient=True, **keys)
    x = torch.randn(3, 40) * torch.tensor([[0.01], [1.0], [0.0]])
    quantizer(x)
    want = 2 * x[:2].abs().mean(1) / math.sqrt(7)
    # Per channel, values count as their bin's lower edge: at most 2^-7 low.
    low = quantizer.scale[:2] / want
    assert ((low <= 1 + 1e-6) & (low > 1 - 2**-7)).all()
    assert quantizer.scale[2].item() == 1  # all zero: nothing to scale


def test_a_batch_without_a_finite_value_starts_nothing():
    quantizer = in_state("qat", method="lsq")
    quantizer(torch.full((4,), torch.nan))
    assert (quantizer.solved.item(), quantizer.scale.item()) == (0, 1.0)
    quantizer(torch.ones(4))
    assert quantizer.scale.item() == pytest.approx(2 / math.sqrt(127))


@pytest.mark.parametrize("observer", [r for r in torch_ext.observers() if r != "fixed_scale"])
def test_a_calibration_of_any_observer_is_the_start(observer: str):
    x = torch.randn(500) * 3
    plain = FakeQuantize(observer=observer)
    plain.state = "calibration"
    plain(x)
    plain.state = "validation"
    lsq, pact = (calibrated(x, method=m, observer=observer) for m in LEARNED)
    assert same_bits(lsq.scale.detach(), plain.scale)
    assert pact.alpha.item() == plain.range.abs().max().item()
    for quantizer in (lsq, pact):
        assert torch.allclose(quantizer.range, plain.range.abs().max() * torch.tensor([-1.0, 1.0]))
        assert same_bits(quantizer(x), plain(x))


def test_pact_on_an_unsigned_grid_takes_the_largest_value_and_never_0():
    one_sided = calibrated(torch.tensor([-9.0, 4.0]), method="pact", dtype="uint8")
    assert one_sided.alpha.item() == 4
    assert one_sided.range.tolist() == [[0.0, 4.0]]
    with pytest.warns(torch_ext.QuantizationWarning, match="nothing to scale"):
        dead = calibrated(torch.zeros(3), method="pact", alpha=2.5)
    assert dead.alpha.item() == 2.5


def test_pact_needs_no_calibration():
    quantizer = FakeQuantize("pact", alpha=2.0)
    with pytest.raises(RuntimeError, match="expected every quantizer to have a range"):
        quantizer.state = "validation"
    quantizer.state = "qat"
    assert quantizer(torch.tensor([5.0, -5.0, 1.0])).tolist() == pytest.approx([2, -2, 1], abs=0.01)
    quantizer.state = "validation"


# ---- what they do --------------------------------------------------------------------------------


@pytest.mark.parametrize("transient", [False, True])
def test_lsq_in_training_is_the_op_without_the_batch_in_its_gradient_scale(transient: bool):
    quantizer = in_state("qat", method="lsq", transient=transient)
    x = torch.randn(8, 30)
    quantizer(x).square().sum().backward()
    scale = quantizer.scale.detach().clone().requires_grad_()
    zero_point = torch.zeros(1, dtype=torch.int32)
    out = ops.lsq(x, scale, zero_point, -128, 127, batch_axis=-1 if transient else 0)
    out.square().sum().backward()
    assert same_bits(quantizer.scale.grad, scale.grad)
    assert scale.grad.item() != 0


@pytest.mark.parametrize("method", LEARNED)
@pytest.mark.parametrize("dtype", ["int8", "uint4"])
def test_validation_is_plain_fake_quant_and_changes_nothing(method: str, dtype: str):
    quantizer = calibrated(torch.randn(100), method=method, dtype=dtype)
    with torch.no_grad():
        next(quantizer.parameters()).mul_(-1.37)  # an optimizer may turn the sign
    before = snapshot(quantizer)
    x = (torch.randn(100) * 3).requires_grad_()
    out = quantizer(x)
    observer = quantizer.observer
    scale, zero_point = quantizer.calculate_qparams()
    grid = (observer.quant_min, observer.quant_max)
    assert same_bits(out, ops.fake_quant(x.detach(), scale, zero_point, *grid))
    out.sum().backward()
    assert 0 < x.grad.sum() < 100
    assert all(p.grad is None for p in quantizer.parameters())
    assert same(snapshot(quantizer), before)
    found = ops.qparams(quantizer.range, *grid, observer.symmetric)
    assert torch.allclose(found[0], scale, rtol=1e-6)


@pytest.mark.parametrize("method", LEARNED)
def test_float_and_calibration_pass_through(method: str):
    quantizer = FakeQuantize(method)
    x = torch.randn(9)
    assert quantizer(x) is x
    quantizer.state = "calibration"
    before = [p.clone() for p in quantizer.parameters()]
    assert quantizer(x) is x
    assert all(map(torch.equal, before, quantizer.parameters()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_ends_where_the_papers_gradient_vanishes(bits: int):
    x = torch.randn(20000, generator=torch.Generator().manual_seed(bits))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    keys = {"dtype": "int4", "quant_min": low, "quant_max": high}
    quantizer = in_state("qat", method="lsq", use_grad_scaling=False, **keys)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()

    wide = x.double()

    def slope(scale: float) -> float:
        """Of the mean squared error by the scale, rounding straight through."""
        v = wide / scale
        code = v.round().clamp(low, high)
        inside = (v > low) & (v < high)
        return ((code * scale - wide) * torch.where(inside, code - v, code)).mean().item()

    least, most = 0.01, 4.0
    assert slope(least) < 0 < slope(most)
    for _ in range(60):
        middle = (least + most) / 2
        least, most = (middle, most) if slope(middle) < 0 else (least, middle)
    assert quantizer.scale.item() == pytest.approx(least, rel=2e-3)


def test_a_learned_zero_point_starts_from_the_calibrated_and_moves():
    keys = {"dtype": "uint4", "qscheme": "per_tensor_affine", "learn_zero_point": True}
    x = torch.rand(400) * 4 - 1
    quantizer = calibrated(x, method="lsq", **keys)
    start = quantizer.zero_point.clone()
    assert start.item() == 4  # -1 of [-1, 3] on 15 steps
    quantizer.state = "qat"
    optimizer = torch.optim.SGD(
        [{"params": quantizer.scale, "lr": 0.01}, {"params": quantizer.offset, "lr": 20.0}]
    )
    for _ in range(40):
        optimizer.zero_grad()
        # The data moves down: so does the range, which takes a larger zero point.
        (quantizer(x - 1) - (x - 1)).square().mean().backward()
        optimizer.step()
    assert quantizer.offset.item() >= 1
    assert quantizer.zero_point.item() == round(start.item() + quantizer.offset.item())
    quantizer.state = "validation"
    scale, zero_point = quantizer.calculate_qparams()
    assert zero_point.dtype == torch.int32
    assert same_bits(quantizer(x - 1), ops.fake_quant(x - 1, scale, zero_point, 0, 15))


# ---- in a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "weight"), [("lsq", "lsq"), ("pact", "lsq"), ("lsq", "pact")]
)
def test_a_net_trains_and_validation_repeats_after_a_round_trip(activation: str, weight: str):
    net, twin = prepared(activation, weight), prepared(activation, weight)
    set_fake_quantize(net, "qat")
    groups = [
        {"params": quantization_parameters(net), "lr": 1e-3, "weight_decay": 0.0},
        {"params": float_parameters(net), "weight_decay": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, lr=1e-2)
    net(images(8))
    start = [p.detach().clone() for p in quantization_parameters(net)]
    for _ in range(3):
        optimizer.zero_grad()
        net(images(8)).square().mean().backward()
        optimizer.step()
    learned = quantization_parameters(net)
    assert all(p.grad is not None for p in learned)
    assert sum(not torch.equal(a, b) for a, b in zip(start, learned, strict=True)) >= 5
    twin.load_state_dict(net.state_dict())
    for one in (net, twin):
        set_fake_quantize(one, "validation")
    want = net(images(8))
    assert same_bits(twin(images(8)), want)
    assert same_bits(copy.deepcopy(net)(images(8)), want)


def test_parameter_groups_are_all_parameters_once():
    net = prepared("lsq", "pact")
    own, others = quantization_parameters(net), float_parameters(net)
    assert len(own) == 8  # five activations, three weights
    ids = [id(p) for p in (*own, *others)]
    assert sorted(ids) == sorted({id(p) for p in net.parameters()})
    assert quantization_parameters(prepared("fake_quant", "fake_quant")) == []
    with pytest.raises(ValueError, match="quantization_parameters: expected model to have quant"):
        quantization_parameters(tiny_net())


METHODS = torch_ext.fake_quants()


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize("source", METHODS)
@pytest.mark.parametrize("target", METHODS)
def test_ranges_travel_between_all_methods(
    source: str, target: str, through_file: bool, tmp_path: Path
):
    one = prepared(source, "fake_quant", activation_qkwargs={"histogram": True})
    set_fake_quantize(one, "calibration")
    one(images(8))
    set_fake_quantize(one, "validation")
    other = prepared(target, "lsq")
    path = tmp_path / "params.safetensors"
    if through_file:
        save_observer_params(one, path)
    report = load_observer_params(path if through_file else one, other)
    assert report.complete
    set_fake_quantize(other, "validation")
    for name, row in torch_ext.fake_quantize_states(other).items():
        assert row is FakeQuantState.VALIDATION
        mine, theirs = one.get_submodule(name), other.get_submodule(name)
        assert torch.allclose(
            mine.calculate_qparams()[0], theirs.calculate_qparams()[0], rtol=1e-6, atol=0
        )
    assert torch.allclose(other(images(8)), one(images(8)), atol=1e-5)


def test_what_ranks_share_is_every_channel_of_every_parameter():
    keys = {"qscheme": "per_channel_affine", "ch_axis": 1, "channel_len": 3}
    source, target = (FakeQuantize("lsq", learn_zero_point=True, **keys) for _ in range(2))
    with torch.no_grad():
        source.scale.copy_(torch.tensor([0.1, 0.2, 0.3]))
        source.offset.copy_(torch.tensor([1.0, -2.0, 3.0]))
    target.take_shared_(source.shared_values().detach().double())
    assert target.scale.tolist() == source.scale.tolist()
    assert target.offset.tolist() == [1.0, -2.0, 3.0]


def test_the_start_can_be_given():
    quantizer = FakeQuantize("lsq", "fixed_scale", scale=0.25)
    assert quantizer.scale.item() == 0.25
    quantizer.state = "qat"
    quantizer(torch.randn(9) * 100)
    assert quantizer.scale.item() == 0.25


@pytest.mark.parametrize("method", LEARNED)
def test_parameters_stay_float32_whatever_the_model_becomes(method: str):
    quantizer = in_state("qat", method=method).half()
    out = quantizer(torch.randn(9).half())
    assert out.dtype == torch.float16
    assert {p.dtype for p in quantizer.parameters()} == {torch.float32}
