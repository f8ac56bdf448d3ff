"""Measures a model with some of its quantizers on, at other widths if asked, and the rest off."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from torch_ext.calibration.change_bits import set_widths, width_of
from torch_ext.calibration.output_error import OutputError
from torch_ext.calibration.restore import restored
from torch_ext.files.measurements import Results
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.batches import Forward
from torch_ext.utils.modes import forked_rng

Metric = Callable[[nn.Module, Any], Any]


class SwitchedModel:
    """A model whose quantizers are switched, and the number that tells how good it is then.

    Without a metric that is :class:`OutputError`. The model has to be in eval mode, without
    gradients, in VALIDATION; the caller restores its quantizers. Numbers go through ``results``.

    Attributes:
        active: the quantizers that quantize, by name.
        floating: the metric of the float model.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        model: nn.Module,
        data: Any,
        metric: Metric | None,
        forward: Forward,
        device: torch.device,
        results: Results,
    ) -> None:
        self._prepared, self._model, self._data, self._results = prepared, model, data, results
        self.active: dict[str, FakeQuantize] = {
            name: quantizer
            for name, quantizer in prepared.quantizers.items()
            if not quantizer.passes_through
        }
        self.floating = 0.0
        self._switch(())
        if metric is None:
            error = OutputError(prepared.who, model, data, forward, device)
            self._metric: Metric = error
            results.measure("the power of the float outputs", lambda: error.power)
        else:
            self._metric = metric
            self.floating = results.measure("the float model", self._call)

    def measure(
        self, label: str, on: Collection[str], bits: Mapping[str, int] | None = None
    ) -> float:
        """The metric with the quantizers ``on``, those in ``bits`` at that width, under a label.

        The widths are those that :func:`check_bits` accepts.
        """
        wanted = bits or {}

        def compute() -> Any:
            changed = {name: self.active[name] for name in wanted}
            with restored(changed):
                set_widths(
                    self._prepared,
                    {name: width_of(self.active[name], width) for name, width in wanted.items()},
                )
                self._switch(on)
                return self._call()

        return self._results.measure(label, compute)

    def _switch(self, on: Collection[str]) -> None:
        for name, quantizer in self.active.items():
            state = FakeQuantState.VALIDATION if name in on else FakeQuantState.FLOAT
            quantizer.enter(state)

    def _call(self) -> Any:
        with forked_rng(self._model):
            return self._metric(self._model, self._data)


def name_of(metric: Metric) -> str:
    """A metric's name, for a table."""
    return str(getattr(metric, "__name__", type(metric).__name__))
