"""Every rule: a view of the statistic and a grid in, a range out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from reference.grid import Grid
from reference.search import (
    candidates,
    kl_objective,
    least_threshold,
    mse_objective,
    squared_error,
    threshold_range,
)
from reference.view import View

Bounds = tuple[float, float]


def min_max(view: View, grid: Grid) -> Bounds:
    return view.low, view.high


def fixed_scale(view: View, grid: Grid, scale: float = 1.0, zero_point: float = 0) -> Bounds:
    return (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale


def clip(view: View, grid: Grid, xmin: float = -1.0, xmax: float = 1.0) -> Bounds:
    return min(max(view.low, xmin), xmax), min(max(view.high, xmin), xmax)


def percentile(view: View, grid: Grid, percentile: float = 99.99) -> Bounds:
    """Nearest rank in integers: p counts steps of 1e-7 percent."""
    p, whole, total = round(percentile * 10**7), 10**9, view.total
    if grid.symmetric:
        return threshold_range(view, view.magnitude_rank(-(-p * total // whole)))
    high_rank = -(-(whole + p) * total // (2 * whole))
    low_rank = min(total + 1 - high_rank, high_rank)
    low, high = view.signed_rank(low_rank), view.signed_rank(high_rank)
    if low == high == 0:
        return view.low, view.high
    return low, high


def clip_std(view: View, grid: Grid, std_scale: float = 3.0) -> Bounds:
    if view.total == 1:
        return view.low, view.high
    reach = std_scale * view.deviation(view.mean, view.total - 1)
    mean = _inside(view, view.mean)
    return _inside(view, mean - reach), _inside(view, mean + reach)


def kl(view: View, grid: Grid) -> Bounds:
    thresholds = candidates(view)
    objective = kl_objective(view, thresholds, grid)
    return threshold_range(view, least_threshold(view, thresholds, objective))


def mse(view: View, grid: Grid) -> Bounds:
    thresholds = candidates(view)
    objective = mse_objective(view, thresholds, grid)
    return threshold_range(view, least_threshold(view, thresholds, objective))


def mix_ranges(view: View, grid: Grid) -> list[Bounds]:
    ranges = [percentile(view, grid, p) for p in (99.9, 99.99, 99.999, 99.9999)]
    return [*ranges, kl(view, grid), min_max(view, grid)]


def mix(view: View, grid: Grid) -> Bounds:
    return _least_error(view, grid, mix_ranges(view, grid))


def gauss_noise(clip: float, bits: int) -> float:
    """Banner et al. 2019: mean squared error of N(0, 1) clipped at `clip`, uniform noise inside."""
    outside = (clip**2 + 1) * math.erfc(clip / math.sqrt(2))
    edge = math.sqrt(2 / math.pi) * clip * math.exp(-(clip**2) / 2)
    return outside - edge + clip**2 / (3 * 4.0**bits)


def laplace_noise(clip: float, bits: int) -> float:
    """The same for a Laplace distribution of mean distance 1."""
    return 2 * math.exp(-clip) + clip**2 / (3 * 4.0**bits)


def alpha(noise: Callable[[float, int], float], bits: int) -> float:
    """The clip of least noise, which falls, then rises: a third of the bracket goes each time."""
    low, high = 0.5, 20.0
    while high - low > 1e-9:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if noise(left, bits) < noise(right, bits):
            high = right
        else:
            low = left
    return (low + high) / 2


def aciq_ranges(view: View, grid: Grid) -> list[Bounds]:
    if not view.values.any():  # zeros and tiny values alone: no spread to measure
        return [(view.low, view.high)]
    if view.one_sided:
        bits = grid.bits + (grid.unsigned or not grid.symmetric)
        gauss = alpha(gauss_noise, bits) * view.deviation(0.0, view.total)
        laplace = alpha(laplace_noise, bits) * view.mean_distance(0.0)
        return [threshold_range(view, gauss), threshold_range(view, laplace)]
    mean, bits = view.mean, grid.bits
    gauss = alpha(gauss_noise, bits) * view.deviation(mean, view.total - 1)
    laplace = alpha(laplace_noise, bits) * view.mean_distance(mean)
    return [(_inside(view, mean - a), _inside(view, mean + a)) for a in (gauss, laplace)]


def aciq(view: View, grid: Grid) -> Bounds:
    return _least_error(view, grid, aciq_ranges(view, grid))


def _inside(view: View, value: float) -> float:
    return min(max(value, view.low), view.high)


def _least_error(view: View, grid: Grid, ranges: list[Bounds]) -> Bounds:
    """Least squared error; among ties the range of least magnitude."""
    errors = np.array([squared_error(view, low, high, grid) for low, high in ranges])
    tied = errors <= errors.min() + 1e-12 * errors.min() + 1e-14
    return min((r for r, t in zip(ranges, tied, strict=True) if t), key=lambda r: max(-r[0], r[1]))


def mean_abs(view: View, grid: Grid) -> Bounds:
    """Where the range has the scale 2 mean|x| / sqrt(quant_max), LSQ's first."""
    scale = 2 * view.mean_distance(0.0) / math.sqrt(grid.quant_max)
    width = scale * (grid.quant_max - grid.quant_min)
    if grid.symmetric and grid.unsigned:
        return (0.0, width if view.high > 0 else 0.0)
    if grid.symmetric or not view.one_sided:
        return (-width / 2, width / 2)
    return (0.0, width) if view.low >= 0 else (-width, 0.0)


RULES: dict[str, Callable[..., Bounds]] = {
    "min_max": min_max,
    "fixed_scale": fixed_scale,
    "clip": clip,
    "percentile": percentile,
    "clip_std": clip_std,
    "kl": kl,
    "mse": mse,
    "mix": mix,
    "aciq": aciq,
    "mean_abs": mean_abs,
}
