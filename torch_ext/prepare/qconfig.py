"""Which quantizers a module gets: a pair of factories, and the usual pairs by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_ext.ops.registry import fake_quant_info, observer_info
from torch_ext.ops.registry_names import Method, Rule
from torch_ext.quantizers.fake_quantize import KEYS, FakeQuantize
from torch_ext.quantizers.observer import check_keys
from torch_ext.utils.arguments import bounded

Factory = Callable[..., FakeQuantize]

# Keys of other toolchains that have nothing to set here, and why.
_IGNORED = {
    "bins": "the statistic keeps the same relative resolution at every magnitude",
    "stride": "the search is exact over every candidate",
    "update_interval": "the statistic accumulates over all data and is solved once",
}

# Weights are read as they are, so their range follows them at once.
_WEIGHT_DEFAULTS: Mapping[str, Any] = {"averaging_constant": 1.0, "transient": True}
_PER_TENSOR = (torch.per_tensor_symmetric, torch.per_tensor_affine)


@dataclass(frozen=True)
class QConfig:
    """Factories of the quantizers of a module's output and of its weight; None: not quantized.

    A factory makes a new :class:`FakeQuantize` at each call and takes keyword overrides, as
    ``functools.partial(FakeQuantize, observer="percentile")`` does: ``prepare_qat`` passes
    ``channel_len``, ``ch_axis`` and ``transient`` for weights.
    """

    activation: Factory | None
    weight: Factory | None

    def __post_init__(self) -> None:
        for side in ("activation", "weight"):
            factory = getattr(self, side)
            if isinstance(factory, nn.Module):
                raise ValueError(
                    f"QConfig: expected {side} to be a factory, such as functools.partial("
                    f"FakeQuantize, ...), got an instance of {type(factory).__name__}: "
                    "one instance would be shared by all modules"
                )
            if factory is not None and not callable(factory):
                raise TypeError(
                    f"QConfig: expected {side} to be a factory or None, got {bounded(factory)}"
                )


def get_default_qconfig(
    activation_fake_quant: Method | None = "fake_quant",
    weight_fake_quant: Method | None = "fake_quant",
    activation_observer: Rule | None = "min_max",
    weight_observer: Rule | None = "min_max",
    activation_qkwargs: Mapping[str, Any] | None = None,
    weight_qkwargs: Mapping[str, Any] | None = None,
) -> QConfig:
    """A QConfig by the names of methods and observers.

    A fake-quant name of None leaves that side float (the last layer's output, say).
    ``*_qkwargs`` is one flat mapping of the keys of the quantizer, of the observer and of its
    rule: ``dtype``, ``qscheme``, ``ch_axis``, ``channel_len``, ``quant_min``, ``quant_max``,
    ``averaging_constant``, ``percentile``, ``std_scale``, ``xmin``, ``xmax``, ``scale``,
    ``zero_point``, ... It is read, never changed. Unknown keys are refused.

    Activations: int8, per tensor, symmetric, averaging constant 0.01.
    Weights: int8, per channel on axis 0 (the output channels; ``prepare_qat`` turns it to axis 1
    for transposed convolutions; per tensor for ``pact``), symmetric, averaging constant 1.
    """
    return QConfig(
        activation=_factory(
            "activation", activation_fake_quant, activation_observer, activation_qkwargs
        ),
        weight=_factory("weight", weight_fake_quant, weight_observer, weight_qkwargs),
    )


def get_default_calib_qconfig(
    activation_fake_quant: Method | None = "fake_quant",
    weight_fake_quant: Method | None = "fake_quant",
    activation_observer: Rule | None = "percentile",
    weight_observer: Rule | None = "min_max",
    activation_qkwargs: Mapping[str, Any] | None = None,
    weight_qkwargs: Mapping[str, Any] | None = None,
) -> QConfig:
    """:func:`get_default_qconfig` with an observer that keeps a histogram, for calibration."""
    return get_default_qconfig(
        activation_fake_quant,
        weight_fake_quant,
        activation_observer,
        weight_observer,
        activation_qkwargs,
        weight_qkwargs,
    )


def _factory(
    side: str, method: Method | None, observer: Rule | None, qkwargs: Mapping[str, Any] | None
) -> Factory | None:
    if qkwargs is not None and not isinstance(qkwargs, Mapping):
        raise TypeError(f"expected {side}_qkwargs to be a mapping, got {bounded(qkwargs)}")
    given = dict(qkwargs or {})
    if method is None:
        if given:
            raise ValueError(
                f"expected {side}_qkwargs to be empty with {side}_fake_quant=None, "
                f"got {', '.join(given)}"
            )
        return None
    if observer is None:
        raise ValueError(
            f"expected {side}_observer to be a name with {side}_fake_quant={method!r}, got None"
        )
    observer_info(observer)
    for key in [key for key in given if key in _IGNORED]:
        warnings.warn(f"{side}_qkwargs: {key} is ignored, as {_IGNORED[key]}", stacklevel=4)
        del given[key]
    keys = dict(_WEIGHT_DEFAULTS) if side == "weight" else {}
    if side == "weight":
        per_channel = fake_quant_info(method)["per_channel"]
        default = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
        given.setdefault("qscheme", default)
    check_keys(f"{side}_qkwargs", given, observer, KEYS)
    probe_keys = keys | given
    if side == "weight" and "ch_axis" not in given and not _is_per_tensor(given["qscheme"]):
        probe_keys["ch_axis"] = 0
    factory = functools.partial(FakeQuantize, method, observer, **probe_keys)
    factory()  # wrong values fail here, not at prepare time
    return factory


def _is_per_tensor(qscheme: object) -> bool:
    return str(qscheme).removeprefix("torch.") in (
        str(s).removeprefix("torch.") for s in _PER_TENSOR
    )
