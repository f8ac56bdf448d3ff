"""Learned rounding against every way to round a few values down or up."""

from __future__ import annotations

import itertools

import torch

from torch_ext.correction.rounding.round_by_adaround import round_by_adaround
from torch_ext.correction.rounding.row_problem import RowProblem
from torch_ext.ops.grid_text import grid_text

GRID = (-8, 7)


def problem(rows: int, inputs: int) -> RowProblem:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, rows, inputs, generator=generator)
    scale = weight.abs().amax(-1, keepdim=True).expand(weight.shape) / 7.5
    nearest = (weight / scale).round().clamp(*GRID) * scale
    seen = torch.randn(200, inputs, generator=generator).double().relu()
    zero_point = torch.zeros(weight.shape, dtype=torch.int32)
    target = weight.double() + 0.02 * torch.randn(weight.shape, generator=generator)
    return RowProblem(
        weight, target, nearest, scale, zero_point, grid_text(*GRID), (seen.T @ seen)[None], 0.01
    )


def test_it_comes_near_the_best_of_all_ways_and_is_never_worse_than_nearest() -> None:
    p = problem(50, 8)
    values = round_by_adaround(p, GRID, 1000)
    levels = values / p.scale
    assert torch.allclose(levels, levels.round(), atol=1e-5)
    assert bool((levels.round() >= GRID[0]).all() & (levels.round() <= GRID[1]).all())
    below = (p.target / p.scale).floor().clamp(*GRID)
    costs = []
    for ups in itertools.product((0, 1), repeat=8):
        way = (below + torch.tensor(ups)).clamp(*GRID).float() * p.scale
        costs.append(p.cost(way))
    best = torch.stack(costs).amin(0)
    have, nearest = p.cost(values), p.cost(p.nearest)
    assert bool((have <= nearest).all())
    assert bool((have >= best * (1 - 1e-6)).all())
    assert float(best.sum()) < float(have.sum()) < 1.25 * float(best.sum())
    assert float(have.sum()) < 0.8 * float(nearest.sum())


def test_it_is_deterministic_and_leaves_what_costs_nothing() -> None:
    p = problem(6, 12)
    assert torch.equal(round_by_adaround(p, GRID, 50), round_by_adaround(p, GRID, 50))
    free = p._replace(hessian=torch.zeros_like(p.hessian))
    assert torch.equal(round_by_adaround(free, GRID, 50), p.nearest)
    exact = p._replace(weight=p.nearest, target=p.nearest.double())
    assert torch.equal(round_by_adaround(exact, GRID, 50), p.nearest)


def test_the_more_damping_the_nearer_to_nearest() -> None:
    p = problem(20, 8)
    p = p._replace(target=p.weight.double())
    changed = [
        float((round_by_adaround(p._replace(damping=d), GRID, 300) != p.nearest).double().mean())
        for d in (0.01, 3.0, 1000.0)
    ]
    assert changed[0] > 0.05
    assert changed[0] > changed[1] >= changed[2]
    assert changed[2] < changed[0] / 3  # values that are as near to two numbers
