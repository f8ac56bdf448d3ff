"""Range to scale and zero point: exact rationals as the reference."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import Grid, qparams
from sample_grids import GRIDS, grid_arguments
from torch_ext import ops

FLOAT_MAX = float(np.finfo(np.float32).max)
MORE = {
    "int16": Grid(-32768, 32767),
    "uint16_affine": Grid(0, 65535, symmetric=False),
    "int2": Grid(-2, 1),
    "tvm_int8": Grid(scale_rule="tvm"),
    "tvm_narrow": Grid(-127, 127, scale_rule="tvm"),
    "tvm_int4": Grid(-8, 7, scale_rule="tvm"),
    "pot": Grid(power_of_two=True),
    "pot_unsigned": Grid(0, 255, power_of_two=True),
    "pot_affine": Grid(0, 255, symmetric=False, power_of_two=True),
    "tvm_pot": Grid(scale_rule="tvm", power_of_two=True),
    "odd_affine": Grid(-5, 9, symmetric=False),
}
ALL = GRIDS | MORE


def call(ranges: Any, grid: Grid) -> tuple[list[float], list[int]]:
    scale, zero_point = ops.qparams(torch.tensor(ranges).reshape(-1, 2), **grid_arguments(grid))
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert scale.shape == zero_point.shape
    return scale.tolist(), zero_point.tolist()


def assert_qparams(low: float, high: float, grid: Grid) -> None:
    want = qparams(low, high, grid)
    (scale,), (zero_point,) = call([low, high], grid)
    assert scale == want.scale
    if 0 < want.tie_distance < Fraction(1, 10**9):
        assert abs(zero_point - want.zero_point) <= 1
    else:
        assert zero_point == want.zero_point


values = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0, 127.0, 255.0, 1e-45, 1e-38, 1e30, -1e30]),
    st.floats(-100, 100, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda v: v / 4),
).map(lambda v: float(np.float32(v)))


@settings(max_examples=150)
@given(a=values, b=values)
@pytest.mark.parametrize("name", sorted(ALL))
def test_against_exact_arithmetic(name: str, a: float, b: float):
    assert_qparams(min(a, b), max(a, b), ALL[name])


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_batch_of_ranges_is_each_range_by_itself(name: str, rng: np.random.Generator):
    ends = np.sort(rng.standard_cauchy((500, 2)).astype(np.float32), axis=1)
    scales, zero_points = call(ends.tolist(), ALL[name])
    for (low, high), scale, zero_point in zip(ends.tolist(), scales, zero_points, strict=True):
        assert call([low, high], ALL[name]) == ([scale], [zero_point])
        assert_qparams(low, high, ALL[name])


@pytest.mark.parametrize(
    ("ends", "grid", "scale", "zero_point"),
    [
        ((-1.0, 1.27), GRIDS["int8_narrow"], 1.27 / 127, 0),
        ((-2.55, 1.0), GRIDS["int8"], 2.55 / 127.5, 0),
        ((-9.0, 5.1), GRIDS["uint8"], 5.1 / 255, 0),
        ((2.0, 5.1), GRIDS["uint8_affine"], 5.1 / 255, 0),
        ((-5.1, -2.0), GRIDS["uint8_affine"], 5.1 / 255, 255),
        ((-1.0, 1.0), GRIDS["int8_affine"], 2 / 255, 0),  # exact tie: -0.5 to even
        ((-1.0, 1.0), GRIDS["uint8_affine"], 2 / 255, 128),  # exact tie: 127.5 to even
        ((-1.0, 3.0), GRIDS["uint4_affine"], 4 / 15, 4),  # 3.75
        ((-64.0, 3.0), MORE["tvm_int8"], 0.5, 0),
        ((0.0, 8.0), MORE["tvm_int4"], 1.0, 0),
        ((-127.5, 0.0), MORE["pot"], 1.0, 0),
        ((-127.6, 0.0), MORE["pot"], 2.0, 0),
    ],
)
def test_worked_examples(ends: tuple[float, float], grid: Grid, scale: float, zero_point: int):
    assert call(list(ends), grid) == ([float(np.float32(scale))], [zero_point])


@pytest.mark.parametrize("name", sorted(ALL))
def test_dead_ranges_have_scale_one(name: str):
    grid = ALL[name]
    assert call([0.0, 0.0], grid) == ([1.0], [0])
    assert call([-0.0, 0.0], grid) == ([1.0], [0])
    if grid.symmetric and grid.unsigned:
        assert call([[-3.0, 0.0], [-3.0, -1.0]], grid) == ([1.0, 1.0], [0, 0])


EXTREMES = [
    (-FLOAT_MAX, FLOAT_MAX),
    (0.0, FLOAT_MAX),
    (-FLOAT_MAX, 0.0),
    (-FLOAT_MAX, 1.0),
    (-FLOAT_MAX / 3, FLOAT_MAX),
    (0.0, 1e-45),
    (-1e-45, 1e-45),
    (-1e-45, 0.0),
    (-1e-40, 1e-38),
    (-1e-45, FLOAT_MAX),
    (1e-38, 1e-38),
]


@pytest.mark.parametrize("ends", EXTREMES, ids=str)
@pytest.mark.parametrize("name", sorted(ALL))
def test_extreme_ranges_keep_every_level_finite_and_the_scale_normal(
    name: str, ends: tuple[float, float]
):
    grid = ALL[name]
    (scale,), (zero_point,) = call(list(ends), grid)
    assert scale >= 2.0**-126
    assert math.isfinite(1 / scale)
    assert grid.quant_min <= zero_point <= grid.quant_max
    levels = np.array([grid.quant_min - zero_point, grid.quant_max - zero_point], np.float32)
    assert np.isfinite(levels * np.float32(scale)).all()
    if grid.power_of_two:
        assert math.frexp(scale)[0] == 0.5
    assert_qparams(*ends, grid)


@pytest.mark.parametrize("name", sorted(ALL))
def test_finite_input_never_becomes_infinite(name: str):
    grid = ALL[name]
    x = torch.tensor([FLOAT_MAX, -FLOAT_MAX, 1.0, 0.0])
    for low, high in EXTREMES:
        scale, zero_point = ops.qparams(torch.tensor([[low, high]]), **grid_arguments(grid))
        out = ops.fake_quant(x, scale, zero_point, grid.quant_min, grid.quant_max)
        assert out.isfinite().all()
        assert out[3] == 0


@settings(max_examples=60)
@given(a=values, b=values)
@pytest.mark.parametrize("name", ["int8", "uint8", "int8_affine", "pot", "tvm_int8"])
def test_scale_follows_the_data_by_powers_of_two(name: str, a: float, b: float):
    low, high = sorted((a, b))
    if not all(v == 0 or 1e-20 < abs(v) < 1e20 for v in (low, high)):
        return
    (scale,), (zero_point,) = call([low, high], ALL[name])
    (scaled,), (same,) = call([low * 8, high * 8], ALL[name])
    assert same == zero_point
    dead = scale == 1 and max(high, 0.0 if ALL[name].unsigned else -low) == 0
    assert scaled == (1 if dead else scale * 8)


@settings(max_examples=100)
@given(a=values, b=values)
@pytest.mark.parametrize("name", ["int8_affine", "uint8_affine", "uint4_affine", "uint16_affine"])
def test_affine_grid_covers_the_range_within_half_a_step(name: str, a: float, b: float):
    grid, low, high = ALL[name], min(a, b, 0.0), max(a, b, 0.0)
    if high - low < 1e-30:
        return
    (scale,), (zero_point,) = call([low, high], grid)
    slack = 0.5 * scale * (1 + 1e-5) + grid.steps * scale * 1e-6
    assert (grid.quant_min - zero_point) * scale <= low + slack
    assert (grid.quant_max - zero_point) * scale >= high - slack


def test_result_is_new_and_leaves_the_range_alone():
    ends = torch.tensor([[-1.0, 2.0], [0.0, 0.0]])
    before = ends.clone()
    scale, zero_point = ops.qparams(ends, -128, 127, False)
    assert torch.equal(ends, before)
    assert scale.data_ptr() != ends.data_ptr()
    assert zero_point.tolist() == [-43, 0]


@pytest.mark.parametrize("bad", [[1.0, -1.0], [torch.nan, 1.0], [0.0, torch.nan]], ids=str)
def test_impossible_ranges_never_give_a_plausible_scale(bad: list[float]):
    with pytest.raises(RuntimeError, match=r"qparams: expected range to be .+, got "):
        call(bad, GRIDS["int8"])
