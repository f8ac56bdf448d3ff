"""Laws that hold for every rule of the registry, whatever it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_ext
from expected_ranges import SEARCHING
from sample_data import sample
from sample_grids import GRIDS, grid_arguments
from statistic_tensors import State, empty_state, observed
from torch_ext import ops

RULES = torch_ext.observers()
WITH_DATA = [r for r in RULES if r != "fixed_scale"]
MIXED = ["gauss", "relu", "shifted", "outlier", "sparse", "lattice", "negative"]
# float32 values and scales that stay normal when multiplied by 2^-20 .. 2^20.
ordinary = st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-20)


def solve(rule: str, state: State, grid: str, **options: Any) -> Tensor:
    return ops.solve(rule, *state, **grid_arguments(GRIDS[grid]), **options)


def scaled_options(rule: str, factor: float) -> dict[str, float]:
    """Options in the units of the data grow with it."""
    if rule == "clip":
        return {"xmin": -0.75 * factor, "xmax": 1.5 * factor}
    return {"scale": 0.5 * factor} if rule == "fixed_scale" else {}


@pytest.mark.parametrize("j", [-60, -3, 1, 20, 64])
@pytest.mark.parametrize("rule", RULES)
def test_scaling_the_data_by_a_power_of_two_scales_the_range_exactly(rule: str, j: int):
    grids = ["int8", "uint8", "uint4_affine"]
    for kind in MIXED:
        x = sample(kind, 500)
        one, other = observed(x), observed(x * 2.0**j)
        for grid in grids:
            want = solve(rule, one, grid, **scaled_options(rule, 1.0)) * 2.0**j
            have = solve(rule, other, grid, **scaled_options(rule, 2.0**j))
            assert torch.equal(have, want), (kind, grid)


@settings(max_examples=25)
@given(values=st.lists(ordinary, min_size=1, max_size=30), j=st.integers(-20, 20))
@pytest.mark.parametrize("rule", WITH_DATA)
def test_scaling_law_on_few_odd_values(rule: str, values: list[float], j: int):
    x = torch.tensor(values)
    for grid in ("int8", "uint8_affine"):
        want = solve(rule, observed(x), grid, **scaled_options(rule, 1.0)) * 2.0**j
        have = solve(rule, observed(x * 2.0**j), grid, **scaled_options(rule, 2.0**j))
        assert torch.equal(have, want)


@settings(max_examples=40)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30))
@pytest.mark.parametrize("rule", [r for r in WITH_DATA if r not in ("clip", "mean_abs")])
def test_range_lies_between_zero_and_the_extrema(rule: str, values: list[float]):
    """A threshold may lie nearer to 0 than all values, but nothing lies beyond them."""
    x = torch.tensor([0.0, *values])
    state = observed(x[1:])
    options = {"percentile": 30.0} if rule == "percentile" else {}
    for grid in GRIDS:
        have = solve(rule, state, grid, **options)
        assert x.min() <= have[0, 0] <= have[0, 1] <= x.max(), grid


@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_one_tensor_op_is_observe_then_solve(rule: str, axis: int):
    x = torch.stack([sample(kind, 96).reshape(6, 16) for kind in MIXED], 1)
    state = observed(x, axis)
    for grid in GRIDS.values():
        have = getattr(ops, rule)(x, grid.quant_min, grid.quant_max, grid.symmetric, axis)
        want = ops.solve(rule, *state, grid.quant_min, grid.quant_max, grid.symmetric)
        assert torch.equal(have, want), grid


def test_one_tensor_op_takes_the_options_of_its_rule():
    x = sample("gauss", 1000)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("percentile", {"percentile": 90.0}),
        ("clip", {"xmin": -0.5, "xmax": 0.25}),
        ("clip_std", {"std_scale": 1.0}),
        ("kl", {"variant": "modelopt"}),
        ("fixed_scale", {"scale": 0.25}),
    ]
    for rule, options in cases:
        have = getattr(ops, rule)(x, **options)
        assert torch.equal(have, solve(rule, observed(x), "int8", **options)), rule
        assert not torch.equal(have, getattr(ops, rule)(x)), rule


def whole_model() -> tuple[list[str], list[State], list[str]]:
    """Every rule on several statistics, per tensor, per channel, unobserved, on several grids."""
    states = [observed(sample(kind, 400)) for kind in MIXED]
    states += [observed(torch.stack([sample(kind, 300) for kind in MIXED]), 0), empty_state(2)]
    grids = [g for g in GRIDS if g not in ("uint4", "int8_narrow")]
    jobs = [(r, s, g) for r in RULES for s in states for g in grids]
    rules, chosen, names = zip(*jobs, strict=True)
    return list(rules), list(chosen), list(names)


def solve_many(rules: list[str], states: list[State], grids: list[str]) -> Any:
    chosen = [GRIDS[g] for g in grids]
    return ops.solve_many(
        rules,
        [s.extrema for s in states],
        [s.tally for s in states],
        [s.counts for s in states],
        [g.quant_min for g in chosen],
        [g.quant_max for g in chosen],
        [g.symmetric for g in chosen],
    )


def test_solving_a_whole_model_is_solving_one_by_one_at_any_thread_count():
    rules, states, grids = whole_model()
    single = [solve(r, s, g) for r, s, g in zip(rules, states, grids, strict=True)]
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        ranges, scales, zero_points = solve_many(rules, states, grids)
        for i, want in enumerate(single):
            case = (threads, rules[i], grids[i])
            assert torch.equal(ranges[i], want), case
            if rules[i] == "fixed_scale":
                assert scales[i].unique().tolist() == [1.0], case
                continue
            grid = GRIDS[grids[i]]
            scale, zero_point = ops.qparams(want, grid.quant_min, grid.quant_max, grid.symmetric)
            assert torch.equal(zero_points[i], zero_point), case
            assert torch.equal(scales[i], scale), case


@pytest.mark.parametrize("rule", SEARCHING)
def test_search_is_the_same_at_any_thread_count(rule: str):
    states = [observed(sample(kind, 5000)) for kind in MIXED]
    torch.set_num_threads(1)
    want = [solve(rule, s, "int8") for s in states]
    for threads in range(2, 9):
        torch.set_num_threads(threads)
        for state, one in zip(states, want, strict=True):
            assert torch.equal(solve(rule, state, "int8"), one)


@pytest.mark.parametrize("rule", RULES)
def test_solving_leaves_the_statistic_alone(rule: str):
    state = observed(sample("gauss", 1000))
    before = state.clone()
    solve(rule, state, "int8")
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_any_split_of_the_data_gives_the_same_range(rule: str):
    x = torch.cat([sample(kind, 700) for kind in MIXED])
    want = solve(rule, observed(x), "int8")
    for size in (1, 7, 64):
        state = empty_state()
        for part in x[torch.randperm(x.numel())].split(size):
            ops.observe_(part, *state)
        assert torch.equal(solve(rule, state, "int8"), want)
