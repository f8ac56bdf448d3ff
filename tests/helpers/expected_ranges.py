"""Whether a range is the one the reference finds; searches may differ where two candidates tie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

import reference
from reference import Bounds, Grid, View
from reference.rules import aciq_ranges, mix_ranges
from statistic_tensors import State, plain

SEARCHING = ["kl", "mse", "mix", "aciq"]  # rules that search a threshold
EXACT = {"min_max", "fixed_scale", "clip", "percentile"}
OBJECTIVES = {"kl": reference.kl_objective, "mse": reference.mse_objective}
# Errors the reference cannot tell apart: float64 noise, far below any difference of rules.
TIE = 1e-9
FLT_MAX = float(np.finfo(np.float32).max)


def assert_range(rule: str, have: Bounds, view: View, grid: Grid, **options: Any) -> None:
    """`have` is the rule's range for this view, up to the rounding to float32 and to ties."""
    if view.total == 0 and rule != "fixed_scale":
        assert have == (0, 0)
    elif rule in EXACT:
        want = reference.RULES[rule](view, grid, **options)
        assert have == tuple(float(np.float32(v)) for v in want)
    elif rule in OBJECTIVES:
        assert_searched(rule, have, view, grid)
    elif rule == "clip_std":
        assert_close(have, reference.RULES[rule](view, grid, **options), view)
    elif rule == "mean_abs":
        want = np.clip(reference.RULES[rule](view, grid), -FLT_MAX, FLT_MAX)
        np.testing.assert_allclose(have, want, rtol=1e-6)
    elif rule in ("mix", "aciq"):
        ranges = mix_ranges(view, grid) if rule == "mix" else aciq_ranges(view, grid)
        assert_least(have, ranges, view, grid)
    else:
        raise AssertionError(f'the reference does not know rule "{rule}"')


def assert_close(have: Bounds, want: Bounds, view: View) -> None:
    """Equal but for a few float32 roundings of the largest value."""
    np.testing.assert_allclose(have, want, rtol=0, atol=2e-6 * view.magnitude)


def assert_searched(rule: str, have: Bounds, view: View, grid: Grid) -> None:
    thresholds = reference.candidates(view)
    objective = OBJECTIVES[rule](view, thresholds, grid)
    best = reference.least_threshold(view, thresholds, objective)
    if have == reference.threshold_range(view, best):
        return
    at = np.searchsorted(thresholds, max(-have[0], have[1]))
    on_lattice = (
        have == reference.threshold_range(view, float(t)) for t in thresholds[at : at + 1]
    )
    assert any(on_lattice), f"{have} is no candidate; the best is {best}"
    excess = float(objective[at] - objective.min())
    assert excess <= TIE * abs(float(objective.min())) + 1e-12, f"{have}, best {best}: +{excess}"


def assert_least(have: Bounds, ranges: Sequence[Bounds], view: View, grid: Grid) -> None:
    """`have` is one of the ranges, and none has less squared error."""
    errors = np.array([reference.squared_error(view, *r, grid) for r in ranges])
    near = [np.allclose(have, r, rtol=0, atol=2e-6 * view.magnitude) for r in ranges]
    assert any(near), f"{have} is none of {ranges}"
    excess = errors[near].min() - errors.min()
    assert excess <= TIE * errors.min() + 1e-12, f"{have} of {ranges}: +{excess}"


def assert_ranges(
    rule: str, have: Tensor, channels: Sequence[Tensor], state: State, grid: Grid, **options: Any
) -> None:
    """Row c of `have` is the range of channels[c], in the histogram layout of `state`."""
    assert have.shape == (len(channels), 2)
    for row, values in zip(have.tolist(), channels, strict=True):
        assert_range(rule, (row[0], row[1]), View(plain(values, state)), grid, **options)
