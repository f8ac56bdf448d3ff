"""How far a model's outputs are from those of the float model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from torch_ext.utils.batches import tensors_in


class FloatOutputs:
    """The floating tensors that the float model returns for the data; they stay in memory."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def keep(self, made: Any) -> None:
        """Adds what the float model returned for the next batch."""
        self.tensors += _floating(made)

    def compared(self) -> ComparedOutputs:
        """The error of the same batches' outputs, of which there are none yet."""
        return ComparedOutputs(self.tensors)


class ComparedOutputs:
    """The squared error of outputs over the sum of squares of those of the float model."""

    def __init__(self, wanted: list[Tensor]) -> None:
        self._wanted = wanted
        self._next = 0
        self._error = self._power = 0.0

    def add(self, made: Any) -> None:
        """Compares what the model returned for the next batch."""
        for have in _floating(made):
            if self._next < len(self._wanted):
                want = self._wanted[self._next].double()
                self._error += float((have.double() - want).square().sum())
                self._power += float(want.square().sum())
            self._next += 1

    @property
    def value(self) -> float:
        """NaN if the float model's outputs are all zero, or there are none."""
        return self._error / self._power if self._power else math.nan


def _floating(made: Any) -> Iterator[Tensor]:
    return (tensor.detach() for tensor in tensors_in(made) if tensor.is_floating_point())
