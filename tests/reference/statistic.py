"""The statistic of a list of values: extrema, tally, and the histogram as a dict of bins."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

SMALLEST_NORMAL = 2.0**-126


@dataclass
class Statistic:
    """`bins` maps (sign, octave, sub-bin) to a count; sign is 0 for negative, 1 for positive."""

    mantissa_bits: int = 10
    octaves: int = 16
    low: float = math.inf
    high: float = -math.inf
    finite: int = 0
    zeros: int = 0
    tiny: int = 0
    inf: int = 0
    nan: int = 0
    bins: dict[tuple[int, int, int], int] = field(default_factory=dict)

    @property
    def magnitude(self) -> float:
        """max|x| of the finite values; 0 when there is none."""
        return max(-self.low, self.high, 0.0) if self.finite else 0.0

    @property
    def top(self) -> int:
        """Octave of max|x|; meaningless unless some value is normal."""
        return math.frexp(self.magnitude)[1] - 1

    @property
    def bottom(self) -> float:
        """Lower end of the window: everything non-zero below it is tiny."""
        return max(2.0 ** (self.top - self.octaves + 1), SMALLEST_NORMAL)

    @property
    def tally(self) -> list[int]:
        return [self.finite, self.zeros, self.tiny, self.inf, self.nan]

    def counts(self) -> npt.NDArray[np.int64]:
        """[2, W, 2^m]: octave e lies in slot e mod W."""
        out = np.zeros((2, self.octaves, 2**self.mantissa_bits), np.int64)
        for (sign, octave, sub), count in self.bins.items():
            out[sign, octave % self.octaves, sub] += count
        return out


def observe(
    values: Iterable[float], mantissa_bits: int = 10, octaves: int = 16, histogram: bool = True
) -> Statistic:
    """Count every value by itself, knowing the largest magnitude beforehand."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(list(values), np.float64).astype(np.float32)
    stat = Statistic(mantissa_bits, octaves)
    stat.nan = int(np.isnan(rounded).sum())
    stat.inf = int(np.isinf(rounded).sum())
    finite = [float(v) for v in rounded if math.isfinite(v)]
    stat.finite = len(finite)
    stat.zeros = sum(v == 0 for v in finite)
    if finite:
        stat.low, stat.high = min(finite) + 0.0, max(finite) + 0.0  # -0.0 + 0.0 = +0.0
    if not histogram:
        return stat
    for v in finite:
        if v == 0:
            continue
        if abs(v) < stat.bottom:
            stat.tiny += 1
            continue
        mantissa, exponent = math.frexp(abs(v))  # |v| = mantissa * 2^exponent, mantissa in [0.5, 1)
        sub = int((2 * mantissa - 1) * 2**mantissa_bits)
        key = (int(v > 0), exponent - 1, sub)
        stat.bins[key] = stat.bins.get(key, 0) + 1
    return stat
