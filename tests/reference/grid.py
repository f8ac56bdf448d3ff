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
        return QParams(_limited(magnitude / divisor, 0, grid)[0], 0)
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return QParams(1.0, 0)
    exact = grid.quant_min - Fraction(low) * grid.steps / (Fraction(high) - Fraction(low))
    scale, changed = _limited((high - low) / grid.steps, _clamped(exact, grid), grid)
    if changed:
        exact = grid.quant_min - Fraction(low) / Fraction(scale)
    half = abs(exact - math.floor(exact) - Fraction(1, 2))
    return QParams(scale, _clamped(exact, grid), half)


def _clamped(exact: Fraction, grid: Grid) -> int:
    nearest = round(exact)  # of a Fraction: half to even
    return min(max(nearest, grid.quant_min), grid.quant_max)


def _limited(wide: float, zero_point: int, grid: Grid) -> tuple[float, bool]:
    """float32 scale, a power of two if asked, at least 2^-126, small enough for a finite grid."""
    scale, changed = wide, False
    if grid.power_of_two:
        mantissa, exponent = math.frexp(wide)
        scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
        changed = scale != wide
    if scale < 2.0**-126:
        return 2.0**-126, True
    level = max(abs(grid.quant_min - zero_point), abs(grid.quant_max - zero_point))
    with np.errstate(over="ignore"):
        rounded = np.float32(scale)
        if np.isfinite(np.float32(level) * rounded):
            return float(rounded), changed
        if grid.power_of_two:
            return 2.0 ** math.floor(math.log2(FLOAT_MAX / level)), True
        capped = np.float32(FLOAT_MAX / level)
        while np.isfinite(np.float32(level) * np.nextafter(capped, np.float32(np.inf))):
            capped = np.nextafter(capped, np.float32(np.inf))
        while not np.isfinite(np.float32(level) * capped):
            capped = np.nextafter(capped, np.float32(0))
    return float(capped), True
