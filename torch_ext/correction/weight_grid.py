"""A layer's weight as its quantizer sees it, and the weight to store so that it sees given values.

Between the stored weight and the quantizer there may be steps of ours (a norm that is folded in,
another order of channels), which are undone after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_ext import ops
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import AnyWeightSource, WeightSource
from torch_ext.quantizers.folded_weight import OutputChannels, WeightStep


class WeightGrid:
    """The weight of a quantizer, and the grid it is on; both in the layer's own layout.

    The grid is that which the quantizer has when this is made, which is in VALIDATION then.
    """

    def __init__(self, source: WeightSource, quantizer: FakeQuantize) -> None:
        self.quantizer = quantizer
        self._source = source
        chain = list(source.chain)
        self._before, self._after = chain[: source.position], chain[source.position + 1 :]
        scale, zero_point = quantizer.calculate_qparams()
        self._qparams = (scale.detach().clone(), zero_point.clone())
        observer = quantizer.observer
        self.ends = (observer.quant_min, observer.quant_max)

    @property
    def stored(self) -> Tensor:
        """The parameter that the weight is computed from."""
        original = self._source.chain.original
        assert isinstance(original, Tensor)
        return original

    def weight(self) -> Tensor:
        """The weight as the quantizer reads it: with norms that are folded in."""
        return self._arranged(self._source.read())

    def factor(self) -> Tensor:
        """What the layer's weight is multiplied by before it is quantized, in its shape."""
        ones = torch.ones_like(self.stored)
        for step in self._before:
            assert isinstance(step, WeightStep)
            ones = step.applied(ones)
        return self._arranged(ones)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of each value, in the shape of the weight."""
        shape = self._source.read().shape
        axis = self.quantizer.observer.ch_axis
        sizes = [-1 if i == axis else 1 for i in range(len(shape))]
        scale, zero_point = (t.view(sizes).expand(shape) for t in self._qparams)
        return self._arranged(scale), self._arranged(zero_point)

    def store(self, values: Tensor) -> bool:
        """Stores a weight that the quantizer makes these values of, in the layer's layout.

        Returns False, with the weight as it was, if its dtype is too coarse for that.
        """
        own = values
        for step in self._before:
            if isinstance(step, OutputChannels):
                own = step.applied(own)
        wanted = own = own.to(self.stored.dtype)
        for step in self._after:
            assert isinstance(step, WeightStep)
            own = step.applied(own)
        kept = self.stored.detach().clone()
        with torch.no_grad():
            self.stored.copy_(own)
            scale, zero_point = self._qparams
            axis = self.quantizer.observer.ch_axis
            have = ops.fake_quant(self._source.read(), scale, zero_point, *self.ends, axis)
            if not torch.equal(have, wanted):
                self.stored.copy_(kept)
                return False
        return True

    def _arranged(self, weight: Tensor) -> Tensor:
        """From the order of channels that the quantizer sees to the layer's."""
        for step in self._after:
            if isinstance(step, OutputChannels):
                weight = step.applied(weight)
        return weight


def unreachable(source: AnyWeightSource) -> str:
    """Why no weight can be stored that the quantizer sees as wanted; empty if one can."""
    if not isinstance(source, WeightSource):
        return "its weight is computed by a hook of torch"
    for step in source.chain:
        if not isinstance(step, (FakeQuantize, WeightStep)):
            return f"its weight is computed by {type(step).__name__}"
    if not source.chain.is_tensor:
        return "its weight is computed from several tensors"
    if hasattr(source.chain.original, "full_tensor"):
        return "its weight is sharded over processes"
    return ""
