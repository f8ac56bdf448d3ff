"""Ranges, scales and zero points solved on the device are the CPU's, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_ext
from devices import assert_same_bits
from expected_ranges import SEARCHING
from input_zoo import FLOAT_MAX, LEAST_NORMAL, ZOO
from sample_data import DTYPES, sample
from sample_grids import GRIDS, grid_arguments
from statistic_tensors import State, empty_state, observed
from torch_ext import ops

RULES = torch_ext.observers()
KINDS = ["heavy", "relu", "negative", "outlier", "sparse", "lattice", "two_scales", "huge", "small"]
VARIANTS = torch_ext._C.observer_info("kl")["options"][0]["choices"]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "percentile": [{"percentile": p} for p in (1e-7, 50.0, 99.0, 99.9999999, 100.0)],
    "clip": [{"xmin": -0.5, "xmax": 0.25}, {"xmin": 0.0, "xmax": 6.0}],
    "clip_std": [{"std_scale": s} for s in (0.01, 0.5, 6.0)],
    "kl": [{"variant": v} for v in VARIANTS],
    "fixed_scale": [{"scale": 0.25}, {"scale": 0.1, "zero_point": 7.0}],
}
GRID_OPTIONS = [{"scale_rule": "tvm"}, {"power_of_two": True}]


def states() -> dict[str, State]:
    """Of every kind of data, in several layouts, unobserved too."""
    found = {kind: observed(sample(kind, 4000)) for kind in KINDS}
    found |= {f"zoo {kind}": observed(ZOO[kind](1501)) for kind in ZOO}
    found |= {f"one {v}": observed(torch.tensor([v])) for v in (0.0, -1.5, 1e-45, FLOAT_MAX)}
    found["wide"] = observed(ZOO["spread"](900), octaves=32)
    found["coarse"] = observed(sample("gauss", 900), mantissa_bits=5, octaves=4)
    found["empty"] = empty_state()
    rows = torch.stack([sample(kind, 500) for kind in KINDS] + [torch.zeros(500)])
    rows[3] = torch.nan
    found["channels"] = observed(rows, 0)
    return found


STATES = states()


def solve_all(rule: str, chosen: list[State], grid: str, options: dict[str, Any]) -> Any:
    g, n = grid_arguments(GRIDS[grid]), len(chosen)
    return ops.solve_many(
        [rule] * n,
        [s.extrema for s in chosen],
        [s.tally for s in chosen],
        [s.counts for s in chosen],
        *([g[key]] * n for key in ("quant_min", "quant_max", "symmetric")),
        options=[options] * n,
    )


def fits(rule: str, options: dict[str, Any], state: State) -> bool:
    """The linear view of kl's variants needs more octaves than mantissa bits."""
    linear = options.get("variant", "log_linear") != "log_linear"
    bits = state.counts.shape[3].bit_length() - 1
    return not linear or state.counts.shape[2] > bits


@pytest.mark.sanitizer
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_once(rule: str, device: torch.device):
    chosen = [STATES[name] for name in ("heavy", "relu", "zoo mixed", "empty", "channels")]
    want = solve_all(rule, chosen, "int8", {})
    assert_same_bits(solve_all(rule, [s.to(device) for s in chosen], "int8", {}), want)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", RULES)
def test_rules_on_grids(rule: str, grid: str, device: torch.device):
    want = solve_all(rule, list(STATES.values()), grid, {})
    have = solve_all(rule, [s.to(device) for s in STATES.values()], grid, {})
    for kind, one, other in zip(("range", "scale", "zero_point"), have, want, strict=True):
        for name, mine, theirs in zip(STATES, one, other, strict=True):
            assert_same_bits(mine, theirs, kind, name)


CASES = [(rule, options) for rule, several in OPTIONS.items() for options in several]


@pytest.mark.parametrize("grid", ["int8", "uint4_affine", "uint8"])
@pytest.mark.parametrize(("rule", "options"), CASES, ids=lambda v: str(v))
def test_options(rule: str, options: dict[str, Any], grid: str, device: torch.device):
    if rule == "fixed_scale" and options.get("zero_point", 0) and GRIDS[grid].symmetric:
        grid = "int8_affine"
    named = {n: s for n, s in STATES.items() if fits(rule, options, s)}
    assert len(named) > 20
    want = solve_all(rule, list(named.values()), grid, options)
    have = solve_all(rule, [s.to(device) for s in named.values()], grid, options)
    for one, other in zip(have, want, strict=True):
        assert_same_bits(dict(zip(named, one, strict=True)), dict(zip(named, other, strict=True)))


@pytest.mark.parametrize("grid_options", GRID_OPTIONS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_rounded_scales_enter_the_search(
    rule: str, grid_options: dict[str, Any], device: torch.device
):
    for name, state in STATES.items():
        for low, high in ((-128, 127), (0, 15)):
            arguments: Any = (low, high, True)
            want = ops.solve(rule, *state, *arguments, **grid_options)
            have = ops.solve(rule, *state.to(device), *arguments, **grid_options)
            assert_same_bits(have, want, name, low)


def test_a_whole_model_in_one_call(device: torch.device):
    """Every rule beside every other one, more than 128 quantizers, of different layouts."""
    jobs = [(r, s, g) for r in RULES for s in STATES.values() for g in ("int8", "uint8_affine")]
    assert len(jobs) > 500

    def solved(where: torch.device | str) -> Any:
        moved = {id(s): s.to(where) for s in STATES.values()}
        chosen = [moved[id(s)] for _, s, _ in jobs]
        grids = [GRIDS[g] for *_, g in jobs]
        return ops.solve_many(
            [rule for rule, *_ in jobs],
            [s.extrema for s in chosen],
            [s.tally for s in chosen],
            [s.counts for s in chosen],
            [g.quant_min for g in grids],
            [g.quant_max for g in grids],
            [g.symmetric for g in grids],
        )

    assert_same_bits(solved(device), solved("cpu"))


@pytest.mark.parametrize("rule", SEARCHING)
def test_many_channels(rule: str, device: torch.device):
    x = (sample("gauss", 700 * 64).reshape(700, 64).t() * torch.linspace(1e-3, 9, 700)).t()
    state = observed(x, 0)
    for grid in ("int8", "uint4_affine"):
        arguments = grid_arguments(GRIDS[grid])
        want = ops.solve(rule, *state, **arguments)
        assert_same_bits(ops.solve(rule, *state.to(device), **arguments), want, grid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_rules_of_one_tensor(rule: str, dtype: torch.dtype, device: torch.device):
    function = getattr(ops, rule)
    x = ZOO["mixed"](1920).reshape(4, 6, 8, 10).to(dtype)
    views = (lambda t: t, lambda t: t.transpose(0, 3), lambda t: t[:, ::2, 1:, ::3])
    for view in views:
        for axis in range(-1, 4):
            want = function(view(x), ch_axis=axis)
            assert_same_bits(function(view(x.to(device)), ch_axis=axis), want, axis)
    for shape in ((0,), (), (3, 0)):
        values = torch.ones(shape, dtype=dtype)
        assert_same_bits(function(values.to(device)), function(values), shape)
    for options in OPTIONS.get(rule, []):
        keys: dict[str, Any] = {"quant_min": -8, "quant_max": 7, "symmetric": False, **options}
        assert_same_bits(function(x.to(device), **keys), function(x, **keys), options)


@pytest.mark.parametrize("rule", ["min_max", "percentile", "mse"])
def test_rules_take_a_large_weight_in_parts(rule: str, device: torch.device):
    """More channels than are observed at once."""
    x = sample("gauss", 1100 * 9).reshape(1100, 9)
    for view, axis in ((x, 0), (x.t(), 1), (x.t().contiguous(), 1)):
        want = getattr(ops, rule)(view, ch_axis=axis)
        assert_same_bits(getattr(ops, rule)(view.to(device), ch_axis=axis), want, axis)


def ranges() -> Tensor:
    ends = [0.0, 1e-45, LEAST_NORMAL, 1e-3, 0.5, 1.0, 127.5, 3e4, 1e30, FLOAT_MAX / 3, FLOAT_MAX]
    pairs = [(-a, b) for a in ends for b in ends]
    pairs += [(a, b) for a in ends for b in ends if a <= b] + [(-b, -a) for a in ends for b in ends]
    return torch.tensor([p for p in pairs if p[0] <= p[1]])


@pytest.mark.sanitizer
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("grid", [*GRIDS, "int16", "uint16_affine", "odd"])
def test_qparams(grid: str, power_of_two: bool, device: torch.device):
    more = {
        "int16": (-32768, 32767, True),
        "uint16_affine": (0, 65535, False),
        "odd": (-5, 9, False),
    }
    g = GRIDS.get(grid)
    low, high, symmetric = more[grid] if g is None else (g.quant_min, g.quant_max, g.symmetric)
    values = torch.cat([ranges(), torch.randn(5000, 1).abs() * torch.tensor([[-1.0, 3.0]])])
    for rule in ("grid", "tvm") if symmetric else ("grid",):
        want = ops.qparams(values, low, high, symmetric, rule, power_of_two)
        have = ops.qparams(values.to(device), low, high, symmetric, rule, power_of_two)
        assert_same_bits(have, want, rule)
    none = ops.qparams(torch.empty(0, 2, device=device), low, high, symmetric)
    assert [len(t) for t in none] == [0, 0]


def histograms(rows: int, bins: int, signed: bool) -> Tensor:
    """Gauss, Laplace, flat, sparse, one bin, none, few values, large counts, with holes."""
    random = np.random.default_rng([rows, bins])
    j = np.abs(np.arange(bins) - (bins // 2 if signed else 0))
    found = np.zeros((rows, bins))
    for row, into in enumerate(found):
        t = j / (bins * random.uniform(0.02, 0.6))
        size = 2 ** random.uniform(4, 34)
        into[:] = [
            size * np.exp(-(t**2)),
            size * np.exp(-3 * t),
            np.full(bins, 1000.0),
            np.where(random.random(bins) < 0.05, 100 * t + 1, 0),
            np.arange(bins) == random.integers(bins),
            np.zeros(bins),
            np.bincount(random.integers(bins, size=50), random.integers(1, 1000, 50), bins),
            size * np.exp(-2 * t) * random.random(bins),
            2 ** random.uniform(20, 36, bins),
            random.uniform(0, 3, bins),
        ][row % 10]
        into[-1] += row % 3 == 0 and row % 10 != 5
    return torch.from_numpy(found.astype(np.int64))


SHAPES = [(2, 2, 10), (7, 7, 10), (16, 101, 20), (64, 200, 20), (128, 2048, 20), (128, 8192, 3)]


@pytest.mark.parametrize("shape", [*SHAPES, (255, 8001, 3)], ids=str)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "log_linear"])
def test_kl_threshold(variant: str, shape: tuple[int, int, int], device: torch.device):
    levels, bins, rows = shape
    counts = histograms(rows, bins, variant in ("tvm", "onnxruntime"))
    width = torch.from_numpy(np.random.default_rng(0).uniform(1e-3, 2, rows))
    want = ops.kl_threshold(counts, width, levels, variant)
    assert_same_bits(ops.kl_threshold(counts.to(device), width.to(device), levels, variant), want)
    strided = counts.t().contiguous().to(device).t()
    assert_same_bits(ops.kl_threshold(strided, width.to(device), levels, variant), want)


@pytest.mark.sanitizer
def test_kl_threshold_once(device: torch.device):
    width = torch.ones(10, dtype=torch.float64)
    for variant in VARIANTS[1:]:
        counts = histograms(10, 201, variant in ("tvm", "onnxruntime"))
        want = ops.kl_threshold(counts, width, 16, variant)
        assert_same_bits(ops.kl_threshold(counts.to(device), width.to(device), 16, variant), want)
    none = ops.kl_threshold(
        torch.empty(0, 200, dtype=torch.int64, device=device), width[:0].to(device), 16
    )
    assert [len(t) for t in none] == [0, 0]
