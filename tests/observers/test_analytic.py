"""Known sources: clips and signal-to-noise of a unit Gaussian, Laplace and half-normal."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import Grid
from statistic_tensors import State, observed
from torch_ext import ops

COUNT = 1_000_000
# source -> bits -> (best clip in sigma, SQNR in dB), by dense numeric integration.
GAUSS = {2: (1.22, 7.21), 3: (1.95, 13.29), 4: (2.47, 18.90), 6: (3.27, 29.71), 8: (3.92, 40.54)}
LAPLACE = {2: (1.41, 5.78), 3: (2.47, 10.80), 4: (3.41, 15.62), 6: (5.20, 25.26), 8: (6.99, 35.18)}
HALF = {2: (1.95, 13.29), 3: (2.47, 18.90), 4: (2.90, 24.33), 6: (3.61, 35.11), 8: (4.21, 46.02)}
ANCHORS = {"gauss": GAUSS, "laplace": LAPLACE, "half": HALF}
# The largest of 1e6 samples is random; these hold for an average one.
MIN_MAX = {("gauss", 4): 13.96, ("gauss", 8): 39.13, ("laplace", 4): 8.05, ("laplace", 8): 32.71}
CASES = [(source, bits) for source, rows in ANCHORS.items() for bits in rows]


@functools.cache
def data(source: str, count: int = COUNT) -> tuple[Tensor, State]:
    """Unit second moment, one value per quantile: a sample without sampling noise in its tails."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if source == "laplace":
        centred = share - 0.5
        x = -centred.sign() * torch.log1p(-2 * centred.abs()) * math.sqrt(0.5)
    else:
        x = torch.special.ndtri(share)
    x = (x.abs() if source == "half" else x).float()
    return x, observed(x)


def grid_of(source: str, bits: int) -> Grid:
    """The anchors hold for grids that are symmetric about 0, and for one-sided data from 0."""
    half = 2 ** (bits - 1) - 1
    return Grid(0, 2**bits - 1) if source == "half" else Grid(-half, half)


def solve(rule: str, state: State, grid: Grid) -> Tensor:
    return ops.solve(rule, *state, grid.quant_min, grid.quant_max, grid.symmetric)


def sqnr(x: Tensor, found: Tensor, grid: Grid) -> float:
    """Signal to quantization noise of the real op, in dB."""
    scale, zero_point = ops.qparams(found, grid.quant_min, grid.quant_max, grid.symmetric)
    out = ops.fake_quant(x, scale, zero_point, grid.quant_min, grid.quant_max)
    noise = (x.double() - out.double()).square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise))


@pytest.mark.parametrize(("source", "bits"), CASES)
def test_mse_finds_the_best_clip(source: str, bits: int):
    x, state = data(source)
    grid = grid_of(source, bits)
    clip, decibel = ANCHORS[source][bits]
    found = solve("mse", state, grid)
    assert float(found.abs().max()) == pytest.approx(clip, rel=0.05 if bits == 8 else 0.03)
    assert sqnr(x, found, grid) == pytest.approx(decibel, abs=0.1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", ["gauss", "laplace"])
def test_min_max_loses_what_it_should(source: str, bits: int):
    x, state = data(source)
    grid = grid_of(source, bits)
    have = sqnr(x, solve("min_max", state, grid), grid)
    assert have == pytest.approx(MIN_MAX[source, bits], abs=0.4)


@pytest.mark.parametrize(("source", "bits"), [c for c in CASES if c[1] >= 4])
def test_search_rules_come_close_to_the_optimum(source: str, bits: int):
    x, state = data(source)
    grid = grid_of(source, bits)
    best = ANCHORS[source][bits][1]
    plain = sqnr(x, solve("min_max", state, grid), grid)
    for rule, within in (("aciq", 0.3), ("mix", 1.5), ("kl", 1.0)):
        have = sqnr(x, solve(rule, state, grid), grid)
        assert best - within <= have <= best + 0.1, rule
        assert have >= plain - 0.01, rule


@pytest.mark.parametrize("source", ["gauss", "laplace"])
def test_kl_threshold_grows_with_the_scale_of_the_data(source: str):
    """Other factors than powers of two move the data through the bins, an outlier the window."""
    x, _ = data(source, 400_000)
    base = float(solve("kl", observed(x), Grid()).abs().max())
    for factor in (1.5, 1.7, 3.3):
        scaled = float(solve("kl", observed(x * factor), Grid()).abs().max()) / factor
        assert scaled == pytest.approx(base, rel=0.05)
    outlier = observed(torch.cat([x, torch.tensor([1e4])]))
    assert float(solve("kl", outlier, Grid()).abs().max()) == pytest.approx(base, rel=0.05)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_one_sided_data_gain_exactly_one_bit_on_the_unsigned_grid(bits: int):
    """|x| on 2^b levels from 0 is x on 2^(b+1) - 1 levels about 0."""
    x, state = data("gauss")
    half = x.abs()
    unsigned, signed = Grid(0, 2**bits - 1), Grid(1 - 2**bits, 2**bits - 1)
    ranges = solve("mse", observed(half), unsigned), solve("mse", state, signed)
    assert float(ranges[0].abs().max()) == float(ranges[1].abs().max())
    have, want = sqnr(half, ranges[0], unsigned), sqnr(x, ranges[1], signed)
    assert have == pytest.approx(want, abs=1e-6)


def test_each_bit_adds_five_to_six_decibel():
    x, state = data("gauss")
    found = [
        sqnr(x, solve("mse", state, grid_of("gauss", b)), grid_of("gauss", b)) for b in range(3, 9)
    ]
    gains = np.diff(found)
    assert ((gains > 4.8) & (gains < 6.1)).all(), gains
