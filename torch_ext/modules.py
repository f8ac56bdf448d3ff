"""Modules in place of operators such as ``+``, for ``prepare_qat`` without ``example_inputs``.

``a + b`` in a forward is not a module, so only an example shows it. Of these modules the operands
are quantized; of ``QuantStub`` the output, in both ways of ``prepare_qat``, which puts a quantizer
at any place. Use one instance for each place in the forward: an instance that is called at two
places has one range for both::

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
    """Returns its input, a tensor of any shape, which ``prepare_qat`` then quantizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Add(nn.Module):
    """``a + b``, of tensors whose shapes broadcast, or of a tensor and a number."""

    def forward(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a + b


class Mul(nn.Module):
    """``a * b``, of tensors whose shapes broadcast, or of a tensor and a number."""

    def forward(self, a: Tensor, b: Tensor | float) -> Tensor:
        return a * b


class MatMul(nn.Module):
    """``a @ b``, of tensors as ``torch.matmul`` takes them."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class Cat(nn.Module):
    """``torch.cat(tensors, dim)``, of a sequence of tensors.

    Args:
        dim: the dimension to join along; 1, the channels of images, by default.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
