"""Fake-quant with the scales of the values themselves, against formulas in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from group_values import DTYPES, assert_same, in_groups, spread
from op_samples import NVFP4
from torch_ext import ops

FLOATS = {"float8_e4m3": (torch.float8_e4m3fn, 448.0), "float8_e5m2": (torch.float8_e5m2, 57344.0)}
# The last axis and the group: whole registers, parts of them, long rows, a row past any cache.
SIZES = [(64, 32), (48, 16), (384, 128), (24, 8), (30, 3), (105, 35), (21, 1), (4096, None)]
# One of each kind: whole registers, parts of one, one value, rows within the caches and past them.
OF_EACH_KIND = [(64, 32), (105, 35), (24, 8), (30, 3), (84, 1), (70_000, None)]
LONG = [(9000, None), (70_000, None), (131_072, 65_536), (200_003, None)]


def integers(
    x: Tensor, group: int | None, low: int, high: int, symmetric: bool = True
) -> np.ndarray[Any, Any]:
    """Scales in float64, rounded to float32 once; then as ONNX does it, in the computing type."""
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    values = in_groups(x, group)
    least = values.min(1, keepdims=True).astype(np.float32).astype(np.float64)
    most = values.max(1, keepdims=True).astype(np.float32).astype(np.float64)
    least, most = np.minimum(least, 0), np.maximum(most, 0)
    zero = np.zeros_like(least)
    if symmetric and low < 0:
        scale = 2 * np.maximum(-least, most) / (high - low)
    elif symmetric:
        scale = most / high
    else:
        scale = (most - least) / (high - low)
        with np.errstate(invalid="ignore"):
            zero = np.nan_to_num(np.rint(low - least * (high - low) / (most - least)))
        zero = np.clip(zero, low, high)
    scale = np.where(scale == 0, 1, np.maximum(scale, 2.0**-126)).astype(np.float32).astype(kind)
    codes = np.clip(np.rint(values.astype(kind) / scale) + zero, low, high)
    return ((codes - zero).astype(kind) * scale).astype(kind)


def floats(x: Tensor, group: int | None, name: str, scale: np.ndarray[Any, Any]) -> Tensor:
    """By Torch's cast."""
    dtype, largest = FLOATS[name]
    values = torch.from_numpy(in_groups(x, group)).float()
    s = torch.from_numpy(scale.astype(np.float32)).view(-1, 1)
    return (values / s).clamp(-largest, largest).to(dtype).float() * s


def bounds(x: Tensor, group: int | None) -> np.ndarray[Any, Any]:
    return np.abs(in_groups(x, group)).max(1).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group"), SIZES)
def test_integers(columns: int, group: int | None, dtype: torch.dtype):
    for rows in (1, 7, 50):
        x = spread(rows, columns, dtype)
        for low, high, symmetric in (
            (-128, 127, True),
            (-127, 127, True),
            (-8, 7, True),
            (0, 255, True),
            (0, 255, False),
            (-128, 127, False),
        ):
            have = ops.dynamic_fake_quant(x, group, low, high, symmetric=symmetric)
            assert have.shape == x.shape
            assert have.dtype == dtype
            assert_same(have, integers(x, group, low, high, symmetric))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group"), LONG)
def test_long_groups(columns: int, group: int | None, dtype: torch.dtype):
    x = spread(5, columns, dtype)
    assert_same(ops.dynamic_fake_quant(x, group, -128, 127), integers(x, group, -128, 127))
    affine = ops.dynamic_fake_quant(x, group, 0, 255, symmetric=False)
    assert_same(affine, integers(x, group, 0, 255, False))


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "group"), [*SIZES, (70_000, None)])
def test_float_formats(columns: int, group: int | None, dtype: torch.dtype, name: str):
    x = spread(9, columns, dtype)
    largest = FLOATS[name][1]
    t = bounds(x, group)
    plain = np.where(t == 0, 1, t / largest)
    assert_same(ops.dynamic_fake_quant(x, group, grid=name), floats(x, group, name, plain))
    exponent = np.frexp(t)[1] - 1 - math.floor(math.log2(largest))
    floor = np.where(t == 0, 1, np.exp2(np.maximum(exponent, -126)))
    have = ops.dynamic_fake_quant(x, group, grid=f"{name} scale_rule=floor")
    assert_same(have, floats(x, group, name, floor))


GRIDS = [
    "[-128,127] symmetric",
    "[-128,127] symmetric scale_rule=tvm",
    "[-8,7] symmetric power_of_two rounding=half_away",
    "[0,15] symmetric",
    "[0,255] affine power_of_two",
    "[-8,7] affine rounding=floor_half_up",
    "[-128,127] symmetric scale_rule=floor",
    "[0,255] symmetric scale_rule=floor",
    *(f"{name}{rule}" for name, rule in itertools.product(
        ("float8_e4m3", "float8_e5m2", "float6_e2m3", "float6_e3m2", "float4_e2m1"),
        ("", " power_of_two", " scale_rule=floor", " scale_rule=even"),
    )),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_static_fake_quant_with_the_groups_ranges(grid: str, dtype: torch.dtype):
    """A law over grids; the formulas are those of the tests above and of fake_quant's."""
    for columns, group in OF_EACH_KIND:
        x = spread(6, columns, dtype)
        rows = x.view(-1, columns if group is None else group)
        ranges = ops.min_max(rows, grid=grid, ch_axis=0)
        qparams = ops.qparams(ranges, grid=grid)
        want = ops.fake_quant(rows, *qparams, ch_axis=0, grid=grid).view(x.shape)
        assert torch.equal(ops.dynamic_fake_quant(x, group, grid=grid), want)
        upstream = torch.arange(x.numel()).view(x.shape).to(dtype)
        got = x.clone().requires_grad_()
        ops.dynamic_fake_quant(got, group, grid=grid).backward(upstream)
        static = rows.clone().requires_grad_()
        ops.fake_quant(static, *qparams, ch_axis=0, grid=grid).backward(upstream.view(rows.shape))
        assert torch.equal(got.grad.view(rows.shape), static.grad)


def test_arguments_are_the_words_of_the_grid():
    x = spread(3, 64, torch.float32)
    for given, text in (
        ({}, "[-8,7] symmetric"),
        ({"symmetric": False}, "[-8,7] affine"),
        ({"power_of_two": True}, "[-8,7] symmetric power_of_two"),
        ({"scale_rule": "floor"}, "[-8,7] symmetric scale_rule=floor"),
    ):
        have = ops.dynamic_fake_quant(x, 16, -8, 7, **given)
        assert torch.equal(have, ops.dynamic_fake_quant(x, 16, grid=text))
    for symmetric in (True, False):
        with pytest.raises(TypeError, match="alone, got arguments that it stands for"):
            ops.dynamic_fake_quant(x, grid="[-8,7] affine", symmetric=symmetric)
    with pytest.raises(TypeError, match="alone, got arguments that it stands for"):
        ops.dynamic_fake_quant(x, 8, symmetric=True, grid="[0,255] affine")
    with pytest.raises(TypeError, match="expected quant_min and quant_max, or grid, got neither"):
        ops.dynamic_fake_quant(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("grid", ["[-128,127] symmetric", "[0,255] affine", "float8_e4m3"])
def test_a_group_that_is_not_finite_becomes_nan(grid: str, bad: float, dtype: torch.dtype):
    for columns, group in [(64, 16), (30, 3), (600, 300), (9000, None), (140_000, 70_000)]:
        x = spread(4, columns, dtype)
        clean = ops.dynamic_fake_quant(x, group, grid=grid)
        groups = columns // (columns if group is None else group)
        hit = x.clone()
        hit[2, -1] = bad
        got = hit.clone().requires_grad_()
        out = ops.dynamic_fake_quant(got, group, grid=grid)
        rows = out.detach().view(4 * groups, -1)
        last = 3 * groups - 1
        assert rows[last].isnan().all()
        keep = torch.arange(4 * groups) != last
        assert torch.equal(rows[keep], clean.view(4 * groups, -1)[keep])
        out.nan_to_num().sum().backward()
        assert not got.grad.view(4 * groups, -1)[last].any()


def test_float64_beyond_float32_has_no_scale():
    x = torch.ones(3, 16, dtype=torch.float64)
    x[1, 3] = 1e39
    out = ops.dynamic_fake_quant(x, None, -128, 127)
    assert out.isnan().all(1).tolist() == [False, True, False]


def test_ends_of_float32():
    top = torch.finfo(torch.float32).max
    x = torch.tensor([[top, -top, 1.0, 0.0], [1e-45, -1e-45, 0.0, 0.0], [-0.0, 0.0, 0.0, 0.0]])
    for grid in GRIDS:
        out = ops.dynamic_fake_quant(x, grid=grid)
        assert out.isfinite().all(), grid
        assert not out[1:].any(), grid
    # The ends of core/qparams.h's tensor_scales(): scales stay between 2^-126 and what 6 times of
    # which is finite.
    for tensor_scale in (2.0**-120, top / (448 * 6)):
        g = torch.tensor([tensor_scale])
        out = ops.dynamic_fake_quant(x, grid=NVFP4, tensor_scale=g)
        assert out.isfinite().all(), tensor_scale
        assert not out[1:].any(), tensor_scale
    signs = ops.dynamic_fake_quant(x, grid="float8_e4m3").signbit()
    assert signs[2].tolist() == [True, False, False, False]


@pytest.mark.parametrize("view", ["transposed", "channels_last", "heads", "sliced", "expanded"])
def test_any_strides(view: str):
    base = spread(4, 480, torch.float32).view(4, 6, 5, 16)
    x = {
        "transposed": lambda: base.transpose(1, 3).contiguous().transpose(1, 3),
        "channels_last": lambda: base.contiguous(memory_format=torch.channels_last),
        "heads": lambda: base.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": lambda: torch.cat([base, base], 3)[..., :16],
        "expanded": lambda: base[:1].expand(4, 6, 5, 16),
    }[view]()
    plain = x.contiguous()
    upstream = torch.randn(x.shape)
    for group in (None, 8):
        a, b = x.detach().requires_grad_(), plain.clone().requires_grad_()
        out, want = (ops.dynamic_fake_quant(t, group, -8, 7) for t in (a, b))
        assert torch.equal(out, want)
        assert out.stride() == torch.neg(x).stride()
        # Not by backward(), which would lay out the gradient as x.
        (dx,) = torch.autograd.grad(out, a, upstream)
        assert torch.equal(dx, torch.autograd.grad(want, b, upstream)[0])
        assert dx.stride() == torch.neg(x).stride()
        meta = torch.empty_strided(x.shape, x.stride(), device="meta")
        assert ops.dynamic_fake_quant(meta, group, -8, 7).stride() == out.stride()


def test_no_values():
    for shape, group in (((0, 32), 16), ((3, 0), None), ((3, 0), 16), ((0,), None)):
        x = torch.empty(shape, requires_grad=True)
        out = ops.dynamic_fake_quant(x, group, -8, 7)
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_keeps_one_bit_per_element():
    x = torch.randn(64, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.dynamic_fake_quant(x, 32, grid="float4_e2m1 scale_rule=floor").sum()
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 64 * 128 // 8)]


def test_straight_through_gradient():
    """MXFP4 saturates from 6 on; what rounds to more than 6 has no gradient."""
    x = torch.zeros(2, 32)
    x[0, :6] = torch.tensor([7.9, 6.9, 7.0, 6.0, -7.9, 1.0])
    x[1, :2] = torch.tensor([4.0, 7.1])
    x.requires_grad_()
    out = ops.dynamic_fake_quant(x, 32, grid="float4_e2m1 scale_rule=floor")
    assert out[0, :6].tolist() == [6, 6, 6, 6, -6, 1]
    out.backward(torch.ones(2, 32))
    want = torch.ones(2, 32)
    # 7 is halfway to the next number, 8, which is even.
    want[0, [0, 2, 4]] = 0
    want[1, 1] = 0
    assert torch.equal(x.grad, want)


def test_derivatives_and_transforms():
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return ops.dynamic_fake_quant(x, 8, grid="float8_e4m3").sin()

    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, -f(x).detach())
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], first.detach())
    _, tangent = torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, first.detach())
    rows = torch.func.vmap(f)(x.detach())
    assert torch.equal(rows, f(x.detach()))


def test_compiles_for_any_number_of_rows():
    def f(x: Tensor) -> Tensor:
        return ops.dynamic_fake_quant(x, None, -128, 127) * 2

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, columns in ((3, 16), (5, 16), (5, 20)):
        x = torch.randn(rows, columns, requires_grad=True)
        assert torch.equal(compiled(x), f(x))
