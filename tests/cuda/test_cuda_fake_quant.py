"""Fake-quantized values, masks and gradients on the device are the CPU's, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from devices import assert_same_bits
from input_zoo import AROUND, FLOAT_MAX, LEAST_NORMAL, ZOO, misaligned
from sample_data import DTYPES, VIEWS, sample, strided_views
from torch_ext import ops

MASKS = ["rounded", "paper"]
ROUNDINGS = ["half_even", "half_away", "floor_half_up"]
# quant_min, quant_max and zero points on the grid.
GRIDS = [(-128, 127, (0, -128, 127, 5)), (0, 255, (0, 128, 255)), (-8, 7, (0, 3)), (0, 15, (9,))]
WIDE = [(-32768, 32767, (0, -32768)), (0, 65535, (0, 65535)), (1, 9, (4,))]
SCALES = [1.0, 0.1, 0.037, 3.0, LEAST_NORMAL, 1e-45, 1e30, FLOAT_MAX]

forward = torch.ops.torch_ext._fake_quant_forward
backward = torch.ops.torch_ext._fake_quant_backward


def parameters(scales: list[float], zero_points: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(scales), torch.tensor(zero_points, dtype=torch.int32)


def assert_parity(
    device: torch.device,
    x: Tensor,
    on_device: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    ch_axis: int = -1,
    mask: Any = "rounded",
    rounding: Any = "half_even",
) -> None:
    """Values without a gradient, values and mask with one, and the gradient that the mask gives."""
    where = (low, high, ch_axis, mask, rounding)
    moved = (scale.to(device), zero_point.to(device))
    rest = (f"[{low},{high}] rounding={rounding}", ch_axis, mask)
    want, want_mask = forward(x, scale, zero_point, *rest)
    have, have_mask = forward(on_device, *moved, *rest)
    assert have.is_contiguous()
    assert_same_bits(have, want, *where)
    assert_same_bits(have_mask, want_mask, *where, "mask")
    assert_same_bits(ops.fake_quant(on_device, *moved, *where), want, *where, "without a mask")
    grad = torch.arange(1, x.numel() + 1).reshape(x.shape).to(x.dtype)
    want_dx = backward(grad, want_mask)
    assert_same_bits(backward(grad.to(device), have_mask), want_dx, *where, "gradient")


def beside_ties(scale: float, dtype: torch.dtype) -> Tensor:
    """Multiples of half a step around the grid, with their neighbours, and the special values."""
    points = (torch.arange(-300, 301, dtype=torch.float64) / 2 * scale).to(dtype)
    up = torch.nextafter(points, torch.tensor(torch.inf, dtype=dtype))
    down = torch.nextafter(points, torch.tensor(-torch.inf, dtype=dtype))
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 3e38, -3e38, 1e300]
    return torch.cat([points, up, down, torch.tensor(special, dtype=torch.float64).to(dtype)])


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_distribution_once(dtype: torch.dtype, device: torch.device):
    s, z = parameters([0.05], [3])
    for kind, n in itertools.product(ZOO, (1, 2051)):
        x = ZOO[kind](n).to(dtype)
        assert_parity(device, x, x.to(device), s, z, -128, 127)
    rows = ZOO["mixed"](3 * 37 * 5).reshape(3, 37, 5).to(dtype)
    for axis in range(3):
        channels = rows.shape[axis]
        s, z = parameters([0.01 * (i + 1) for i in range(channels)], list(range(channels)))
        assert_parity(device, rows, rows.to(device), s, z, -128, 127, axis)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_on_every_grid(dtype: torch.dtype, mask: str, rounding: str, device: torch.device):
    for scale in SCALES:
        x = beside_ties(scale, dtype)
        for low, high, zero_points in GRIDS + WIDE:
            for zero_point in zero_points:
                s, z = parameters([scale], [zero_point])
                assert_parity(device, x, x.to(device), s, z, low, high, -1, mask, rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_number(dtype: torch.dtype, device: torch.device):
    """All 2^16 patterns by 60 scales."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    scales = torch.exp2(torch.linspace(-30, 16, 60)).tolist()
    for i, (scale, (low, high, zero_points)) in enumerate(
        zip(scales, itertools.cycle(GRIDS), strict=False)
    ):
        s, z = parameters([scale], [zero_points[i % len(zero_points)]])
        rounding, mask = ROUNDINGS[i % 3], MASKS[i % 2]
        assert_parity(device, x, x.to(device), s, z, low, high, -1, mask, rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_bit_patterns(dtype: torch.dtype, device: torch.device):
    """Every exponent, NaN payloads and subnormals included."""
    size = torch.empty(0, dtype=dtype).element_size()
    x = torch.randint(0, 256, (300_000 * size,), dtype=torch.uint8).view(dtype)
    for scale, rounding in itertools.product([0.02, 1e-30, 1e20], ROUNDINGS):
        s, z = parameters([scale], [-7])
        assert_parity(device, x, x.to(device), s, z, -128, 127, -1, "rounded", rounding)


@pytest.mark.parametrize("kind", ZOO)
def test_distributions(kind: str, device: torch.device):
    for dtype, scale in itertools.product(DTYPES, (0.02, 1e-42, 1e28)):
        x = ZOO[kind](70_001).to(dtype)
        s, z = parameters([scale], [11])
        assert_parity(device, x, x.to(device), s, z, 0, 255)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_around_block_boundaries_at_any_alignment(dtype: torch.dtype, device: torch.device):
    s, z = parameters([0.04], [1])
    for n in AROUND:
        x = ZOO["mixed"](n).to(dtype)
        for _, view in misaligned(x.to(device)):
            assert_parity(device, x, view, s, z, -128, 127)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str, dtype: torch.dtype, device: torch.device):
    base = ZOO["mixed"](1920).reshape(4, 6, 8, 10).to(dtype)
    x, on_device = strided_views(base)[view], strided_views(base.to(device))[view]
    for axis in range(-1, x.dim()):
        channels = 1 if axis < 0 else x.shape[axis]
        s = torch.linspace(0.01, 0.05, channels)
        z = torch.arange(channels, dtype=torch.int32) * 3
        assert_parity(device, x, on_device, s, z, -128, 127, axis)


INNER = [(1, 5, 1), (3, 7, 1), (2, 3, 8), (5, 4, 9), (1, 300, 1001), (3, 2, 40_003), (70_001, 2, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*INNER, (1, 70_001, 3), (2, 1, 77)], ids=str)
def test_channels(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
    x = ZOO["mixed"](torch.Size(shape).numel()).reshape(shape).to(dtype)
    s = torch.linspace(0.001, 0.3, shape[1])
    z = torch.arange(shape[1], dtype=torch.int32) % 255 - 127
    for rounding, mask in zip(ROUNDINGS, ["rounded", "paper", "rounded"], strict=True):
        assert_parity(device, x, x.to(device), s, z, -128, 127, 1, mask, rounding)


def test_scalars_and_empty_tensors(device: torch.device):
    s, z = parameters([0.1], [0])
    for dtype, shape in itertools.product(DTYPES, [(), (0,), (2, 0, 3)]):
        x = torch.ones(shape, dtype=dtype)
        assert_parity(device, x, x.to(device), s, z, -128, 127)
    empty = torch.empty(0, 4, device=device)
    assert ops.fake_quant(empty, s[:0].to(device), z[:0].to(device), -128, 127, 0).shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", [-1, 0, 1, 3])
def test_gradients_through_autograd(axis: int, dtype: torch.dtype, device: torch.device):
    base = (sample("gauss", 840) * 4).reshape(4, 5, 6, 7).to(dtype)
    upstream = torch.randn(4, 5, 6, 7).to(dtype)
    channels = 1 if axis < 0 else base.shape[axis]
    s = torch.linspace(0.01, 0.05, channels)
    z = torch.arange(channels, dtype=torch.int32) * 40

    def gradient(where: torch.device | str, strided: bool) -> Tensor:
        x = base.to(where)
        x = x.to(memory_format=torch.channels_last) if strided else x
        x = x.detach().requires_grad_()
        out = ops.fake_quant(x, s.to(where), z.to(where), 0, 255, axis)
        given = upstream.to(where)
        out.backward(given.transpose(0, 3).contiguous().transpose(0, 3) if strided else given)
        assert x.grad is not None
        return x.grad

    want = gradient("cpu", False)
    assert 0 < int((want == 0).sum()) < want.numel()
    for strided in (False, True):
        assert_same_bits(gradient(device, strided), want, strided)


def test_expanded_gradient(device: torch.device):
    """What `sum().backward()` hands over has strides of 0."""
    for dtype in DTYPES:
        x = (sample("gauss", 999) * 60).to(dtype)
        s, z = parameters([0.5], [0])
        grads = []
        for where in ("cpu", device):
            v = x.to(where).detach().requires_grad_()
            ops.fake_quant(v, s.to(where), z.to(where), -128, 127).sum().backward()
            grads.append(v.grad)
        assert_same_bits(grads[1], grads[0], dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000, 99_999])
def test_one_bit_per_element_is_kept_for_backward(count: int, device: torch.device):
    x = (sample("gauss", max(count, 1))[:count] * 60).to(device).requires_grad_()
    s, z = (p.to(device) for p in parameters([0.5], [0]))
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = ops.fake_quant(x, s, z, -128, 127)
    assert sum(kept) <= (count + 7) // 8
    assert out.requires_grad


def test_the_comparison_sees_another_scale(device: torch.device):
    x = sample("gauss", 100)
    s, z = parameters([0.1], [0])
    want = ops.fake_quant(x, s, z, -128, 127)
    have = ops.fake_quant(x.to(device), (s * 1.0000001).to(device), z.to(device), -128, 127)
    with pytest.raises(AssertionError, match="differ"):
        assert_same_bits(have, want)
