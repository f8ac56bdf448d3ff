"""Quantizers from a file, without the model that they were in; and several files as one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from torch_ext.files.observer_params import read_observer_params
from torch_ext.files.quantizer_params import Params, quantizer_of
from torch_ext.files.storage import PathLike
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.solve import Solution
from torch_ext.quantizers.state_table import FakeQuantState


class SavedQuantizers(nn.Module):
    """The quantizers of a file under their names: a model to what looks at quantizers alone.

    ``describe``, ``resolve`` (of activations: a file has no weights), ``export``,
    ``save_observer_params`` and ``load_observer_params`` take it. Quantizers with a range are in
    VALIDATION; without one, those that saw data, and weights, are in CALIBRATION, and the others
    pass through.
    """

    def __init__(self, found: Mapping[str, Params]) -> None:
        super().__init__()
        for name, params in found.items():
            # Not by add_module, which takes no dots: these are the names in the model.
            self._modules[name] = _restored(params)


def read_quantizers(path: PathLike) -> SavedQuantizers:
    """The quantizers of a file of ``save_observer_params``, with ranges and statistics.

    Raises a ValueError ``FILE: FIELD: what is wrong with it``, or OSError.
    """
    return SavedQuantizers(read_observer_params(path))


def _restored(params: Params) -> FakeQuantize:
    quantizer = quantizer_of(params)
    if params.solved:
        quantizer.take_(Solution(*(params[field] for field in ("range", "scale", "zero_point"))))
        quantizer.enter(FakeQuantState.VALIDATION)
    elif quantizer.transient or quantizer.observer.saw_data:
        quantizer.enter(FakeQuantState.CALIBRATION)
    else:
        quantizer.enter(FakeQuantState.VALIDATION, pass_through=True)
    return quantizer
