"""The kl rule's public variants search the linear view of a statistic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference import Grid, Statistic
from sample_data import sample
from statistic_tensors import observed, plain
from torch_ext import ops


@pytest.mark.parametrize("bins", [128, 129, 130])
@pytest.mark.parametrize("variant", ["slides", "modelopt", "ncnn", "horizon", "tvm", "onnxruntime"])
def test_hardly_any_bins_to_choose_from(variant: str, bins: int):
    """Hardly more bins than levels, or no data: still an answer within the histogram."""
    width = torch.tensor([0.5], dtype=torch.float64)
    for counts in ([5] * bins, [0] * bins, [0] * (bins - 1) + [3]):
        index, threshold = ops.kl_threshold(torch.tensor([counts]), width, 128, variant)
        assert 0 <= int(index) <= bins
        assert 0 < float(threshold) <= 0.5 * (bins + 1)


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
