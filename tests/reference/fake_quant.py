"""Fake-quant in numpy: float64 for float64 input, float32 for float32 and the half types."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from reference.grid import Grid

Array = npt.NDArray[Any]


def rounded(v: Array, rounding: str) -> Array:
    half = v.dtype.type(0.5)
    if rounding == "half_even":
        return np.asarray(np.rint(v))
    if rounding == "half_away":
        return np.asarray(np.trunc(v + np.copysign(half, v)))
    assert rounding == "floor_half_up"
    return np.asarray(np.floor(v + half))


def fake_quant(
    x: Array, scale: Array, zero_point: Array, grid: Grid, rounding: str = "half_even"
) -> Array:
    """x float32 or float64; scale and zero_point broadcast. NaN stays NaN, +-inf saturates."""
    with np.errstate(over="ignore", invalid="ignore"):
        s, z = scale.astype(x.dtype), zero_point.astype(x.dtype)
        q = np.clip(rounded(x / s, rounding) + z, grid.quant_min, grid.quant_max)
        return np.asarray((q - z) * s)


def gradient_mask(
    x: Array,
    scale: Array,
    zero_point: Array,
    grid: Grid,
    mask: str = "rounded",
    rounding: str = "half_even",
) -> npt.NDArray[np.bool_]:
    """Where the straight-through gradient passes."""
    with np.errstate(over="ignore", invalid="ignore"):
        s, z = scale.astype(x.dtype), zero_point.astype(x.dtype)
        if mask == "paper":
            level = x / s + z
            return np.asarray((level > grid.quant_min) & (level < grid.quant_max))
        q = rounded(x / s, rounding) + z
        return np.asarray((q >= grid.quant_min) & (q <= grid.quant_max))


def bits_of_mask(packed: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.bool_]:
    """Bit i % 8 of byte i / 8 is element i."""
    return np.unpackbits(packed, bitorder="little")[:count].astype(bool)
