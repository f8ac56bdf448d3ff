"""Every rule of the registry against the reference, per tensor and per channel, on all grids."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_ext
from expected_ranges import SEARCHING, assert_ranges
from reference import Grid
from sample_data import KINDS, sample
from sample_grids import GRIDS, grid_arguments
from statistic_tensors import State, empty_state, observed
from torch_ext import ops

RULES = torch_ext.observers()
CLOSED = [r for r in RULES if r not in SEARCHING]
COUNT = 3000


def solve(rule: str, state: State, grid: Grid, **options: Any) -> Tensor:
    return ops.solve(rule, *state, **grid_arguments(grid), **options)


@functools.cache
def statistic(kind: str) -> tuple[Tensor, State]:
    x = sample(kind, COUNT)
    return x, observed(x)


@functools.cache
def channel_statistic(seed: int) -> tuple[list[Tensor], State]:
    channels = [sample(kind, 600, seed) for kind in KINDS]
    return channels, observed(torch.stack(channels), 0)


def test_registry_is_the_documented_one():
    assert set(RULES) == {
        *("min_max", "fixed_scale", "clip", "percentile", "clip_std", "kl", "mse", "mix", "aciq"),
        "mean_abs",
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("rule", CLOSED)
def test_closed_rule(rule: str, grid: str, kind: str):
    x, state = statistic(kind)
    assert_ranges(rule, solve(rule, state, GRIDS[grid]), [x], state, GRIDS[grid])


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("grid", ["int8", "int4", "uint8", "uint4_affine", "int8_affine"])
@pytest.mark.parametrize("rule", SEARCHING)
def test_searching_rule(rule: str, grid: str, kind: str):
    x, state = statistic(kind)
    assert_ranges(rule, solve(rule, state, GRIDS[grid]), [x], state, GRIDS[grid])


@pytest.mark.parametrize("grid", ["int8_narrow", "uint8_affine", "int4"])
@pytest.mark.parametrize("rule", RULES)
def test_per_channel(rule: str, grid: str):
    channels, state = channel_statistic(1)
    assert_ranges(rule, solve(rule, state, GRIDS[grid]), channels, state, GRIDS[grid])


@pytest.mark.parametrize("kind", ["gauss", "relu", "shifted", "outlier"])
@pytest.mark.parametrize(
    "grid",
    [
        Grid(scale_rule="tvm"),
        Grid(power_of_two=True),
        Grid(-8, 7, scale_rule="tvm", power_of_two=True),
        Grid(0, 255, symmetric=False, power_of_two=True),
        Grid(-7, 7),
        Grid(-2, 1),
        Grid(0, 3, symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", SEARCHING)
def test_search_uses_the_qparams_of_the_grid(rule: str, grid: Grid, kind: str):
    x, state = statistic(kind)
    assert_ranges(rule, solve(rule, state, grid), [x], state, grid)


few = st.one_of(
    st.lists(st.integers(-40, 40).map(lambda i: i / 8), min_size=1, max_size=40),
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=30),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
)


@settings(max_examples=15)
@given(values=few)
@pytest.mark.parametrize("rule", [r for r in RULES if r != "fixed_scale"])
def test_few_odd_values(rule: str, values: list[float]):
    x = torch.tensor(values)
    state = observed(x)
    for grid in (GRIDS["int8"], GRIDS["int4"], GRIDS["uint8"], GRIDS["uint4_affine"]):
        assert_ranges(rule, solve(rule, state, grid), [x], state, grid)


def test_deviation_is_about_the_mean_of_the_bins():
    """In 5-bit bins 1.859375 leans to 1.84375, so the mean is clamped; the deviation is not."""
    x = torch.tensor([1.859375] * 11 + [2.0])
    state = observed(x, mantissa_bits=5, octaves=4)
    for grid in (GRIDS["int8"], GRIDS["int8_affine"]):
        assert_ranges("clip_std", solve("clip_std", state, grid), [x], state, grid)


def test_mix_tries_min_max_too():
    """Two values among 2.1e6 zeros: below every percentile, and too few for a divergence."""
    x = torch.cat([torch.zeros(2_100_000), torch.tensor([1.0, 8.0])])
    for grid in (GRIDS["int8"], GRIDS["uint8_affine"]):
        assert solve("mix", observed(x), grid).tolist() == [[0.0, 8.0]]


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("clip", {"xmin": -0.5, "xmax": 0.25}),
    ("clip", {"xmin": 0.1, "xmax": 0.2}),
    ("clip", {"xmin": -100.0, "xmax": 100.0}),
    ("clip_std", {"std_scale": 0.5}),
    ("clip_std", {"std_scale": 100.0}),
    ("fixed_scale", {"scale": 0.125, "zero_point": 0}),
    *(("percentile", {"percentile": p}) for p in (1e-7, 1.0, 50.0, 99.0, 99.9, 99.9999999, 100.0)),
]


@pytest.mark.parametrize("kind", ["gauss", "relu", "shifted", "negative", "sparse", "lattice"])
@pytest.mark.parametrize("grid", ["int8", "uint8_affine"])
@pytest.mark.parametrize(("rule", "options"), OPTIONS, ids=str)
def test_options(rule: str, options: dict[str, Any], grid: str, kind: str):
    x, state = statistic(kind)
    have = solve(rule, state, GRIDS[grid], **options)
    assert_ranges(rule, have, [x], state, GRIDS[grid], **options)


@pytest.mark.parametrize("layout", [(5, 4), (6, 8), (8, 32), (10, 5)], ids=str)
@pytest.mark.parametrize("kind", ["gauss", "two_scales", "relu"])
@pytest.mark.parametrize("rule", [r for r in RULES if r != "fixed_scale"])
def test_other_histogram_layouts(rule: str, kind: str, layout: tuple[int, int]):
    x = sample(kind, 800)
    state = observed(x, mantissa_bits=layout[0], octaves=layout[1])
    for grid in (GRIDS["int8"], GRIDS["uint4_affine"]):
        assert_ranges(rule, solve(rule, state, grid), [x], state, grid)


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("rule", RULES)
def test_unobserved_and_unseen_channels_have_no_range(rule: str, grid: str):
    state = empty_state(3)
    ops.observe_(torch.tensor([[1.0, -2.0], [torch.nan, torch.inf]]), *state_rows(state, 0, 2), 0)
    have = solve(rule, state, GRIDS[grid])
    x = torch.tensor([1.0, -2.0])
    channels = [x, torch.tensor([torch.nan, torch.inf]), torch.empty(0)]
    assert_ranges(rule, have, channels, state, GRIDS[grid])


def state_rows(state: State, first: int, last: int) -> State:
    return State(*(t[first:last] for t in state))


@pytest.mark.parametrize("rule", SEARCHING)
@pytest.mark.parametrize("grid", [Grid(-256, 255), Grid(-32768, 32767), Grid(0, 256)], ids=str)
def test_search_refuses_more_than_8_bits(rule: str, grid: Grid):
    _, state = statistic("gauss")
    with pytest.raises(RuntimeError, match=r"(?s)expected .*8 bits.*, got ") as raised:
        solve(rule, state, grid)
    assert rule in str(raised.value)
    with pytest.raises(RuntimeError, match="8 bits"):
        getattr(ops, rule)(sample("gauss", 10), grid.quant_min, grid.quant_max)


@pytest.mark.parametrize("rule", CLOSED)
def test_closed_rules_take_16_bits(rule: str):
    x, state = statistic("shifted")
    for grid in (Grid(-32768, 32767), Grid(0, 65535, symmetric=False)):
        assert_ranges(rule, solve(rule, state, grid), [x], state, grid)


def test_wrong_rule_is_noticed():
    """The comparison fails for the range of another rule, or one lattice step away."""
    x, state = statistic("gauss")
    have = solve("mse", state, GRIDS["int4"])
    assert_ranges("mse", have, [x], state, GRIDS["int4"])
    for wrong in (have * (129 / 128), solve("kl", state, GRIDS["int8"]), have + 1e-6):
        with pytest.raises(AssertionError):
            assert_ranges("mse", wrong, [x], state, GRIDS["int4"])
