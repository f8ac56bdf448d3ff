"""Fake-quant values: exhaustive over half inputs, and at every tie and edge of the wider types."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from fake_quant_values import SPECIAL, around, assert_same_bits
from reference import Grid
from sample_data import DTYPES, sample
from sample_grids import GRIDS
from torch_ext import ops

ROUNDINGS = ["half_even", "half_away", "floor_half_up"]
GRID16 = Grid(-32768, 32767)


def qparams_tensors(scale: float, zero_point: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def expected(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, rounding: str = "half_even"
) -> Tensor:
    """The reference's output in x's type: halves compute in float32, round once and saturate."""
    wide = x if x.dtype == torch.float64 else x.float()
    out = torch.from_numpy(
        reference.fake_quant(wide.numpy(), scale.numpy(), zero_point.numpy(), grid, rounding)
    )
    if x.dtype in (torch.float16, torch.bfloat16):
        largest = torch.finfo(x.dtype).max
        out = torch.where(out.isnan(), out, out.to(x.dtype).clamp(-largest, largest).float())
    return out.to(x.dtype)


SCALES = [0.1, 1 / 3, 1.0, 2.0**-14, 2.0**-24, 7.3, 300.0, 1e-30, 2.0**-126, 1.3e36]
EXHAUSTIVE = [
    *((s, 0, Grid()) for s in SCALES),
    *((s, -5, Grid()) for s in (0.1, 0.0375)),
    (0.05, 128, Grid(0, 255)),
    (0.3, 15, Grid(0, 15)),
    (0.3, -8, Grid(-8, 7)),
    (2.0, 0, GRID16),
    (0.011, 1000, GRID16),
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "zero_point", "grid"), EXHAUSTIVE, ids=str)
def test_every_half_value(
    scale: float, zero_point: int, grid: Grid, dtype: torch.dtype, rounding: str
):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    s, z = qparams_tensors(scale, zero_point)
    have = ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max, rounding=rounding)
    assert_same_bits(have, expected(x, s, z, grid, rounding))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("scale", "zero_point", "grid"), EXHAUSTIVE, ids=str)
def test_every_tie_of_the_wide_types(
    scale: float, zero_point: int, grid: Grid, dtype: torch.dtype, rounding: str
):
    levels = torch.arange(grid.quant_min - zero_point - 3, grid.quant_max - zero_point + 4)
    s, z = qparams_tensors(scale, zero_point)
    x = torch.cat([around(levels, float(s), dtype), torch.tensor(SPECIAL, dtype=dtype)])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)])
    have = ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max, rounding=rounding)
    assert_same_bits(have, expected(x, s, z, grid, rounding))


def test_roundings_differ_at_ties_only():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -0.49, 0.49, 0.51])
    s, z = qparams_tensors(1.0, 0)
    out = {r: ops.fake_quant(x, s, z, -128, 127, rounding=r).tolist() for r in ROUNDINGS}
    assert out["half_even"] == [-2, -2, 0, 0, 2, 2, 0, 0, 1]
    assert out["half_away"] == [-3, -2, -1, 1, 2, 3, 0, 0, 1]
    assert out["floor_half_up"] == [-2, -1, 0, 1, 2, 3, 0, 0, 1]


@given(
    x=st.lists(st.floats(width=32), max_size=40),
    scale=st.floats(2.0**-126, 2.0**119, width=32),
    name=st.sampled_from(sorted(GRIDS)),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=150)
def test_any_values_scale_and_zero_point(x, scale, name, dtype, data):
    grid = GRIDS[name]
    zero_point = data.draw(st.integers(grid.quant_min, grid.quant_max))
    values = torch.tensor(x, dtype=torch.float64).to(dtype)
    s, z = qparams_tensors(scale, zero_point)
    have = ops.fake_quant(values, s, z, grid.quant_min, grid.quant_max)
    assert_same_bits(have, expected(values, s, z, grid))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_and_infinity_saturates(dtype: torch.dtype):
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38], dtype=dtype)
    s, z = qparams_tensors(0.5, 3)
    out = ops.fake_quant(x, s, z, -128, 127)
    assert out[0].isnan()
    assert out[1:].tolist() == [62.0, -65.5, 62.0, -65.5]


def test_half_saturates_at_its_largest_finite_value():
    x = torch.tensor([math.inf, -math.inf, 65504.0, -65504.0], dtype=torch.float16)
    s, z = qparams_tensors(1000.0, 0)
    out = ops.fake_quant(x, s, z, -128, 127)
    assert out.tolist() == [65504.0, -65504.0, 65504.0, -65504.0]


def layouts(x: Tensor) -> dict[str, Tensor]:
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 3),
        "stepped": x[:, ::2, :, 1::3],
        "expanded": x[:, :1].expand(-1, 4, -1, -1),
        "offset": x[1:, 1:, 1:, 1:],
        "empty": x[:0],
        "no_channels": x[:, :0],
        "one": x[:1, :1, :1, :1],
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(2, 4, 5, 7))))
def test_layout_and_axis_change_nothing(layout: str, dtype: torch.dtype):
    x = layouts((sample("heavy", 280) * 3).reshape(2, 4, 5, 7).to(dtype))[layout]
    grid = Grid(0, 255)
    s, z = qparams_tensors(0.1, 100)
    have = ops.fake_quant(x, s, z, 0, 255)
    assert_same_bits(have, expected(x, s, z, grid))
    for axis in range(4):
        channels = x.shape[axis]
        scale = 0.05 + torch.arange(channels) / 7
        zero_point = torch.arange(channels, dtype=torch.int32) * 30
        along = [1] * 4
        along[axis] = channels
        have = ops.fake_quant(x, scale, zero_point, 0, 255, axis)
        want = expected(x, scale.reshape(along), zero_point.reshape(along), grid)
        assert_same_bits(have, want)


@pytest.mark.parametrize("count", [*range(70), 1023, 4097, 100_003])
def test_every_tail_length(count: int):
    x = sample("gauss", max(count, 1))[:count] * 50
    s, z = qparams_tensors(0.37, -7)
    assert_same_bits(ops.fake_quant(x, s, z, -128, 127), expected(x, s, z, Grid()))


def test_scalar_tensor():
    s, z = qparams_tensors(0.5, 0)
    out = ops.fake_quant(torch.tensor(1.3), s, z, -128, 127)
    assert out.shape == ()
    assert out.item() == 1.5


@pytest.mark.parametrize("threads", [1, 2, 5, 8])
def test_thread_count_changes_nothing(threads: int):
    x = sample("gauss", 500_000).reshape(5, 100, 1000) * 10
    s, z = torch.linspace(0.01, 1, 100), torch.zeros(100, dtype=torch.int32)
    torch.set_num_threads(threads)
    have = ops.fake_quant(x, s, z, -8, 7, 1)
    assert_same_bits(have, expected(x, s[:, None], z[:, None], Grid(-8, 7)))


def test_input_is_left_alone_and_output_is_new():
    x = sample("gauss", 1000)
    before = x.clone()
    out = ops.fake_quant(x, *qparams_tensors(0.1, 0), -128, 127)
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


def test_quantizing_twice_changes_nothing():
    for grid, zero_point in itertools.product([Grid(), Grid(0, 255)], [0, 17]):
        args = (*qparams_tensors(0.0173, zero_point), grid.quant_min, grid.quant_max)
        once = ops.fake_quant(sample("gauss", 5000), *args)
        assert torch.equal(ops.fake_quant(once, *args), once)


@pytest.mark.parametrize("scale", [0.1, 0.037, 1 / 3, 1.7])
@pytest.mark.parametrize("grid", [Grid(), GRID16], ids=str)
def test_torchs_own_op_differs_only_next_to_ties_and_by_one_step(scale: float, grid: Grid):
    """torch multiplies by 1 / scale: x / scale within a rounding of k + 1/2 may go astray."""
    levels = torch.arange(grid.quant_min, grid.quant_max)
    x = torch.cat([around(levels, scale, torch.float32), sample("gauss", 100_000) * 100 * scale])
    s, z = qparams_tensors(scale, 0)
    ours = ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max)
    peer = torch.fake_quantize_per_tensor_affine(x, scale, 0, grid.quant_min, grid.quant_max)
    differs = ours != peer
    exact = x[differs].double() / s.double()
    tie = (exact - exact.floor() - 0.5).abs()
    assert (tie <= exact.abs() * 2.0**-22).all()
    steps = np.rint((ours - peer)[differs].abs().double().numpy() / float(s))
    assert (steps == 1).all()
    if scale in (0.1, 0.037):
        assert differs.any()  # else this test compares nothing
