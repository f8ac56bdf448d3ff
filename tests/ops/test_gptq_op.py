"""The gptq op against its definition: each value fixed, the best of the rest computed anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptq_definition import by_definition, hessian
from torch_ext import ops
from torch_ext.correction.rounding.round_by_gptq import inverse_factor, round_by_gptq
from torch_ext.correction.rounding.row_problem import RowProblem, damped, fitted_target
from torch_ext.ops.grid_text import grid_text

F64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("groups", "rows", "inputs"), [(1, 7, 5), (3, 4, 20), (1, 18, 70)])
def test_levels_are_those_of_the_definition(
    groups: int, rows: int, inputs: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(groups, rows, inputs, generator=generator).to(dtype)
    scale = (torch.rand(groups, rows, 1, generator=generator) * 0.2 + 0.1).expand(weight.shape)
    zero_point = torch.randint(0, 4, (groups, rows, 1), generator=generator, dtype=torch.int32)
    zero_point = zero_point.expand(weight.shape)
    h = hessian(groups, inputs)
    have = ops.gptq(weight, inverse_factor(h), scale, zero_point, 0, 15)
    levels = (have / scale).round().long() + zero_point
    differ = 0
    for g in range(groups):
        for r in range(rows):
            want = by_definition(
                weight[g, r].numpy(),
                h[g].numpy(),
                float(scale[g, r, 0]),
                int(zero_point[g, r, 0]),
                0,
                15,
            )
            differ += int((levels[g, r].numpy() != want).sum())
    assert differ == 0
    assert torch.equal(have, ((levels - zero_point) * scale.double()).to(dtype))


def test_the_factor_is_of_the_inverse() -> None:
    h = hessian(2, 30)
    factor = inverse_factor(h)
    assert torch.equal(factor, factor.triu())
    identity = factor.mT @ factor @ h
    assert torch.allclose(identity, torch.eye(30, dtype=F64), atol=1e-8)


def problem(rows: int, inputs: int, groups: int = 1, grid: tuple[int, int] = (-4, 3)) -> RowProblem:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(groups, rows, inputs, generator=generator)
    scale = weight.abs().amax(-1, keepdim=True).expand(weight.shape) * (2 / (grid[1] - grid[0]))
    zero_point = torch.zeros(weight.shape, dtype=torch.int32)
    nearest = ((weight / scale).round().clamp(*grid)) * scale
    h = hessian(groups, inputs, seed=3)
    return RowProblem(
        weight, weight.double(), nearest, scale, zero_point, grid_text(*grid), h, 0.01
    )


def test_a_grid_per_value_and_strides() -> None:
    """Scales and zero points of any strides are those of the values that they stand at."""
    p = problem(5, 12)
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(1, 12, 5, generator=generator).mT + 0.1
    zero_point = torch.randint(-3, 3, (1, 12, 5), generator=generator, dtype=torch.int32).mT
    factor = inverse_factor(p.hessian)
    have = ops.gptq(p.weight, factor, scale, zero_point, -4, 3)
    want = ops.gptq(p.weight, factor, scale.contiguous(), zero_point.contiguous(), -4, 3)
    assert torch.equal(have, want)
    by_row = [
        ops.gptq(*(t[:, r : r + 1] if t is not factor else t for t in given), -4, 3)
        for r in range(5)
        for given in [(p.weight, factor, scale, zero_point)]
    ]
    assert torch.equal(have, torch.cat(by_row, 1))


@pytest.mark.parametrize("activation_order", [False, True])
def test_no_row_costs_more_than_nearest_and_most_cost_less(activation_order: bool) -> None:
    p = problem(60, 30)
    values = round_by_gptq(p, activation_order)
    cost, nearest = p.cost(values), p.cost(p.nearest)
    assert bool((cost <= nearest).all())
    assert float(cost.sum()) < 0.6 * float(nearest.sum())
    levels = values / p.scale
    assert torch.allclose(levels, levels.round(), atol=1e-5)
    assert bool((levels.round() >= -4).all())
    assert bool((levels.round() <= 3).all())


def test_the_order_of_inputs_is_only_an_order() -> None:
    """Inputs handed over in the order of their power give the same values without the option."""
    p = problem(6, 17)
    order = damped(p.hessian, 0.01).diagonal(dim1=1, dim2=2)[0].argsort(descending=True)
    sorted_ = RowProblem(
        *(t[..., order] for t in p[:5]), p.grid, p.hessian[:, order][:, :, order], p.damping
    )
    have = round_by_gptq(p, True)[..., order]
    assert torch.equal(have, round_by_gptq(sorted_, False))


def test_dead_inputs_are_rounded_to_nearest_and_change_nothing() -> None:
    p = problem(8, 12)
    dead = [0, 5, 11]
    h = p.hessian.clone()
    h[:, dead] = 0
    h[:, :, dead] = 0
    p = p._replace(hessian=h)
    values = round_by_gptq(p, False)
    assert torch.equal(values[..., dead], p.nearest[..., dead])
    assert bool(values.isfinite().all())
    nothing = p._replace(hessian=torch.zeros_like(h))
    assert torch.equal(round_by_gptq(nothing, True), p.nearest)


def test_the_fitted_target_is_the_least_squares_solution() -> None:
    random = np.random.default_rng(0)
    seen = random.normal(size=(200, 9)) @ random.normal(size=(9, 9))
    meant = seen + random.normal(size=(200, 9)) * 0.3
    weight = random.normal(size=(4, 9))
    outputs = meant @ weight.T
    want = np.linalg.lstsq(seen, outputs, rcond=None)[0].T
    h, wanted = torch.from_numpy(seen.T @ seen)[None], torch.from_numpy(outputs.T @ seen)[None]
    given = torch.from_numpy(weight).float()[None]
    have = fitted_target(given, h, wanted, 1e-12)[0]
    assert np.allclose(have.numpy(), want, atol=1e-5)
    # The more damping, the nearer to the weight.
    strong = fitted_target(given, h, wanted, 1e9)
    assert torch.allclose(strong, given.double(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "format_"),
    [("float8_e4m3", torch.float8_e4m3fn), ("float8_e5m2", torch.float8_e5m2)],
)
def test_float_formats_by_the_definition(name: str, format_: torch.dtype) -> None:
    """Each value cast by torch, and the values behind it moved to where the cost is least."""
    largest = torch.finfo(format_).max
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(1, 5, 16, generator=generator)
    scale = (torch.rand(1, 5, 1, generator=generator) * 1e-3 + 2e-4).expand(weight.shape)
    h = hessian(1, 16, seed=5)
    zeros = torch.zeros(weight.shape, dtype=torch.int32)
    have = ops.gptq(weight, inverse_factor(h), scale, zeros, grid=name)
    for r in range(5):
        w = weight[0, r].double().numpy().copy()
        for j in range(16):
            value = torch.tensor(w[j]).float() / scale[0, r, j]
            value = value.clamp(-largest, largest).to(format_).float() * scale[0, r, j]
            assert float(have[0, r, j]) == float(value), (r, j)
            inverse = np.linalg.inv(h[0].numpy()[j:, j:])
            w[j:] -= (w[j] - float(value)) * inverse[:, 0] / inverse[0, 0]


def test_a_zero_point_on_a_float_format_is_refused() -> None:
    weight = torch.ones(1, 1, 2)
    one = torch.ones(1, 1, 2, dtype=torch.int32)
    message = "gptq: expected zero_point to be 0 on a float format, got 1"
    with pytest.raises(RuntimeError, match=message):
        ops.gptq(weight, torch.eye(2, dtype=F64)[None], weight, one, grid="float8_e4m3")
