"""Rules that search: the candidate thresholds, one objective each, and the tie rule."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from reference.grid import Grid, qparams
from reference.view import View

Floats = npt.NDArray[np.float64]
BINS_PER_LEVEL = 8


def threshold_range(view: View, threshold: float) -> tuple[float, float]:
    low = min(max(view.low, -threshold), threshold)
    high = min(max(view.high, -threshold), threshold)
    return low, high


def candidates(view: View) -> Floats:
    """T = 2^e (1 + s/128), s = 1..128, over the window's octaves, ascending."""
    if view.magnitude < 2.0**-126:
        return np.empty(0)
    octaves = range(view.stat.top - view.stat.octaves + 1, view.stat.top + 1)
    lattice = np.array([2.0**e * (1 + s / 128) for e in octaves for s in range(1, 129)])
    last = np.searchsorted(lattice, view.magnitude)  # the first T >= max|x|
    lattice = lattice[: last + 1]
    return lattice[2 * view.count_below(lattice) >= view.nonzero]


def squared_error(view: View, low: float, high: float, grid: Grid) -> float:
    """Squared error of quantizing every atom on the grid, over the sum of squares."""
    scale, zero_point, _ = qparams(low, high, grid)
    v = view.values.astype(np.longdouble)
    with np.errstate(over="ignore", under="ignore"):
        q = np.clip(np.rint(v / scale) + zero_point, grid.quant_min, grid.quant_max)
        error = (v - (q - zero_point) * scale) ** 2
        energy = np.sum(view.counts * v**2)
    return float(np.sum(view.counts * error) / energy) if energy > 0 else 0.0


def mse_objective(view: View, thresholds: Floats, grid: Grid) -> Floats:
    ranges = [threshold_range(view, float(t)) for t in thresholds]
    return np.array([squared_error(view, low, high, grid) for low, high in ranges])


def levels_of(view: View, grid: Grid) -> int:
    whole_grid = view.one_sided and (grid.unsigned or not grid.symmetric)
    return int(2 ** (grid.bits if whole_grid else grid.bits - 1))


def kl_objective(view: View, thresholds: Floats, grid: Grid) -> Floats:
    return np.array([_kl_at(view, float(t), levels_of(view, grid)) for t in thresholds])


def _kl_at(view: View, threshold: float, levels: int) -> float:
    """KL(p || q) less the bias of sampling; infinite where outliers have no bin to go to."""
    bins = BINS_PER_LEVEL * levels
    below = view.count_below(threshold * np.arange(bins + 1) / bins)
    c = np.diff(below).reshape(levels, BINS_PER_LEVEL).astype(np.longdouble)
    inside, total = below[-1], view.nonzero
    outside = total - inside
    occupied = c > 0
    per_level = occupied.sum(axis=1)
    outliers = np.zeros_like(c)
    if outside > 0:
        if per_level[-1] == 0:
            return float("inf")
        outliers[-1, occupied[-1]] = np.longdouble(outside) / per_level[-1]
    p = (c + outliers) / total
    level_mean = c.sum(axis=1) / np.maximum(per_level, 1)
    q = np.broadcast_to(level_mean[:, None], c.shape) / inside
    divergence = np.sum(p[occupied] * np.log(p[occupied] / q[occupied]))
    bias = (int(occupied.sum()) - int((per_level > 0).sum())) / (2 * np.longdouble(total))
    return float(divergence - bias)


def least_threshold(view: View, thresholds: Floats, objective: Floats) -> float:
    """The smallest T within the tie tolerance of the least objective; max|x| without candidates."""
    if not np.isfinite(objective).any():
        return view.magnitude
    least = float(objective.min())
    tied = objective <= least + 1e-12 * abs(least) + 1e-14
    return min(float(thresholds[tied][0]), view.magnitude)
