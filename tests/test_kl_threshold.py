"""KL search on linear histograms: integer ones with known answers, and their use by the rule."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import Grid, Statistic
from support import observed, plain, sample
from torch_ext import ops

BINS, SIDE = 2048, 4000  # a histogram of |x|; bins on one side of a signed histogram's centre


def with_end(values: list[int], least: int = 0) -> list[int]:
    return [*values[:-1], max(values[-1], least)]


# Histograms of integers alone, so that nothing depends on a random generator.
SHAPES: dict[str, Callable[[int], list[int]]] = {
    "P": lambda n: [10**9 // (1000 + j * j) for j in range(n)],
    "Q": lambda n: [n - j for j in range(n)],
    "R": lambda n: with_end([1000 if j < 256 else 0 for j in range(n)], 1),
    "S": lambda n: [10**6 >> (j // 64) for j in range(n)],
    "T": lambda n: [10**9, *(10**9 // (1000 + j * j) for j in range(1, n))],
    "U": lambda n: [1000] * n,
    "V": lambda n: with_end([10**13 // (10**7 + j**4) for j in range(n)], 1),
    "W": lambda n: [(10**6 * (128 - j % 64) // 128) >> (j // 64) for j in range(n)],
}
# The number of bins that the public programs keep, evaluated in double precision.
KEPT = {
    "slides": {"P": 2047, "Q": 2044, "R": 256, "S": 1365, "T": 128, "U": 2047, "V": 774, "W": 1008},
    "modelopt": {"P": 2048, "Q": 2044, "R": 2048, "S": 2048, "T": 2048, "U": 2048, "V": 774},
    "ncnn": {"P": 2024, "Q": 2047, "R": 256, "S": 1638, "T": 128, "U": 2047, "V": 645, "W": 954},
}
KEPT["modelopt"]["W"] = 1008
SIDES = {
    255: {"P": 3813, "Q": 3984, "R": 255, "S": 1136, "U": 4000, "V": 764, "W": 1008},
    511: {"P": 4000, "Q": 3966, "R": 4000, "S": 1144, "U": 4000, "V": 1000, "W": 1133},
}


def search(counts: list[int], width: float, levels: int, variant: str) -> tuple[int, float]:
    index, threshold = ops.kl_threshold(
        torch.tensor([counts]), torch.tensor([width], dtype=torch.float64), levels, variant
    )
    assert index.dtype == torch.int64
    assert threshold.dtype == torch.float64
    return int(index), float(threshold)


@pytest.mark.parametrize(("variant", "shape"), [(v, s) for v, row in KEPT.items() for s in row])
def test_bins_kept_of_a_magnitude_histogram(variant: str, shape: str):
    counts = SHAPES[shape](BINS)
    index, threshold = search(counts, 1 / BINS, 128, variant)
    assert index == KEPT[variant][shape]
    offset = 0.5 if variant in ("slides", "ncnn") else 0.0
    assert threshold == pytest.approx((index + offset) / BINS, abs=0.51 / BINS)


@pytest.mark.parametrize(("levels", "shape"), [(n, s) for n, row in SIDES.items() for s in row])
def test_bins_kept_on_each_side_of_a_signed_histogram(levels: int, shape: str):
    half = SHAPES[shape](SIDE + 1)  # f(0) is the centre bin
    width = 2 / (2 * SIDE + 1)
    index, threshold = search([*half[:0:-1], *half], width, levels, "tvm")
    assert index == SIDES[levels][shape]
    assert threshold == pytest.approx((index + 0.5) * width, rel=1e-12)


def test_horizon_keeps_an_edge_of_512():
    for shape, kept in (("V", 169), ("W", 256)):
        counts = np.array(SHAPES[shape](BINS)).reshape(512, 4).sum(1).tolist()
        assert search(counts, 4 / BINS, 128, "horizon")[0] == kept


@pytest.mark.parametrize("variant", ["slides", "modelopt", "ncnn", "horizon"])
def test_batch_thread_count_and_scale(variant: str):
    counts = torch.tensor([SHAPES[s](BINS) for s in "PQRSTUVW"])
    width = torch.logspace(-3, 3, 8, 2, dtype=torch.float64)
    torch.set_num_threads(1)
    index, threshold = ops.kl_threshold(counts, width, 128, variant)
    for i in range(8):
        alone = ops.kl_threshold(counts[i : i + 1], width[i : i + 1], 128, variant)
        assert (alone[0][0], alone[1][0]) == (index[i], threshold[i])
    for threads in (2, 5, 8):
        torch.set_num_threads(threads)
        again = ops.kl_threshold(counts, width, 128, variant)
        assert torch.equal(again[0], index)
        assert torch.equal(again[1], threshold)
    scaled = ops.kl_threshold(counts, width * 8, 128, variant)
    assert torch.equal(scaled[0], index)
    assert torch.equal(scaled[1], threshold * 8)


@pytest.mark.parametrize("bins", [1, 2, 64, 128, 129])
@pytest.mark.parametrize("variant", ["slides", "modelopt", "ncnn", "horizon", "tvm", "onnxruntime"])
def test_hardly_any_bins_to_choose_from(variant: str, bins: int):
    """Hardly more bins than levels, or no data: still an answer within the histogram."""
    for counts in ([5] * bins, [0] * bins, [0] * (bins - 1) + [3]):
        index, threshold = search(counts, 0.5, 128, variant)
        assert 0 <= index <= bins
        assert 0 < threshold <= 0.5 * (bins + 1)


def linear_view(stat: Statistic, with_zeros: bool) -> tuple[Tensor, float]:
    """2^(m+1) bins of |x| of width 2^(top-m): exact, because every bin lies inside one of them."""
    width = 2.0 ** (stat.top - stat.mantissa_bits)
    counts = torch.zeros(1, 2 ** (stat.mantissa_bits + 1), dtype=torch.int64)
    for (_, octave, sub), count in stat.bins.items():
        edge = 2.0**octave * (1 + sub / 2**stat.mantissa_bits)
        counts[0, int(edge / width)] += count
    counts[0, 0] += stat.tiny + (stat.zeros if with_zeros else 0)
    return counts, width


@pytest.mark.parametrize("kind", ["gauss", "relu", "outlier", "sparse", "shifted", "laplace"])
@pytest.mark.parametrize("variant", ["slides", "modelopt", "ncnn", "horizon"])
def test_kl_rule_searches_the_linear_view_of_its_statistic(variant: str, kind: str):
    x = sample(kind, 20_000)
    state = observed(x)
    counts, width = linear_view(plain(x, state), with_zeros=variant != "ncnn")
    for grid in (Grid(), Grid(0, 255), Grid(0, 255, symmetric=False)):
        whole_grid = kind in ("relu", "shifted") and x.min() >= 0 and grid != Grid()
        levels = 256 if whole_grid else 128
        limit = torch.tensor([width], dtype=torch.float64)
        threshold = float(ops.kl_threshold(counts, limit, levels, variant)[1])
        have = ops.solve(
            "kl", *state, grid.quant_min, grid.quant_max, grid.symmetric, variant=variant
        )
        want = torch.stack([x.min(), x.max()]).double().clamp(-threshold, threshold).float()
        assert torch.equal(have[0], want), grid
