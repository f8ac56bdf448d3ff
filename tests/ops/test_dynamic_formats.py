"""MX and NVFP4 blocks: against torchao's, and against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from group_values import DTYPES, assert_same, in_groups, spread
from op_samples import NVFP4
from torch_ext import ops

MX_FORMATS = {
    "float8_e4m3": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float6_e2m3": "fp6_e2m3",
    "float6_e3m2": "fp6_e3m2",
    "float4_e2m1": "float4_e2m1fn_x2",
}
MX_RULES = {"scale_rule=floor": "FLOOR", "power_of_two": "RCEIL", "scale_rule=even": "EVEN"}


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("name", MX_FORMATS)
def test_equals_torchaos_mx(name: str, rule: str):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    kind = getattr(torch, MX_FORMATS[name], MX_FORMATS[name])
    mode = mx.ScaleCalculationMode[MX_RULES[rule]]
    x = spread(500, 256, torch.float32)
    # Every mantissa of a bound near a power of two: where the rules differ.
    edges = torch.exp2(torch.linspace(-0.6, 0.6, 500))
    x[:, 0] = edges * torch.exp2(torch.randint(-9, 9, (500,)).float())
    x[:, 1:32] *= 0
    scale, codes = mx.to_mx(x, kind, 32, mode)
    want = mx.to_dtype(codes, scale, kind, 32, torch.float32)
    have = ops.dynamic_fake_quant(x, 32, grid=f"{name} {rule}")
    assert torch.equal(have, want)


def test_mxint8():
    """OCP: integers k/64 times 2^floor(log2 of the largest magnitude)."""
    x = spread(40, 64, torch.float32)
    have = ops.dynamic_fake_quant(x, 32, -128, 127, scale_rule="floor")
    values = in_groups(x, 32)
    top = np.abs(values).max(1, keepdims=True)
    unit = np.where(top > 0, np.exp2(np.frexp(top)[1] - 1) / 64, 1)
    assert_same(have, np.clip(np.rint(values / unit), -128, 127) * unit)


# ---- NVFP4


def e2m1(v: Tensor) -> Tensor:
    """The nearest of the format's numbers, of two the one with an even code."""
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=v.dtype)
    middles = (table[1:] + table[:-1]) / 2
    # A middle belongs to the even code: to the upper one, where that is even.
    below = torch.bucketize(v.abs().clamp(max=6), middles)
    above = torch.bucketize(v.abs().clamp(max=6), middles, right=True)
    return table[torch.where(above % 2 == 0, above, below)].copysign(v)


def nvfp4(x: Tensor, tensor_scale: Tensor) -> Tensor:
    values = x.double().view(-1, 16)
    units = values.abs().amax(1, keepdim=True).float().double() / 6 / tensor_scale.double()
    # To the nearest of float8_e4m3 in float64: cast to float32 first would round twice.
    power = torch.exp2(torch.floor(torch.log2(units.clamp(2.0**-6, 448))))
    step = power / 8
    codes = (units.clamp(2.0**-6, 448) / step).round() * step
    scale = codes.float() * tensor_scale
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = values.to(kind) / scale.to(kind)
    return (e2m1(v.clamp(-6, 6)) * scale.to(kind)).view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4(dtype: torch.dtype):
    x = spread(200, 64, dtype)
    amax = x.float().abs().max()
    for factor in (1.0, 0.3, 4.0):
        g = (amax * factor / (448 * 6)).view(1)
        have = ops.dynamic_fake_quant(x, 16, grid=NVFP4, tensor_scale=g)
        assert_same(have, nvfp4(x, g))


def test_nvfp4_of_a_static_range():
    x = spread(100, 16, torch.float32)
    g = (x.abs().max() / (448 * 6)).view(1)
    scale, zero_point = ops.qparams(
        ops.min_max(x, grid=NVFP4, ch_axis=0), grid=NVFP4, tensor_scale=g
    )
    assert_same(ops.fake_quant(x, scale, zero_point, ch_axis=0, grid=NVFP4), nvfp4(x, g))
    units = scale / g
    assert torch.equal(units.to(torch.float8_e4m3fn).float() * g, scale)
    assert float(units.max()) == 448
    assert float(units[50]) == 2.0**-6  # of zeros


def test_nvfp4_has_torchaos_block_scales():
    """On bounds for which its float32 quotients and ours in float64 round alike."""
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = spread(200, 64, torch.float32)
    g = nv.per_tensor_amax_to_scale(x.abs().max())
    scales, _ = nv.nvfp4_quantize(x, 16, g)
    ranges = ops.min_max(x.view(-1, 16), grid=NVFP4, ch_axis=0)
    scale, _ = ops.qparams(ranges, grid=NVFP4, tensor_scale=g.view(1))
    assert torch.equal(scales.float().view(-1) * g, scale)
