"""The search for widths, against all assignments."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from torch_ext.correction.widths.bit_search import BitCosts, BitSearch

WIDTHS = (4.0, 8.0, 16.0)
# How much worse than the best assignment the search may be.
FACTOR = 1.05


class Case:
    """Random sizes and products of n units, and losses that fall with the width."""

    def __init__(self, count: int, seed: int, products: bool) -> None:
        rng = np.random.default_rng(seed)
        self.count = count
        self.terms: list[tuple[float, tuple[int, ...]]] = [
            (float(rng.integers(1, 100)), (i,)) for i in range(count)
        ]
        if products:
            self.terms = [
                (float(rng.integers(1, 100)), tuple(rng.integers(0, count, 2).tolist()))
                for _ in range(2 * count)
            ] + [(float(rng.integers(1, 100)), ())]
        self.losses = [
            sorted(np.exp(rng.normal(0, 3, len(WIDTHS))), reverse=True) for _ in range(count)
        ]
        self.costs = BitCosts(count)
        for amount, units in self.terms:
            self.costs.add(amount, units)

    def cost(self, options: Sequence[int]) -> float:
        return sum(
            amount * float(np.prod([WIDTHS[options[unit]] for unit in units]))
            for amount, units in self.terms
        )

    def loss(self, options: Sequence[int]) -> float:
        return sum(row[option] for row, option in zip(self.losses, options, strict=True))

    def search(self) -> BitSearch:
        return BitSearch(self.costs, [WIDTHS] * self.count, self.losses)


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_near_the_best_of_all_assignments(seed: int, products: bool) -> None:
    case = Case(6, seed, products)
    every = list(itertools.product(range(len(WIDTHS)), repeat=case.count))
    costs = [case.cost(options) for options in every]
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        budget = min(costs) + share * (max(costs) - min(costs))
        found = case.search().within(budget)
        assert case.cost(found.options) <= budget
        best = min(
            case.loss(options) for options, cost in zip(every, costs, strict=True) if cost <= budget
        )
        assert case.loss(found.options) <= FACTOR * best, share


@pytest.mark.parametrize("products", [False, True])
def test_the_cost_is_the_sum_of_its_terms(products: bool) -> None:
    case = Case(5, 7, products)
    rng = np.random.default_rng(1)
    for _ in range(50):
        options = rng.integers(0, len(WIDTHS), case.count).tolist()
        widths = np.array([WIDTHS[option] for option in options])
        assert case.costs.total(widths) == case.cost(options)
        unit = int(rng.integers(case.count))
        new = widths.copy()
        new[unit] = 8.0
        change = case.costs.changes(widths, np.array([unit]), np.array([8.0]))
        assert change[0] == case.costs.total(new) - case.costs.total(widths)


def test_the_curve_goes_from_the_most_bits_to_the_fewest() -> None:
    case = Case(6, 3, True)
    curve = case.search().within(1e9).curve
    most, fewest = [len(WIDTHS) - 1] * case.count, [0] * case.count
    assert (curve[0].cost, curve[-1].cost) == (case.cost(most), case.cost(fewest))
    assert curve[0].loss == pytest.approx(case.loss(most))
    assert curve[-1].loss == pytest.approx(case.loss(fewest))
    costs = [point.cost for point in curve]
    assert costs == sorted(costs, reverse=True)


def test_one_unit_and_one_option() -> None:
    costs = BitCosts(1)
    costs.add(2.0, (0,))
    assert BitSearch(costs, [(8.0,)], [[0.5]]).within(16.0).options == [0]
    assert BitSearch(costs, [(4.0, 8.0)], [[0.5, 0.1]]).within(15.9).options == [0]
    assert BitSearch(costs, [(4.0, 8.0)], [[0.5, 0.1]]).within(16.0).options == [1]


def test_more_bits_that_are_worse_are_not_taken() -> None:
    costs = BitCosts(2)
    costs.add(1.0, (0,))
    costs.add(1.0, (1,))
    found = BitSearch(costs, [(4.0, 8.0)] * 2, [[0.1, 0.2], [0.3, 0.1]]).within(100.0)
    assert found.options == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_breaks_the_model_is_the_last_resort(bad: float) -> None:
    costs = BitCosts(3)
    for unit in range(3):
        costs.add(1.0, (unit,))
    losses = [[0.1, 0.0], [bad, 0.0], [5.0, 0.0]]
    search = BitSearch(costs, [(4.0, 8.0)] * 3, losses)
    assert search.within(16.0).options == [0, 1, 0]
    assert search.within(12.0).options == [0, 0, 0]


def test_many_units() -> None:
    case = Case(400, 5, True)
    most = case.cost([2] * case.count)
    found = case.search().within(0.2 * most)
    assert case.cost(found.options) <= 0.2 * most
    # No single exchange is left that fits and lowers the loss.
    widths = np.array([WIDTHS[option] for option in found.options])
    for unit in range(case.count):
        for option, width in enumerate(WIDTHS):
            new = widths.copy()
            new[unit] = width
            gain = case.losses[unit][found.options[unit]] - case.losses[unit][option]
            assert case.costs.total(new) > 0.2 * most or gain <= 1e-9
