"""kl_threshold: the searches of six systems on linear histograms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kl_searches
from kl_searches import CURVES, SIGNED, golden, golden_signed, sums_of
from torch_ext import ops

# The least divergence of each histogram, evaluated without rounding.
MAGNITUDES = {
    "ncnn": dict(zip("PQRSTUVW", (2024, 2047, 256, 1638, 128, 2047, 645, 954), strict=True)),
    "modelopt": dict(zip("PQRSTUVW", (2048, 2044, 2048, 2048, 2048, 2048, 774, 1008), strict=True)),
    "slides": dict(zip("PQRSTUVW", (2047, 2044, 256, 1365, 128, 2047, 774, 1008), strict=True)),
}
TVM = {
    255: dict(zip("PQRSUVW", (3813, 3984, 255, 1136, 4000, 764, 1008), strict=True)),
    511: dict(zip("PQRSUVW", (4000, 3966, 4000, 1144, 4000, 1000, 1133), strict=True)),
}


def search(
    counts: np.ndarray, levels: int, variant: str, width: float = 1.0
) -> tuple[list[int], list[float]]:
    rows = torch.from_numpy(np.atleast_2d(counts))
    widths = torch.full((rows.shape[0],), width, dtype=torch.float64)
    index, threshold = ops.kl_threshold(rows, widths, levels, variant)
    assert index.dtype == torch.int64
    assert threshold.dtype == torch.float64
    return index.tolist(), threshold.tolist()


def random_counts(rng: np.random.Generator, rows: int, bins: int, signed: bool) -> np.ndarray:
    """Gauss, Laplace, uniform, sparse, one bin, none, few values, noise, large, with holes."""
    j = np.abs(np.arange(bins) - (bins // 2 if signed else 0))
    counts = np.zeros((rows, bins))
    for row, into in enumerate(counts):
        t = j / (bins * rng.uniform(0.02, 0.6))
        size = 2 ** rng.uniform(4, 34)
        into[:] = [
            size * np.exp(-(t**2)),
            size * np.exp(-3 * t),
            np.full(bins, 1000.0),
            np.where(rng.random(bins) < 0.05, 100 * t + 1, 0),
            np.arange(bins) == rng.integers(bins),
            np.zeros(bins),
            np.bincount(rng.integers(bins, size=50), rng.integers(1, 1000, 50), bins),
            size * np.exp(-2 * t) * rng.random(bins),
            2 ** rng.uniform(34, 42, bins),
            rng.uniform(0, 3, bins),
        ][row % 10]
        into[-1] += row % 3 == 0 and row % 10 != 5
    return counts.astype(np.int64)


def assert_plain(variant: str, counts: np.ndarray, levels: int, width: float) -> None:
    """Index and threshold of the plain search, ties included."""
    index, threshold = search(counts, levels, variant, width)
    expected = [kl_searches.solve(variant, row, width, levels) for row in counts]
    assert index == [kept for kept, _ in expected]
    assert threshold == pytest.approx([t for _, t in expected], rel=1e-15)


@pytest.mark.parametrize("variant", MAGNITUDES)
def test_golden_index_on_magnitudes(variant: str):
    names = MAGNITUDES[variant]
    index, threshold = search(np.stack([golden(n) for n in names]), 128, variant, 1 / 2048)
    assert dict(zip(names, index, strict=True)) == names
    half = 0 if variant == "modelopt" else 0.5
    assert threshold == [(kept + half) / 2048 for kept in names.values()]


@pytest.mark.parametrize("levels", TVM)
def test_golden_index_on_signed_values(levels: int):
    names = TVM[levels]
    index, threshold = search(np.stack([golden_signed(n) for n in names]), levels, "tvm", 2 / 8001)
    assert dict(zip(names, index, strict=True)) == names
    by_name = dict(zip(names, threshold, strict=True))
    assert by_name["U"] == pytest.approx(1.0, rel=1e-15)
    if levels == 255:
        assert by_name["V"] == pytest.approx(0.1911011, abs=5e-8)


def test_golden_index_of_horizon_and_onnxruntime():
    bins = np.stack([sums_of(golden("V"), 4), sums_of(golden("W"), 4)])
    assert search(bins, 128, "horizon", 0.5) == ([169, 256], [84.5, 128.0])
    half = sums_of(golden("V"), 2)
    assert search(np.concatenate([half[::-1], half]), 128, "onnxruntime", 1 / 1024) == (
        [384],
        [0.3759765625],
    )
    half = sums_of(golden("V"), 32)
    assert search(np.concatenate([half[::-1], half]), 128, "onnxruntime", 1 / 64) == ([64], [1.0])


@pytest.mark.parametrize("variant", MAGNITUDES)
def test_plain_search_finds_the_golden_index(variant: str):
    for name in "RVW":
        assert kl_searches.kept_bins(variant, golden(name), 128) == MAGNITUDES[variant][name]


def test_plain_signed_searches_find_the_golden_index():
    assert kl_searches.kept_bins("tvm", golden_signed("V"), 255) == TVM[255]["V"]
    assert kl_searches.kept_bins("horizon", sums_of(golden("V"), 4), 128) == 169
    half = sums_of(golden("V"), 2)
    assert kl_searches.kept_bins("onnxruntime", np.concatenate([half[::-1], half]), 128) == 384


@pytest.mark.parametrize("levels", [2, 7, 16, 64])
@pytest.mark.parametrize("variant", CURVES)
def test_equals_the_plain_search(variant: str, levels: int, rng: np.random.Generator):
    for bins in (levels, levels + 1, 101, 200):
        if bins >= levels:
            assert_plain(variant, random_counts(rng, 20, bins, variant in SIGNED), levels, 0.125)


@pytest.mark.parametrize("variant", CURVES)
def test_rows_do_not_depend_on_each_other_or_on_threads(variant: str, rng: np.random.Generator):
    counts = random_counts(rng, 12, 300, variant in SIGNED)
    widths = torch.from_numpy(rng.uniform(0.1, 2, 12))
    together = ops.kl_threshold(torch.from_numpy(counts), widths, 32, variant)
    for row in range(12):
        alone = ops.kl_threshold(
            torch.from_numpy(counts[row : row + 1]), widths[row : row + 1], 32, variant
        )
        assert torch.equal(alone[0], together[0][row : row + 1])
        assert torch.equal(alone[1], together[1][row : row + 1])
    torch.set_num_threads(1)
    single = ops.kl_threshold(torch.from_numpy(counts), widths, 32, variant)
    assert torch.equal(single[0], together[0])
    assert torch.equal(single[1], together[1])


@pytest.mark.parametrize("variant", CURVES)
def test_threshold_scales_with_the_width(variant: str, rng: np.random.Generator):
    counts = random_counts(rng, 10, 256, variant in SIGNED)
    index, threshold = search(counts, 32, variant)
    for power in (-100, 3, 100):
        scaled_index, scaled = search(counts, 32, variant, 2.0**power)
        assert scaled_index == index
        assert scaled == [t * 2.0**power for t in threshold]


@pytest.mark.parametrize("variant", CURVES)
def test_no_values_keep_the_whole_histogram(variant: str):
    zeros = np.zeros((2, 256), dtype=np.int64)
    if variant in SIGNED:
        assert search(zeros, 32, variant, 0.5) == ([128, 128], [64.0, 64.0])
    else:
        end = 128.25 if variant in ("slides", "ncnn") else 128.0
        assert search(zeros, 32, variant, 0.5) == ([256, 256], [end, end])


def test_no_rows():
    index, threshold = ops.kl_threshold(
        torch.zeros(0, 256, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    )
    assert index.shape == threshold.shape == (0,)


def test_strided_counts():
    counts = torch.from_numpy(np.stack([golden("V"), golden("W")]))
    width = torch.full((2,), 1 / 2048, dtype=torch.float64)
    doubled = counts.repeat_interleave(2, 1)[:, ::2]
    for view in (doubled, counts.t().contiguous().t()):
        assert ops.kl_threshold(view, width)[0].tolist() == [774, 1008]


# ---- ONNX Runtime's own search, which rounds to float32


def onnx_index(counts: np.ndarray, levels: int) -> int:
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    collector = calibrate.HistogramCollector("entropy", False, len(counts), levels, 99.999, "same")
    edges = np.linspace(-1, 1, len(counts) + 1)
    histogram = (counts, edges, edges[0], edges[-1], edges[-1])
    low, high = collector.get_entropy_threshold(histogram, levels)
    center = len(counts) // 2
    kept = center - int(np.argmin(np.abs(edges - low)))
    assert high == edges[min(center + kept + 1, len(counts))]
    return kept


@pytest.mark.parametrize("bins", [256, 257])
def test_onnxruntime_answers_the_same(bins: int, rng: np.random.Generator):
    compared = 0
    for counts in random_counts(rng, 10, bins, True):
        if not counts.any() or counts.max() > 2**24:  # float32 holds no more
            continue
        theirs = onnx_index(counts, 32)
        kept = search(counts, 32, "onnxruntime")[0][0]
        first, value = kl_searches.onnxruntime(counts, 32)
        # Their pick is as good as ours up to what float32 can tell.
        assert value[theirs - first] - value[kept - first] == pytest.approx(0, abs=2e-6)
        assert value[kept - first] <= kl_searches.tie_bound(float(value.min())) + 1e-13
        compared += 1
    assert compared >= 5


def test_onnxruntime_answers_the_same_on_a_strict_case():
    half = sums_of(golden("V"), 8)
    counts = np.concatenate([half[::-1], half])
    assert search(counts, 64, "onnxruntime")[0] == [onnx_index(counts, 64)]
