"""Percentile ranks are exact integers: no float decides which value is chosen."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statistic_tensors import State, observed
from torch_ext import ops


def solve(state: State, p: float, symmetric: bool = True) -> tuple[float, float]:
    row = ops.solve("percentile", *state, -128, 127, symmetric, percentile=p)[0].tolist()
    return row[0], row[1]


def rank(share: Fraction, total: int) -> int:
    return math.ceil(share * total / 100)


# Multiples of 1/8 up to 64: bins of 10 mantissa bits hold them exactly, so values can be compared.
eighths = st.integers(-511, 511).map(lambda i: i / 8)
percents = st.integers(1, 10**9).map(lambda n: n / 10**7)


@given(values=st.lists(eighths, min_size=1, max_size=60), p=percents)
def test_symmetric_is_the_nearest_rank_of_magnitudes(values: list[float], p: float):
    chosen = sorted(map(abs, values))[rank(Fraction(round(p * 10**7), 10**7), len(values)) - 1]
    top = max(map(abs, values))
    if chosen == 0:  # a rank among zeros: the bottom of the window
        chosen = 2.0 ** (math.frexp(top)[1] - 16) if top else 0.0
    want = (max(min(values), -chosen), min(max(values), chosen))
    have = solve(observed(torch.tensor(values)), p)
    assert have == (min(want[0], chosen), max(want[1], -chosen))


@given(values=st.lists(eighths, min_size=1, max_size=60), p=percents)
def test_affine_takes_half_from_each_end(values: list[float], p: float):
    ordered, share = sorted(values), Fraction(round(p * 10**7), 10**7)
    high = rank(50 + share / 2, len(values))
    low = min(len(values) + 1 - high, high)
    want = (ordered[low - 1], ordered[high - 1])
    if want == (0, 0):
        want = (ordered[0], ordered[-1])
    assert solve(observed(torch.tensor(values)), p, symmetric=False) == want


def repeated(x: Tensor, doublings: int) -> State:
    state = observed(x)
    for _ in range(doublings):
        ops.merge_(*state, *state.clone())
    return state


@pytest.mark.parametrize("doublings", [0, 20, 29, 40, 53])  # 2^63 - 1 values are the most
def test_ranks_stay_exact_for_huge_counts(doublings: int):
    """1000 values: 99.9 percent is rank 999 of 1000, and one step of 1e-7 more is the next."""
    x = torch.cat([torch.ones(998), torch.tensor([2.0, 3.0])])
    state = repeated(x, doublings)
    assert solve(state, 99.8)[1] == 1.0
    assert solve(state, 99.9)[1] == 2.0
    assert solve(state, 99.9000001)[1] == 3.0
    assert solve(state, 99.8000001)[1] == 2.0


@pytest.mark.parametrize("p", [28.9, 33.3, 57.1, 99.9, 99.99, 99.999, 99.9999])
def test_decimal_percentages_are_taken_as_written(p: float):
    """N = 1e6: in binary, 99.9 / 100 * N is not the integer that it is on paper."""
    k = round(p * 10**4)
    state = observed(torch.cat([torch.ones(k), torch.full((10**6 - k,), 2.0)]))
    assert solve(state, p)[1] == 1.0
    state = observed(torch.cat([torch.ones(k - 1), torch.full((10**6 - k + 1,), 2.0)]))
    assert solve(state, p)[1] == 2.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_hundred_percent_is_the_extremum_itself(symmetric: bool):
    x = torch.tensor([0.1, -0.30000001, 1e-3, 0.7000001] * 999)
    assert solve(observed(x), 100.0, symmetric) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("p", [1e-7, 50.0, 99.99, 100.0])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e-42, -1e-45, 0.0, 3.4028235e38])
def test_one_value_is_its_own_percentile(value: float, p: float, symmetric: bool):
    x = torch.tensor([value])
    assert solve(observed(x), p, symmetric) == (float(x), float(x))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("p", [1e-7, 99.99, 100.0])
def test_all_zero_and_all_tiny(p: float, symmetric: bool):
    assert solve(observed(torch.zeros(9)), p, symmetric) == (0, 0)
    x = torch.tensor([1e-40, -3e-40, 2e-45])
    assert solve(observed(x), p, symmetric) == (float(x.min()), float(x.max()))


def test_rank_among_zeros_or_tiny_is_the_bottom_of_the_window():
    x = torch.cat([torch.zeros(50), torch.full((49,), 1e-9), torch.tensor([100.0])])
    for p in (10.0, 50.0, 99.0):
        assert solve(observed(x), p) == (0.0, 2.0 ** (6 - 15))
    assert solve(observed(x), 100.0) == (0.0, 100.0)
    low = torch.cat([torch.zeros(99), torch.tensor([2.0**-120])])
    assert solve(observed(low), 50.0) == (0.0, 2.0**-126)


def test_affine_rank_among_zeros_is_zero_unless_both_are():
    x = torch.cat([torch.zeros(90), torch.full((10,), 4.0)])
    assert solve(observed(x), 95.0, symmetric=False) == (0.0, 4.0)
    assert solve(observed(x), 1.0, symmetric=False) == (0.0, 4.0)
    tiny = torch.cat([torch.full((98,), -1e-30), torch.tensor([-4.0, 8.0])])
    assert solve(observed(tiny), 50.0, symmetric=False) == (-4.0, 8.0)


def test_non_finite_values_have_no_rank():
    x = torch.cat([torch.ones(99), torch.tensor([2.0]), torch.full((500,), torch.inf)])
    x = torch.cat([x, torch.full((500,), torch.nan)])
    assert solve(observed(x), 99.0)[1] == 1.0
    assert solve(observed(x), 99.1)[1] == 2.0
