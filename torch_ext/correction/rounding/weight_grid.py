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
from torch_ext.quantizers.learned import LearnedFakeQuantize
from torch_ext.quantizers.parts.groups import spread
from torch_ext.quantizers.solve import Solution


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
        self.text = observer.grid_text  # as ops take it

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
        shape, observer = self._source.read().shape, self.quantizer.observer
        layout = (shape, observer.ch_axis, observer.group_size)
        scale, zero_point = (spread(t, *layout) for t in self._qparams)
        return self._arranged(scale), self._arranged(zero_point)

    def nearest(self) -> Tensor:
        """What the quantizer makes of the weight: each value rounded to the nearest."""
        return self._arranged(self._quantized(self._source.read()))

    def solution(self) -> Solution:
        """The range and qparams that the grid is of."""
        return Solution(self.quantizer.range.detach().clone(), *self._qparams)

    def hold(self, solution: Solution) -> None:
        """Gives the quantizer a range to hold; one that keeps its own, learned or given, has it."""
        if not isinstance(self.quantizer, LearnedFakeQuantize):
            if self.quantizer.observer.statistic == "none":
                return
            self.quantizer.take_(solution)
            self.quantizer.hold_range()

    def store(self, values: Tensor) -> bool:
        """Stores a weight that the quantizer makes these values of, in the layer's layout.

        Returns False, with the weight as it was, if its dtype is too coarse for that.
        """
        own = values
        for step in self._before:
            if isinstance(step, OutputChannels):
                own = step.applied(own)
        # Compared in a dtype that holds all values of a grid, which that of the weight may not.
        fine = torch.float64 if self.stored.dtype == torch.float64 else torch.float32
        wanted = own = self._quantized(own.to(fine))
        own = own.to(self.stored.dtype)
        for step in self._after:
            assert isinstance(step, WeightStep)
            own = step.applied(own)
        kept = self.stored.detach().clone()
        with torch.no_grad():
            self.stored.copy_(own)
            if not torch.equal(self._quantized(self._source.read().to(fine)), wanted):
                self.stored.copy_(kept)
                return False
        return True

    def _quantized(self, weight: Tensor) -> Tensor:
        observer = self.quantizer.observer
        rows = observer.as_rows(weight)
        made = ops.fake_quant(rows, *self._qparams, ch_axis=observer.scale_axis, grid=self.text)
        return observer.from_rows(made, weight)

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
