"""Grids, and from a range to scale and zero point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Grid:
    quant_min: int = -128
    quant_max: int = 127
    symmetric: bool = True
    scale_rule: str = "grid"
    power_of_two: bool = False

    @property
    def steps(self) -> int:
        return self.quant_max - self.quant_min

    @property
    def bits(self) -> int:
        return self.steps.bit_length()

    @property
    def unsigned(self) -> bool:
        return self.quant_min >= 0


class QParams(NamedTuple):
    scale: float
    zero_point: int
    # Distance of the exact zero point from a rounding tie. Very close to one, a float64 formula may
    # fall either way; exactly on one (0), everybody must round to even.
    tie_distance: Fraction = Fraction(1, 2)


def qparams(low: float, high: float, grid: Grid) -> QParams:
    if grid.symmetric:
        if grid.unsigned:
            magnitude, divisor = max(high, 0.0), float(grid.quant_max)
        else:
            magnitude, divisor = max(abs(low), abs(high)), grid.steps / 2
        if grid.scale_rule == "tvm":
            divisor = 2.0 ** (grid.bits if grid.unsigned else grid.bits - 1)
        if magnitude == 0:
            return QParams(1.0, 0)
        return QParams(_capped(_floored(magnitude / divisor, grid)[0], 0, grid), 0)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return QParams(1.0, 0)
    exact = grid.quant_min - Fraction(low) * grid.steps / (Fraction(high) - Fraction(low))
    scale, changed = _floored((high - low) / grid.steps, grid)
    if changed:
        exact = grid.quant_min - Fraction(low) / Fraction(scale)
    half = abs(exact - math.floor(exact) - Fraction(1, 2))
    zero_point = min(max(round(exact), grid.quant_min), grid.quant_max)  # a Fraction: half to even
    return QParams(_capped(scale, zero_point, grid), zero_point, half)


def _floored(wide: float, grid: Grid) -> tuple[float, bool]:
    """Rounded up to 2^k if asked, and at least 2^-126; whether that changed it."""
    scale = wide
    if grid.power_of_two:
        mantissa, exponent = math.frexp(wide)
        scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
    scale = max(scale, 2.0**-126)
    return scale, scale != wide


def _capped(wide: float, zero_point: int, grid: Grid) -> float:
    """Float32, at most the largest (the largest 2^k) that keeps every level of the grid finite."""
    level = np.float32(max(abs(grid.quant_min - zero_point), abs(grid.quant_max - zero_point)))
    with np.errstate(over="ignore"):
        scale = np.float32(wide)
        if np.isfinite(level * scale):
            return float(scale)
        if grid.power_of_two:
            return float(2.0 ** math.floor(math.log2(FLOAT_MAX / float(level))))
        scale = np.float32(FLOAT_MAX / float(level))
        while np.isfinite(level * np.nextafter(scale, np.float32(np.inf))):
            scale = np.nextafter(scale, np.float32(np.inf))
        while not np.isfinite(level * scale):
            scale = np.nextafter(scale, np.float32(0))
    return float(scale)
