"""Rounds a weight one input after the other; later inputs make up for the errors of earlier ones.

GPTQ: Frantar et al. 2022, arXiv 2210.17323, in blocks and by a Cholesky factor as there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ext import ops
from torch_ext.correction.rounding.row_problem import RowProblem, damped


def round_by_gptq(problem: RowProblem, activation_order: bool) -> Tensor:
    """The values of the grid, in the shape of the weight; no row costs more than the nearest ones.

    Args:
        problem: what is rounded, and what errors cost.
        activation_order: begin with the inputs of most power.
    """
    hessian = damped(problem.hessian, problem.damping)
    target = problem.target.to(problem.weight.dtype)
    scale, zero_point = problem.scale, problem.zero_point
    order = None
    if activation_order:
        order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        target, scale, zero_point = (_sorted(t, order) for t in (target, scale, zero_point))
        hessian = _sorted(_sorted(hessian, order).mT, order).mT
    values = ops.gptq(target, inverse_factor(hessian), scale, zero_point, grid=problem.grid)
    if order is not None:
        values = _sorted(values, order.argsort(dim=-1))
    return problem.better(values, problem.nearest)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper U with ``U.mT @ U`` the inverse of the Hessian [..., n, n].

    Of the Hessian read backwards, the Cholesky factor read backwards is upper with
    ``R @ R.mT = hessian``, so U is its inverse.
    """
    factor = torch.linalg.cholesky(hessian.flip(-1, -2)).flip(-1, -2)
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=True)
    return inverse


def _sorted(rows: Tensor, order: Tensor) -> Tensor:
    """The last axis of [groups, rows, inputs] in the order [groups, inputs] of each group."""
    return rows.gather(-1, order.unsqueeze(-2).expand(rows.shape))
