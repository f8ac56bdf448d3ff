"""Steps in pairs around a weight's quantizer: one before it, and the one that undoes it after it.

``FoldedWeight`` quantizes a weight as if the batch norm that follows were folded into it. The layer
and the batch norm stay separate modules and train as usual. The weight is multiplied by
``gamma / sqrt(running_var + eps)`` before its quantizer and divided by it after (Jacob et al. 2018,
section 3.2), so that in eval mode both modules together compute what the folded, quantized layer
computes.

``OutputChannels`` gives each output channel of a grouped transposed convolution an index of its own
on the quantizer's axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.quantizers.fake_quantize import FakeQuantize


class WeightStep(nn.Module):
    """A parametrization before a weight's quantizer; with ``inverse`` the one after it.

    Args:
        quantizer: the weight's quantizer.
        *links: modules that the step reads but that are no children of it.
        inverse: undo the step.
    """

    def __init__(self, quantizer: FakeQuantize, *links: nn.Module, inverse: bool) -> None:
        super().__init__()
        self.inverse = inverse
        # In a tuple, because assigning modules would register them as children a second time.
        self._links = (quantizer, *links)

    def forward(self, weight: Tensor) -> Tensor:
        # A weight that is not quantized in between would be rounded, or copied, for nothing.
        quantizer = self._links[0]
        assert isinstance(quantizer, FakeQuantize)
        return self.applied(weight) if quantizer.quantizes else weight

    def applied(self, weight: Tensor) -> Tensor:
        """What forward gives while the quantizer quantizes."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return "inverse" if self.inverse else ""


class FoldedWeight(WeightStep):
    """Multiplies by the factor of a batch norm; with ``inverse`` divides by it.

    Args:
        quantizer: the weight's quantizer.
        norm: the batch norm that follows the layer.
        ch_axis: the axis of the weight's output channels.
        inverse: divide by the factor instead of multiplying.
    """

    def __init__(
        self, quantizer: FakeQuantize, norm: _BatchNorm, ch_axis: int, inverse: bool
    ) -> None:
        super().__init__(quantizer, norm, inverse=inverse)
        self.ch_axis = ch_axis

    def applied(self, weight: Tensor) -> Tensor:
        norm = self._links[1]
        assert isinstance(norm, _BatchNorm)
        assert norm.running_var is not None
        factor = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight
        # Where gamma is 0 (a common initialization) the factor is 1: it could not be undone.
        factor = torch.where(factor == 0, 1, factor).to(weight.dtype)
        factor = factor.view([-1 if axis == self.ch_axis else 1 for axis in range(weight.dim())])
        return weight / factor if self.inverse else weight * factor


class OutputChannels(WeightStep):
    """Rearranges [in, out / groups, ...] to [in / groups, out, ...], and with ``inverse`` back.

    In the first layout, a transposed convolution's, channel j of every group has the index j.

    Args:
        quantizer: the weight's quantizer.
        groups: the number of groups of the convolution.
        inverse: rearrange to the layer's layout.
    """

    def __init__(self, quantizer: FakeQuantize, groups: int, inverse: bool) -> None:
        super().__init__(quantizer, inverse=inverse)
        self.groups = groups

    def applied(self, weight: Tensor) -> Tensor:
        sizes, groups = weight.shape, self.groups
        if self.inverse:
            grouped = weight.reshape(sizes[0], groups, sizes[1] // groups, *sizes[2:])
            return grouped.transpose(0, 1).flatten(0, 1)
        grouped = weight.reshape(groups, sizes[0] // groups, *sizes[1:])
        return grouped.transpose(0, 1).flatten(1, 2)
