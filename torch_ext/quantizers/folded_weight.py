"""Quantizes a weight as if the batch norm that follows were folded into it.

The layer and the batch norm stay separate modules and train as usual. The weight is multiplied by
``gamma / sqrt(running_var + eps)`` before its quantizer and divided by it after (Jacob et al. 2018,
section 3.2), so that in eval mode both modules together compute what the folded, quantized layer
computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.quantizers.fake_quantize import FakeQuantize


class FoldedWeight(nn.Module):
    """A parametrization before a weight's quantizer; with ``inverse`` the one after it.

    Args:
        quantizer: the weight's quantizer.
        norm: the batch norm that follows the layer.
        ch_axis: the axis of the weight's output channels.
        inverse: divide by the factor instead of multiplying.
    """

    def __init__(
        self, quantizer: FakeQuantize, norm: _BatchNorm, ch_axis: int, inverse: bool
    ) -> None:
        super().__init__()
        self.ch_axis = ch_axis
        self.inverse = inverse
        # In a tuple, because assigning modules would register them as children a second time.
        self._links = (quantizer, norm)

    def forward(self, weight: Tensor) -> Tensor:
        # Multiplying and dividing would round a weight that is not quantized in between.
        return self.scaled(weight) if self._links[0].quantizes else weight

    def scaled(self, weight: Tensor) -> Tensor:
        """The weight times the factor, or with ``inverse`` divided by it."""
        norm = self._links[1]
        assert norm.running_var is not None
        factor = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        # Where gamma is 0 (a common initialization) the factor is 1: it could not be undone.
        factor = torch.where(factor == 0, 1, factor).to(weight.dtype)
        factor = factor.view([-1 if axis == self.ch_axis else 1 for axis in range(weight.dim())])
        return weight / factor if self.inverse else weight * factor

    def extra_repr(self) -> str:
        return "inverse" if self.inverse else ""
