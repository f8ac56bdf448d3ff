"""Fake-quants composed of torch's own ops: straight through the rounding, of any order."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def straight_through_round(v: Tensor) -> Tensor:
    return (v.round() - v).detach() + v


def composed_fake_quant(x: Tensor, scale: float, zero_point: int, low: int, high: int) -> Tensor:
    """The gradient passes where the code is on the grid before clamping, ends included."""
    code = straight_through_round(x / scale) + zero_point
    # Not clamp(): from torch 2.14 on its gradient is 0 at the bounds too, where this one passes.
    clipped = code.detach().clamp(low, high)
    return (torch.where(code == clipped, code, clipped) - zero_point) * scale


def composed_lsq(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, factor: float = 1.0
) -> Tensor:
    """The paper's function. ``factor``: what the gradient of the scale is multiplied by."""
    scale = (scale - scale * factor).detach() + scale * factor
    size = scale.abs()
    v = x / size
    zero_point = straight_through_round(zero_point)
    code = v + zero_point
    clipped = torch.where(code <= low, low - zero_point, high - zero_point)
    return torch.where((code > low) & (code < high), straight_through_round(v), clipped) * size


def composed_pact(x: Tensor, alpha: Tensor, low: int, high: int) -> Tensor:
    """x clipped to [0, alpha], on a signed grid to [-alpha, alpha], and quantized."""
    level = alpha.abs()
    bottom = -level if low < 0 else torch.zeros_like(level)
    inside = (x < level) & (x > bottom if low < 0 else x >= bottom)
    clipped = torch.where(inside, x, torch.where(x >= level, level, bottom))
    scale = (2 * level / (high - low) if low < 0 else level / high).detach().float().double()
    quantized = (clipped / scale).round().clamp(low, high) * scale
    return (quantized - clipped).detach() + clipped


def gradient_factor(elements: int, high: int) -> float:
    return 1 / math.sqrt(elements * high)
