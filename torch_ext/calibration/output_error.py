"""The error of a quantized model's outputs against those of the float model on the same data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.utils.batches import Forward, tensors_in, to_device
from torch_ext.utils.modes import forked_rng


class OutputError:
    """Squared error of the floating outputs over the sum of squares of the float model's.

    Runs the model, which has to be in FLOAT, over the data and keeps its outputs. Called with the
    model and the same data in another state, it returns the error. ``power`` is the sum of squares.

    Raises TypeError for data that can be run over only once, and ValueError if ``power`` is not
    positive and finite. Errors name the function ``who``.
    """

    def __init__(
        self, who: str, model: nn.Module, data: Any, forward: Forward, device: torch.device
    ) -> None:
        self._who = who
        if isinstance(data, Iterator):
            raise TypeError(
                f"{who}: expected data to be batches that can be run over again, such as a list, "
                f"got {type(data).__name__}"
            )
        self._forward = forward
        self._device = device
        with forked_rng(model):
            self._wanted = list(self._outputs(model, data))
        self.power = sum(float(want.double().square().sum()) for want in self._wanted)
        if not 0 < self.power < math.inf:
            raise ValueError(
                f"{who}: expected the float model's outputs to be finite and not all zero, got "
                f"{len(self._wanted)} tensors whose squares sum to {self.power:g}"
            )

    def __call__(self, model: nn.Module, data: Any) -> float:
        error = 0.0
        outputs = self._outputs(model, data)
        for have, want in itertools.zip_longest(outputs, self._wanted):
            if have is None or want is None or have.shape != want.shape:
                raise ValueError(
                    f"{self._who}: expected data to give the same batches each time it is run "
                    "over, got outputs of other shapes"
                )
            error += float((have.double() - want.double()).square().sum())
        return error / self.power

    def _outputs(self, model: nn.Module, data: Iterable[Any]) -> Iterator[Tensor]:
        """The floating tensors in the outputs of all batches."""
        for batch in data:
            out = self._forward(model, to_device(batch, self._device))
            yield from (tensor for tensor in tensors_in(out) if tensor.is_floating_point())
