"""Quantizers from a file, without the model that they were in."""

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
    """The quantizers of a file, usable as a model by functions that only need its quantizers.

    These are ``describe``, ``resolve`` (for activations only: a file has no weights),
    ``torch_ext.export``, ``save_observer_params``, ``load_observer_params`` and
    ``named_quantizers``.

    Quantizers with a range are in VALIDATION. Of those without one, weight quantizers and those
    that saw data are in CALIBRATION; the others are in VALIDATION and pass values through.

    Args:
        found: the quantizers' parameters by name, as :func:`read_quantizers` reads them.
    """

    def __init__(self, quantizers: Mapping[str, Params]) -> None:
        super().__init__()
        for name, params in quantizers.items():
            # The names have dots, as in the model; add_module would raise.
            self._modules[name] = _restored(params)


def read_quantizers(path: PathLike) -> SavedQuantizers:
    """Reads the quantizers in a file of :func:`save_observer_params`.

    Args:
        path: the file.

    Returns:
        The quantizers, with ranges and statistics.

    Raises:
        FileError: invalid contents; the message names the file and the field.
        OSError: the file cannot be read.
    """
    return SavedQuantizers(read_observer_params(path))


def _restored(params: Params) -> FakeQuantize:
    quantizer = quantizer_of(params)
    if params.rangeless:
        quantizer.enter(FakeQuantState.VALIDATION)
    elif params.solved:
        quantizer.take_(Solution(params["range"], params["scale"], params["zero_point"]))
        if params.held:
            quantizer.hold_range()
        quantizer.enter(FakeQuantState.VALIDATION)
    elif quantizer.transient or quantizer.observer.saw_data:
        quantizer.enter(FakeQuantState.CALIBRATION)
    else:
        quantizer.enter(FakeQuantState.VALIDATION, pass_through=True)
    return quantizer
