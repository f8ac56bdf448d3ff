"""The problem that rounding a layer's weight solves: least squared error of the layer's output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowProblem(NamedTuple):
    """A weight as rows, the grid of each value, and what errors of its values cost.

    The cost of a row ``q`` is ``(q - target) hessian (q - target)``, which is the squared error of
    what the layer makes of its inputs, summed over their positions. Rows are independent.
    """

    weight: Tensor  # [groups, rows, inputs] float32 or float64
    target: Tensor  # the same, float64: the best weight without a grid; by default the weight
    nearest: Tensor  # the weight, each value rounded to the nearest of its grid
    scale: Tensor  # float32, in the shape of the weight
    zero_point: Tensor  # int32, in the shape of the weight
    grid: str  # as ops take it
    hessian: Tensor  # [groups, inputs, inputs] float64
    damping: float  # of the Hessian, by what rounds; costs have none

    def cost(self, values: Tensor) -> Tensor:
        """The cost of each row [groups, rows] float64."""
        error = values.double() - self.target
        return (error @ self.hessian).mul_(error).sum(-1)

    def power(self) -> Tensor:
        """What the costs are relative to: the sum of squares of the layer's output, per row."""
        weight = self.weight.double()
        return (weight @ self.hessian).mul_(weight).sum(-1)

    def better(self, values: Tensor, others: Tensor) -> Tensor:
        """Of each row the one that costs less; the others where both cost the same."""
        less = self.cost(values) < self.cost(others)
        return torch.where(less.unsqueeze(-1), values, others)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with a share of its mean diagonal added to the diagonal.

    Inputs that are always zero get the mean itself: they depend on nothing and cost nothing.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    alive = diagonal > 0
    count = alive.sum(-1, keepdim=True).clamp(min=1)
    mean = diagonal.sum(-1, keepdim=True) / count
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    more = torch.where(alive, damping * mean, mean)
    return hessian + torch.diag_embed(more)


def fitted_target(weight: Tensor, hessian: Tensor, wanted: Tensor, damping: float) -> Tensor:
    """The weight with which the layer's inputs give what is wanted, as nearly as they can.

    Args:
        weight: [groups, rows, inputs]; the result stays near it by the damping.
        hessian: sum of the inputs' outer products.
        wanted: [groups, rows, inputs] float64, sum of the wanted outputs times the inputs.
        damping: the share of the mean diagonal.
    """
    full = damped(hessian, damping)
    weight = weight.double()
    # wanted = weight @ hessian where the inputs give what is wanted already
    step: Tensor = torch.linalg.solve(full, wanted - weight @ hessian, left=False)
    return weight + step
