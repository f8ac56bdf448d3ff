"""Modules for what a forward usually computes with operators, so that the result is quantized.

``prepare_qat`` quantizes outputs of modules; an addition written as ``a + b`` has none. Each
module here stands for one operation, and one instance for one place in the forward: an instance
that is called at two places shares one range between them. ``QuantStub`` quantizes any tensor::

    self.add = torch_ext.Add()                 # in __init__
    x = self.add(self.branch(x), x)            # in forward

    self.after_mean = torch_ext.QuantStub()
    x = self.after_mean(x.mean((2, 3)))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class QuantStub(nn.Module):
    """Returns its input; ``prepare_qat`` quantizes it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Add(nn.Module):
    """``a + b``."""

    def forward(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a + b


class Mul(nn.Module):
    """``a * b``."""

    def forward(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a * b


class MatMul(nn.Module):
    """``a @ b``."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Cat(nn.Module):
    """``torch.cat(tensors, dim)``."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
