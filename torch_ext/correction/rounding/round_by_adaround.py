"""Learns for each value of a weight whether it is rounded down or up.

AdaRound: Nagel et al. 2020, arXiv 2004.10568: a rectified sigmoid per value, a regulariser that
drives it to 0 or 1 and grows sharper, and Adam. The error of the layer's output is a quadratic form
of the weight, so its gradient is exact and needs no batches: nothing here is random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_ext.correction.rounding.row_problem import RowProblem, damped
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.grid import is_float

# The ends that the sigmoid is stretched to before it is clipped to [0, 1].
_LOW, _HIGH = -0.1, 1.1
_WARM = 0.2  # the share of the iterations without the regulariser
_SHARPEST, _BLUNTEST = 2.0, 20.0  # the regulariser's exponent goes from the second to the first
_WEIGHT = 5.0  # of the regulariser; the error of rounding to nearest counts 1 per value
_RATE = 0.05  # Adam's
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def uneven(quantizer: FakeQuantize) -> str:
    """Why a quantizer's grid cannot be learned to round to; empty if it can."""
    dtype = quantizer.observer.dtype
    return f"adaround rounds to integers, and its dtype is {dtype}" if is_float(dtype) else ""


def round_by_adaround(problem: RowProblem, ends: tuple[int, int], iterations: int) -> Tensor:
    """The values of the grid, in the shape of the weight; no row costs more than the nearest ones.

    Args:
        problem: what is rounded, and what errors cost.
        ends: quant_min and quant_max of the grid, which is of integers.
        iterations: steps of Adam, after which each value is up or down.
    """
    dtype = problem.weight.dtype
    scale, zero_point = problem.scale.to(dtype), problem.zero_point.to(dtype)
    low, high = (end - zero_point for end in ends)
    target = problem.target.to(dtype) / scale
    below = torch.minimum(torch.maximum(target.floor(), low), high)
    share = (target - below).clamp(0.01, 0.99)
    learned = -torch.log((_HIGH - _LOW) / (share - _LOW) - 1)

    cost = problem.cost(problem.nearest)
    inputs = problem.weight.shape[-1]
    # Rows with no error to lessen are left; the others weigh the same.
    weigh = torch.where(cost > 0, inputs / cost, torch.zeros_like(cost)).to(dtype).unsqueeze(-1)
    hessian = damped(problem.hessian, problem.damping).to(dtype)
    first, second = torch.zeros_like(learned), torch.zeros_like(learned)
    for step in range(1, iterations + 1):
        sigmoid = torch.sigmoid(learned)
        up = (sigmoid * (_HIGH - _LOW) + _LOW).clamp_(0, 1)
        error = torch.minimum(below + up, high).sub_(target).mul_(scale)
        gradient = (error @ hessian).mul_(scale).mul_(2 * weigh)
        gradient += _regulariser_gradient(up, step / iterations)
        # Of `up`; where it is clipped it does not move.
        moves = (up > 0) & (up < 1)
        gradient *= moves * sigmoid * (1 - sigmoid) * (_HIGH - _LOW)
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square_(), 1 - _BETAS[1])
        size = _RATE / (1 - _BETAS[0] ** step)
        unbiased = second / (1 - _BETAS[1] ** step)
        learned -= size * first / (unbiased.sqrt_() + _EPSILON)
    up = (torch.sigmoid(learned) * (_HIGH - _LOW) + _LOW >= 0.5).to(dtype)
    values = torch.minimum(below + up, high) * scale
    return problem.better(values, problem.nearest)


def _regulariser_gradient(up: Tensor, progress: float) -> Tensor:
    """Of ``1 - |2 up - 1|^b``, which is least where ``up`` is 0 or 1."""
    if progress < _WARM:
        return torch.zeros_like(up)
    along = (progress - _WARM) / (1 - _WARM)
    exponent = _SHARPEST + 0.5 * (_BLUNTEST - _SHARPEST) * (1 + math.cos(math.pi * along))
    side = 2 * up - 1
    return side.abs().pow_(exponent - 1).mul_(side.sign()).mul_(-2 * exponent * _WEIGHT)
