"""What rules read of a statistic: its bins as signed atoms, and the count of magnitudes below t."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from reference.statistic import Statistic

Floats = npt.NDArray[np.float64]


class View:
    """Ascending atoms: a bin's is its edge of least magnitude, zeros and tiny share one at 0."""

    def __init__(self, stat: Statistic) -> None:
        self.stat = stat
        self.low, self.high, self.magnitude = stat.low, stat.high, stat.magnitude
        self.total = stat.finite
        self.nonzero = stat.finite - stat.zeros
        atoms: dict[float, int] = {0.0: stat.zeros + stat.tiny}
        below: dict[float, int] = {}
        for (sign, octave, sub), count in stat.bins.items():
            edge = 2.0**octave * (1 + sub / 2**stat.mantissa_bits)
            atoms[edge if sign else -edge] = count
            below[edge] = below.get(edge, 0) + count
        self.values = np.array(sorted(atoms), np.float64)
        self.counts = np.array([atoms[v] for v in sorted(atoms)], np.int64)
        # Occupied intervals of |x|, ascending: [edge, edge + width) holds `inside` values.
        width = 2.0**-stat.mantissa_bits
        intervals = [(0.0, stat.bottom, stat.tiny)] if stat.tiny else []
        intervals += [(e, 2.0 ** math.floor(math.log2(e)) * width, below[e]) for e in sorted(below)]
        self._edge = np.array([i[0] for i in intervals], np.float64)
        self._width = np.array([i[1] for i in intervals], np.float64)
        self._inside = np.array([i[2] for i in intervals], np.float64)
        self._before = np.concatenate([[0.0], np.cumsum(self._inside)])

    def count_below(self, t: Floats) -> Floats:
        """F(t): the number of non-zero |x| < t, linear inside the interval that t falls into."""
        t = np.asarray(t, np.float64)
        if self._edge.size == 0:
            return np.zeros_like(t)
        # The last interval that starts at or below t.
        at = np.searchsorted(self._edge, t, side="right") - 1
        started = np.maximum(at, 0)
        share = np.clip((t - self._edge[started]) / self._width[started], 0.0, 1.0)
        return np.where(at < 0, 0.0, self._before[started] + share * self._inside[started])

    @property
    def mean(self) -> float:
        return math.fsum(self.counts * self.values) / self.total

    def deviation(self, mean: float, divisor: int) -> float:
        """sqrt of the squared distances from `mean` over `divisor`."""
        return math.sqrt(math.fsum(self.counts * (self.values - mean) ** 2) / divisor)

    def mean_distance(self, mean: float) -> float:
        return math.fsum(self.counts * np.abs(self.values - mean)) / self.total

    @property
    def one_sided(self) -> bool:
        return self.low >= 0 or self.high <= 0

    def signed_rank(self, rank: int) -> float:
        """The rank-th smallest value, from 1; the first and the last are the extrema themselves."""
        if rank == self.total:
            return self.high
        if rank == 1:
            return self.low
        return float(self.values[np.searchsorted(np.cumsum(self.counts), rank)])

    def magnitude_rank(self, rank: int) -> float:
        """The rank-th smallest |x|; among zeros and tiny it is the bottom of the window."""
        if rank == self.total:
            return self.magnitude
        order = np.argsort(np.abs(self.values), kind="stable")
        value = abs(self.values[order][np.searchsorted(np.cumsum(self.counts[order]), rank)])
        return float(value) if value > 0 else self.stat.bottom
