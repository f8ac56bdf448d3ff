"""The straight-through gradient: closed forms beside the clip edges, and what it keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from reference import Grid
from sample_data import DTYPES, sample
from straight_through import composed_fake_quant
from torch_ext import ops

MASKS = ["rounded", "paper"]
ROUNDINGS = ["half_even", "half_away", "floor_half_up"]


def qparams_tensors(scale: float, zero_point: int) -> tuple[Tensor, Tensor]:
    return torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32)


def passes(x: Tensor, s: Tensor, z: Tensor, grid: Grid, mask: str, rounding: str) -> Tensor:
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    return torch.from_numpy(
        reference.gradient_mask(wide.numpy(), s.numpy(), z.numpy(), grid, mask, rounding)
    )


def edges(scale: float, zero_point: int, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Both clip edges and the half steps around them, with floating-point neighbours."""
    levels = torch.tensor([grid.quant_min, grid.quant_max]) - zero_point
    steps = torch.tensor([-1.5, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5])
    points = ((levels[:, None] + steps) * torch.tensor(scale)).flatten().to(dtype)
    found = [points, torch.tensor([0.0, 1e30, -1e30, math.inf, -math.inf, math.nan], dtype=dtype)]
    for direction in (math.inf, -math.inf):
        near = points
        for _ in range(3):
            near = torch.nextafter(near, torch.tensor(direction, dtype=dtype))
            found.append(near)
    return torch.cat(found)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scale", "zero_point", "grid"),
    [
        (1.0, 0, Grid()),
        (0.1, 0, Grid(-127, 127)),
        (0.037, 11, Grid(0, 255)),
        (3.0, -8, Grid(-8, 7)),
    ],
    ids=str,
)
def test_gradient_beside_the_clip_edges(
    scale: float, zero_point: int, grid: Grid, dtype: torch.dtype, mask: str, rounding: str
):
    x = edges(scale, zero_point, grid, dtype).requires_grad_()
    s, z = qparams_tensors(scale, zero_point)
    out = ops.fake_quant(x, s, z, grid.quant_min, grid.quant_max, mask=mask, rounding=rounding)
    upstream = torch.arange(1, x.numel() + 1).to(dtype) / 8
    out.backward(upstream)
    want = torch.where(passes(x, s, z, grid, mask, rounding), upstream, torch.zeros_like(upstream))
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, want)


def test_masks_by_hand():
    """int8, scale 1: rounding decides for `rounded`, the value itself for `paper`."""
    x = torch.tensor([-128.6, -128.5, -128.4, -128.0, -127.9, 126.9, 127.0, 127.4, 127.5, 127.6])
    want = {"rounded": [0, 1, 1, 1, 1, 1, 1, 1, 0, 0], "paper": [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]}
    for mask, passed in want.items():
        v = x.clone().requires_grad_()
        ops.fake_quant(v, *qparams_tensors(1.0, 0), -128, 127, mask=mask).sum().backward()
        assert v.grad is not None
        assert v.grad.tolist() == passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_per_channel_and_strided(dtype: torch.dtype):
    base = (sample("gauss", 840) * 4).reshape(4, 5, 6, 7).to(dtype)
    grid = Grid(0, 255)
    for view in (base, base.transpose(0, 3), base.to(memory_format=torch.channels_last)):
        for axis in range(4):
            x = view.detach().requires_grad_()
            channels = x.shape[axis]
            s = torch.linspace(0.01, 0.05, channels)
            z = torch.arange(channels, dtype=torch.int32) * 40
            out = ops.fake_quant(x, s, z, 0, 255, axis)
            upstream = torch.randn(out.shape).to(dtype).transpose(0, 3).contiguous().transpose(0, 3)
            out.backward(upstream)
            along = [1] * 4
            along[axis] = channels
            inside = passes(x, s.reshape(along), z.reshape(along), grid, "rounded", "half_even")
            assert x.grad is not None
            assert torch.equal(x.grad, torch.where(inside, upstream, torch.zeros_like(upstream)))


def test_gradcheck_where_the_output_is_flat():
    """Clipped values: the true derivative and the straight-through one are both 0."""
    x = torch.tensor([300.0, -400.0, 1e5, -1e9], dtype=torch.float64, requires_grad=True)
    args: Any = (*qparams_tensors(1.0, 0), -128, 127)
    assert torch.autograd.gradcheck(lambda v: ops.fake_quant(v, *args), (x,))


def test_gradient_is_that_of_the_composite_written_with_detach():
    x = (sample("gauss", 4000).double() * 60).requires_grad_()
    s, z = qparams_tensors(0.7, 5)
    ops.fake_quant(x, s, z, -128, 127).cos().sum().backward()
    assert x.grad is not None
    v = x.detach().clone().requires_grad_()
    out = composed_fake_quant(v, s.item(), 5, -128, 127)
    assert ((out == -133 * s.double()) | (out == 122 * s.double())).any()
    out.cos().sum().backward()
    assert v.grad is not None
    assert torch.allclose(x.grad, v.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1000, 99_999])
def test_one_bit_per_element_is_kept_for_backward(count: int):
    x = (sample("gauss", max(count, 1))[:count] * 60).requires_grad_()
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = ops.fake_quant(x, *qparams_tensors(0.5, 0), -128, 127)
    assert sum(kept) <= (count + 7) // 8
    out.sum().backward()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 1000, 40_001])
@pytest.mark.parametrize("mask", MASKS)
def test_packed_mask_is_in_logical_order(mask: str, count: int):
    x = (sample("heavy", max(count, 1))[:count] * 60).reshape(count, 1)
    s, z = qparams_tensors(0.5, 0)
    forward = torch.ops.torch_ext._fake_quant_forward
    out, packed = forward(x, s, z, "[-128,127]", -1, mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((count + 7) // 8,)
    inside = passes(x, s, z, Grid(), mask, "half_even").flatten().numpy()
    assert (reference.bits_of_mask(packed.numpy(), count) == inside).all()
    upstream = torch.randn(count, 1)
    have = torch.ops.torch_ext._fake_quant_backward(upstream, packed)
    want = torch.where(torch.from_numpy(inside)[:, None], upstream, torch.zeros(1))
    assert torch.equal(have, want)
    assert torch.equal(out, ops.fake_quant(x, s, z, -128, 127))


def test_without_gradient_nothing_is_recorded():
    x = torch.ones(8)
    args: Any = (*qparams_tensors(0.1, 0), -128, 127)
    assert ops.fake_quant(x, *args).grad_fn is None
    x.requires_grad_()
    with torch.no_grad():
        assert ops.fake_quant(x, *args).grad_fn is None
    with torch.inference_mode():
        assert not ops.fake_quant(x, *args).requires_grad
    assert ops.fake_quant(x, *args).requires_grad


@pytest.mark.parametrize("of_x", [False, True])
def test_a_scale_that_requires_a_gradient_is_refused_as_by_torchs_op(of_x: bool):
    x = torch.ones(8, requires_grad=of_x)
    scale, zero_point = qparams_tensors(0.1, 0)
    scale.requires_grad_()
    for function, text in (
        (ops.fake_quant, "fake_quant: expected scale to be a constant, got one that requires"),
        (torch.fake_quantize_per_tensor_affine, "cannot have requires_grad True"),
    ):
        with pytest.raises(RuntimeError, match=text):
            function(x, scale, zero_point, -128, 127)
        with torch.no_grad():
            function(x, scale, zero_point, -128, 127)
