"""Specs that make the observers and fake-quants of this package."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e.quantizer import QuantizationSpec

from torch_ext.ops.registry_names import Method, Rule
from torch_ext.pt2e.adapters import PT2EFakeQuantize, PT2EObserver
from torch_ext.quantizers.fake_quantize import KEYS as FAKE_QUANT_KEYS
from torch_ext.quantizers.grid import DType, is_float, parse_dtype
from torch_ext.quantizers.observer import KEYS as OBSERVER_KEYS
from torch_ext.quantizers.parts.keys import check_keys

# Keys that a spec cannot have, because the number of channels and the role depend on the graph, and
# its quantized graphs have neither groups nor dynamic scales.
_SET_BY_GRAPH = ("channel_len", "transient", "optional", "group_size", "dynamic", "scale_dtype")
# The dtype of a converted graph, by whether the grid is signed and has more than 8 bits. int4 is
# stored in int8.
_STORED_IN = {
    (True, False): torch.int8,
    (False, False): torch.uint8,
    (True, True): torch.int16,
    (False, True): torch.uint16,
}


def observer_spec(
    observer: Rule = "min_max",
    dtype: DType = torch.int8,
    qscheme: torch.qscheme | str = torch.per_tensor_symmetric,
    ch_axis: int = -1,
    quant_min: int | None = None,
    quant_max: int | None = None,
    **keys: Any,
) -> QuantizationSpec:
    """A spec for ``prepare_pt2e`` that observes a value with an :class:`Observer`.

    The number of channels comes from the data.

    Args:
        observer: the name of the rule.
        dtype: the grid's dtype, as in :class:`Observer`.
        qscheme: symmetric or affine, per tensor or per channel.
        ch_axis: the axis of the channels; -1 with a per-tensor scheme.
        quant_min: the smallest integer of the grid; by default, the dtype's.
        quant_max: the largest integer of the grid; by default, the dtype's.
        **keys: other keys of :class:`Observer` (``power_of_two=True``), and options of the rule
            (``percentile=99.9``).

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a key, a rule, a dtype or a scheme is unknown, or arguments do not fit together.
        RuntimeError: the rule does not accept its options or the grid.
    """
    spec_keys: dict[str, Any] = {
        "observer": observer,
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": ch_axis,
        "quant_min": quant_min,
        "quant_max": quant_max,
        **keys,
    }
    _check("observer_spec", keys, observer, OBSERVER_KEYS)
    return _spec("observer_spec", PT2EObserver, spec_keys)


def fake_quant_spec(
    method: Method = "fake_quant",
    observer: Rule = "min_max",
    dtype: DType = torch.int8,
    qscheme: torch.qscheme | str = torch.per_tensor_symmetric,
    ch_axis: int = -1,
    quant_min: int | None = None,
    quant_max: int | None = None,
    **keys: Any,
) -> QuantizationSpec:
    """A spec for ``prepare_qat_pt2e`` that quantizes a value with a :class:`FakeQuantize`.

    The number of channels comes from the first batch. With per-channel ``lsq``, that batch replaces
    the learned parameters: run one before you make the optimizer.

    Args:
        method: one of ``torch_ext.fake_quants()``.
        observer, dtype, qscheme, ch_axis, quant_min, quant_max: as in :func:`observer_spec`.
        **keys: keys as in :func:`observer_spec`, and those of :class:`FakeQuantize`. Its
            ``averaging_constant`` is 0.01 by default, which suits activations; pass 1 for weights.

    Raises:
        TypeError: as :func:`observer_spec`.
        ValueError: as :func:`observer_spec`, and for an unknown method.
        RuntimeError: as :func:`observer_spec`.
    """
    spec_keys: dict[str, Any] = {
        "method": method,
        "observer": observer,
        "dtype": dtype,
        "qscheme": qscheme,
        "ch_axis": ch_axis,
        "quant_min": quant_min,
        "quant_max": quant_max,
        **keys,
    }
    _check("fake_quant_spec", keys, observer, FAKE_QUANT_KEYS)
    return _spec("fake_quant_spec", PT2EFakeQuantize, spec_keys)


def _check(who: str, keys: dict[str, Any], observer: str, known: tuple[str, ...]) -> None:
    """Raises ValueError for keys that a spec does not take."""
    check_keys(who, keys, observer, [key for key in known if key not in _SET_BY_GRAPH])


def _spec(who: str, adapter: type[Any], keys: dict[str, Any]) -> QuantizationSpec:
    """The spec that makes ``adapter(**keys)``; builds one to check the keys."""
    dtype, low, high = parse_dtype(who, keys["dtype"])
    if is_float(dtype):
        raise ValueError(f"{who}: expected dtype to be of integers, got {dtype}")
    keys["dtype"] = _STORED_IN[low < 0, high - low > 255]
    for name, bound in (("quant_min", low), ("quant_max", high)):
        keys[name] = bound if keys[name] is None else keys[name]
    probe = adapter(**keys).observer  # raises if the keys do not fit together
    if not low <= probe.quant_min < probe.quant_max <= high:
        raise ValueError(
            f"{who}: expected quant_min and quant_max to be between {low} and {high}, "
            f"got {probe.quant_min} and {probe.quant_max}"
        )
    return QuantizationSpec(
        dtype=probe.dtype,
        observer_or_fake_quant_ctr=adapter.with_args(**keys),
        quant_min=probe.quant_min,
        quant_max=probe.quant_max,
        qscheme=probe.qscheme,
        ch_axis=probe.ch_axis if probe.ch_axis >= 0 else None,
    )
