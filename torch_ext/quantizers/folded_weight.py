"""Quantizes a weight as it is once the batch norm behind it is folded into it.

The layer and the batch norm stay apart and train as they are. Only the quantizer sees the weight
times ``gamma / sqrt(running_var + eps)``, and what it gives is divided by that again (Jacob et al.
2018, 3.2), so that in eval mode both together compute what the folded, quantized layer does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.quantizers.fake_quantize import FakeQuantize


class FoldedWeight(nn.Module):
    """A parametrization before a weight's quantizer, or with ``inverse`` behind it."""

    def __init__(
        self, quantizer: FakeQuantize, norm: _BatchNorm, ch_axis: int, inverse: bool
    ) -> None:
        super().__init__()
        self.ch_axis = ch_axis
        self.inverse = inverse
        # In a tuple, so that they are no children a second time.
        self._links = (quantizer, norm)

    def forward(self, weight: Tensor) -> Tensor:
        # Where nothing is quantized, the weight stays the same to the last bit.
        return self.scaled(weight) if self._links[0].quantizes else weight

    def scaled(self, weight: Tensor) -> Tensor:
        norm = self._links[1]
        assert norm.running_var is not None
        factor = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        # A channel that the norm multiplies by 0 (as some start) is quantized as it is.
        factor = torch.where(factor == 0, 1, factor).to(weight.dtype)
        factor = factor.view([-1 if axis == self.ch_axis else 1 for axis in range(weight.dim())])
        return weight / factor if self.inverse else weight * factor

    def extra_repr(self) -> str:
        return "inverse" if self.inverse else ""
