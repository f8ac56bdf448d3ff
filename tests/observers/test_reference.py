"""The reference itself, against facts published elsewhere: it must be more than an opinion."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reference import Grid, View, candidates, kl_objective, observe, qparams
from reference.rules import RULES, alpha, gauss_noise, laplace_noise

AFFINE = Grid(symmetric=False)


def gauss(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def test_histogram_bins_are_those_of_numpy():
    x = gauss(5000)
    stat = observe(x, mantissa_bits=7, octaves=12)
    edges = [2.0**e * (1 + k / 128) for e in range(stat.top - 11, stat.top + 1) for k in range(128)]
    want, _ = np.histogram(x[x > 0], bins=[*edges, 2.0 ** (stat.top + 1)])
    have = [stat.bins.get((1, stat.top - 11 + i // 128, i % 128), 0) for i in range(12 * 128)]
    assert have == want.tolist()
    assert sum(stat.bins.values()) + stat.tiny + stat.zeros == 5000


@pytest.mark.parametrize("p", [25.0, 50.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_is_numpys_nearest_rank_where_bins_are_exact(p: float):
    x = np.round(gauss(3001) * 64) / 64  # few enough mantissa bits for the bins to be exact
    view = View(observe(x))
    want = np.percentile(np.abs(x), p, method="inverted_cdf")
    assert RULES["percentile"](view, Grid(), p) == (max(-want, x.min()), min(want, x.max()))
    high = np.percentile(x, 50 + p / 2, method="inverted_cdf")
    assert RULES["percentile"](view, AFFINE, p)[1] == high


def test_count_below_interpolates():
    view = View(observe([1.0, 1.0, 3.0, -3.0, 1e-9], mantissa_bits=5, octaves=4))
    t = np.array([0.0, 0.125, 0.25, 1.0, 1 + 1 / 64, 1 + 1 / 32, 3.0, 3 + 1 / 32, 4.0])
    assert view.count_below(t).tolist() == [0, 0.5, 1, 1, 2, 3, 3, 4, 5]


# ncnn's source prints the Gaussian constants for 2..8 bits; the 9-bit ones are ours.
GAUSS = [
    1.71063519,
    2.15159277,
    2.55913646,
    2.93620062,
    3.28691474,
    3.6151146,
    3.92403714,
    4.216329826,
]
LAPLACE = [2.83068, 3.89723, 5.02864, 6.20477, 7.41313, 8.64562, 9.89676, 11.16268502]


@pytest.mark.parametrize("bits", range(2, 10))
def test_aciq_constants(bits: int):
    assert alpha(gauss_noise, bits) == pytest.approx(GAUSS[bits - 2], rel=2e-6)
    assert alpha(laplace_noise, bits) == pytest.approx(LAPLACE[bits - 2], rel=2e-6)


@pytest.mark.parametrize(
    ("low", "high", "printed"),  # in public documents of a toolchain that divides by 127.5
    [
        (-1.0, 1.47, "0.0115294"),
        (-99, 5, "0.7764706"),
        (-0.7511, 0.1, "0.0059"),
        (-0.4944, 0.5284, "0.0041"),
    ],
)
def test_symmetric_scale_is_that_of_published_examples(low: float, high: float, printed: str):
    digits = len(printed) - 2
    assert f"{qparams(low, high, Grid()).scale:.{digits}f}" == printed


def test_affine_represents_zero_and_both_ends():
    scale, zero_point, _ = qparams(-1.0, 3.0, AFFINE)
    assert (zero_point, scale) == (-64, np.float32(4 / 255))  # -128 + 63.75
    assert (-128 - zero_point) * scale == pytest.approx(-1.0, abs=scale / 2)
    assert (127 - zero_point) * scale == pytest.approx(3.0, abs=scale / 2)


def test_kl_objective_is_zero_for_data_the_levels_hold():
    """Values that fill each level evenly lose nothing when a level is spread over its bins."""
    x = (np.arange(1024) + 0.5) / 1024
    view = View(observe(x))
    top = candidates(view)[-1:]
    assert top.tolist() == [1.0]
    # The correction alone is left: 1024 occupied bins on 128 levels.
    assert kl_objective(view, top, Grid())[0] == pytest.approx(-(1024 - 128) / 2048, abs=1e-15)


@pytest.mark.parametrize(("bits", "clip"), [(2, 1.22), (3, 1.95), (4, 2.47), (6, 3.27)])
def test_gauss_mse_clip_is_the_textbook_one(bits: int, clip: float):
    """Best clip of a unit Gaussian on a symmetric grid of 2^bits - 1 levels."""
    x = gauss(40000)
    half = 2 ** (bits - 1) - 1
    low, high = RULES["mse"](View(observe(x)), Grid(-half, half))
    assert max(-low, high) == pytest.approx(clip, rel=0.05)


def test_clip_std_of_98_zeros_and_two_outliers():
    view = View(observe([0.0] * 98 + [10.0, -10.0]))
    assert RULES["clip_std"](view, Grid())[1] == pytest.approx(3 * math.sqrt(200 / 99))
