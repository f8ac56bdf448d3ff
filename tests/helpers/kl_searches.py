"""The KL searches of six systems on linear histograms, straight from their definitions.

Slow on purpose: every candidate builds P and Q and sums, in float64. ``CURVES`` gives the
divergence of every candidate, ``solve`` the index and threshold that the system answers with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class Curve(NamedTuple):
    first: int  # bins kept by the first candidate
    value: Floats  # divergence of every candidate, +inf where it is none


def divergence(p: Floats, q: Floats) -> float:
    """KL(P||Q) of two masses, both normalised here; infinite where P > 0 = Q."""
    if not (p.sum() > 0 and q.sum() > 0):
        return np.inf
    filled = p > 0
    if np.any(q[filled] <= 0):
        return np.inf
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def clipped(counts: Counts, m: int) -> Floats:
    """The first m bins, the mass beyond them on the last one."""
    p = counts[:m].astype(np.float64)
    p[-1] += counts[m:].sum()
    return p


def group_means(counts: Counts, m: int, levels: int) -> Floats:
    """Bin j is of group floor(j * levels / m); a non-empty bin gets its group's mean over those."""
    kept = counts[:m].astype(np.float64)
    group = np.arange(m) * levels // m
    total = np.bincount(group, kept, levels)
    filled = np.bincount(group, kept > 0, levels)
    return np.where(kept > 0, (total / np.maximum(filled, 1))[group], 0.0)


def slides(counts: Counts, levels: int) -> Curve:
    candidates = range(levels, len(counts))
    return Curve(
        levels,
        np.array(
            [divergence(clipped(counts, m), group_means(counts, m, levels)) for m in candidates]
        ),
    )


def second_bin_first(counts: Counts) -> Counts:
    counts = counts.copy()
    counts[0] = counts[min(1, len(counts) - 1)]
    return counts


def modelopt(counts: Counts, levels: int) -> Curve:
    counts = second_bin_first(counts)
    candidates = range(levels, len(counts) + 1)
    return Curve(
        levels,
        np.array(
            [divergence(clipped(counts, m), group_means(counts, m, levels)) for m in candidates]
        ),
    )


def ncnn(counts: Counts, levels: int) -> Curve:
    """Fractional groups; counts normalised, 1e-4 added to every bin, nothing normalised again."""
    total = counts.sum()
    values = []
    for m in range(levels, len(counts)):
        if total == 0:
            values.append(np.inf)
            continue
        h = counts[:m] / total
        p = h + 1e-4
        p[-1] += counts[m:].sum() / total
        # Bin [j, j + 1) starts in group `left`, of width m / levels, and may end in the next one.
        j = np.arange(m)
        left = j * levels // m
        right = np.minimum(left + 1, levels - 1)
        inside = np.minimum((left + 1) * m - j * levels, levels) / levels
        group = np.bincount(left, inside * h, levels) + np.bincount(right, (1 - inside) * h, levels)
        mean = group / (m / levels)
        q = 1e-4 + inside * mean[left] + (1 - inside) * mean[right]
        values.append(float(np.sum(p * np.log(p / q))))
    return Curve(levels, np.array(values))


def smoothed(values: Floats) -> Floats | None:
    """1e-4 onto every zero, taken in equal parts from the others."""
    zeros = np.count_nonzero(values == 0)
    filled = len(values) - zeros
    if filled == 0 or 1e-4 * zeros / filled >= 1:
        return None
    return np.where(values == 0, 1e-4, values - 1e-4 * zeros / filled)


def windows(
    counts: Counts, levels: int, quantize: Callable[[Counts, Floats, int], Floats]
) -> Curve:
    """Candidate i keeps the bins within i of the centre; P's edge bins hold all mass beyond."""
    center = len(counts) // 2
    values = []
    for i in range(levels // 2, center + 1):
        begin, end = center - i, min(center + i + 1, len(counts))
        kept = counts[begin:end].copy()
        p = kept.astype(np.float64)
        p[0] += counts[:begin].sum()
        p[-1] += counts[end:].sum()
        if len(kept) < levels:
            values.append(np.inf)
            continue
        p_smooth, q_smooth = smoothed(p), smoothed(quantize(kept, p, levels))
        if p_smooth is None or q_smooth is None:
            values.append(np.inf)
        else:
            values.append(divergence(p_smooth, q_smooth))
    return Curve(levels // 2, np.array(values))


def tvm(counts: Counts, levels: int) -> Curve:
    def quantize(kept: Counts, p: Floats, levels: int) -> Floats:
        kept[0] = 0
        group = np.minimum(np.arange(len(kept)) // (len(kept) // levels), levels - 1)
        total = np.bincount(group, kept, levels)
        filled = np.bincount(group, kept > 0, levels)
        return np.where(p > 0, (total / np.maximum(filled, 1))[group], 0.0)

    return windows(counts, levels, quantize)


def onnxruntime(counts: Counts, levels: int) -> Curve:
    def quantize(kept: Counts, p: Floats, levels: int) -> Floats:
        merged = len(kept) // levels
        whole = merged * levels
        total = kept[:whole].reshape(levels, merged).sum(1)
        total[-1] += kept[whole:].sum()
        filled = np.count_nonzero(p[:whole].reshape(levels, merged), axis=1)
        mean = np.where(filled > 0, np.floor(total / np.maximum(filled, 1)), 0.0)
        return np.concatenate([np.repeat(mean, merged), np.zeros(len(kept) - whole)])

    return windows(counts, levels, quantize)


def horizon(counts: Counts, levels: int) -> Curve:
    counts = second_bin_first(counts)
    single = []
    for m in range(levels, len(counts) + 1):
        p, q = clipped(counts, m), group_means(counts, m, levels)
        if not (p.sum() > 0 and q.sum() > 0):
            single.append(np.inf)
            continue
        filled = p > 0
        p, q = p[filled] / p.sum(), q[filled] / q.sum() + 1e-10
        single.append(float(np.sum(p * np.log(p / q))))
    sums = [sum(single[k : k + 9]) for k in range(len(single) - 10)]
    return Curve(levels + 4, np.array(sums))


CURVES: dict[str, Callable[[Counts, int], Curve]] = {
    "slides": slides,
    "modelopt": modelopt,
    "ncnn": ncnn,
    "tvm": tvm,
    "onnxruntime": onnxruntime,
    "horizon": horizon,
}
SIGNED = ("tvm", "onnxruntime")
LAST_WINS = ("modelopt", "horizon")


def tie_bound(least: float) -> float:
    return least + 1e-12 * abs(least) + 1e-14


def kept_bins(variant: str, counts: Counts, levels: int) -> int:
    curve = CURVES[variant](counts, levels)
    if not np.any(np.isfinite(curve.value)):
        return len(counts) // 2 if variant in SIGNED else len(counts)
    winners = np.flatnonzero(curve.value <= tie_bound(float(curve.value.min())))
    return curve.first + int(winners[-1] if variant in LAST_WINS else winners[0])


def threshold_of(variant: str, bins: int, kept: int, width: float) -> float:
    if variant in SIGNED:
        return (min(bins // 2 + kept + 1, bins) - bins / 2) * width
    return (kept + 0.5) * width if variant in ("slides", "ncnn") else kept * width


def solve(variant: str, counts: Counts, width: float, levels: int) -> tuple[int, float]:
    kept = kept_bins(variant, counts, levels)
    return kept, threshold_of(variant, len(counts), kept, width)


# ---- golden vectors: integer formulas over j, no random numbers


def golden(name: str, bins: int = 2048, ramp: int = 2048) -> Counts:
    j = np.arange(bins, dtype=np.int64)
    p = 10**9 // (1000 + j**2)
    counts: dict[str, Counts] = {
        "P": p,
        "Q": ramp - j,
        "U": np.full(bins, 1000),
        "R": np.where(j < 256, 1000, np.where(j == bins - 1, 1, 0)),
        "S": 10**6 >> (j // 64),
        "T": np.where(j == 0, 10**9, p),
        "V": np.maximum(10**13 // (10**7 + j**4), j == bins - 1),
        "W": (10**6 * (128 - j % 64) // 128) >> (j // 64),
    }
    return counts[name].astype(np.int64)


def golden_signed(name: str) -> Counts:
    """8001 bins, mirrored about bin 4000."""
    half = golden(name, 4001, 4001)
    return np.concatenate([half[:0:-1], half])


def sums_of(counts: Counts, together: int) -> Counts:
    sums: Counts = counts.reshape(-1, together).sum(1)
    return sums
