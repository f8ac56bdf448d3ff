"""Scales in the form of TVM's relay quantization: a threshold, divided by a power of two.

For a threshold t and b bits, TVM quantizes x to clip(round(x / d), -m, m) * d with the scale
d = t / 2^(b-1) and m = 2^(b-1) - 1. It quantizes weights per tensor. By default t is a power of two
for weights, and the same for all activations: ``global_scale``, 8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from json import dumps
from typing import Any

from torch import nn

from torch_ext.export.common.entries import (
    TO_FLOAT,
    Entry,
    ExportReport,
    check_path,
    entries,
    refuse,
)
from torch_ext.files.storage import FileError, PathLike, name_problem, read_object, write_atomically
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.grid import dtype_bits
from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import label_of

_FORMAT = "torch_ext.tvm"
_VERSION = 1
_LIMIT = 64 * 2**20
_WEIGHT_SCALES = ("power2", "max")
_ROLES = ("input", "output", "weight")
_FIELDS = {"of", "threshold", "dom_scale", "clip_min", "clip_max"}


@dataclass(frozen=True)
class TvmScale:
    """How TVM quantizes the tensor of one quantizer."""

    #: ``"input"``, ``"output"`` or ``"weight"``, whichever the quantizer quantizes.
    of: str
    #: The threshold t, the magnitude that 2^(b-1) steps reach for b bits.
    threshold: float
    #: The scale, t / 2^(b-1).
    dom_scale: float
    #: The least level, -(2^(b-1) - 1).
    clip_min: int
    #: The greatest level, 2^(b-1) - 1.
    clip_max: int


@dataclass(frozen=True)
class TvmScales:
    """The contents of a file of :func:`tvm_scales`."""

    #: ``"power2"`` if the thresholds of weights are powers of two, else ``"max"``.
    weight_scale: str
    #: The threshold of all activations; None if each has its own.
    global_scale: float | None
    #: The scales by the quantizers' names.
    quantizers: Mapping[str, TvmScale]


def tvm_scales(
    model: nn.Module,
    path: PathLike,
    weight_scale: str = "power2",
    global_scale: float | None = None,
) -> ExportReport:
    """Writes a model's scales in TVM's form, as JSON.

    The scales are written as they are, so the model has to quantize as TVM does: per tensor, on
    [-127, 127], with thresholds of weights that are powers of two::

        tvm = {"qscheme": "per_tensor_symmetric", "quant_min": -127, "scale_rule": "tvm"}
        get_default_qconfig(activation_qkwargs=tvm, weight_qkwargs={**tvm, "power_of_two": True})

    Args:
        model: calibrated, in VALIDATION.
        path: ends in ``.json``; the file appears complete or not at all.
        weight_scale: ``"power2"`` if the thresholds of weights have to be powers of two (default),
            or ``"max"`` if they may have any value.
        global_scale: the threshold that all activations have to have
            (``activation_observer="fixed_scale"`` with ``scale=global_scale / 128``); None
            (default) if each has its own.

    Returns:
        Which quantizers are in the file, and which were left out and why.

    Raises:
        ValueError: by name, for quantizers that TVM cannot represent; for an unknown
            ``weight_scale`` or a ``global_scale`` that is not above 0.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    who = "export.tvm_scales"
    target = check_path(who, path, ".json")
    if weight_scale not in _WEIGHT_SCALES:
        known = ", ".join(_WEIGHT_SCALES)
        raise ValueError(f"{who}: unknown weight_scale {weight_scale!r}; known: {known}")
    if global_scale is not None and not _positive(global_scale):
        raise ValueError(f"{who}: expected global_scale to be above 0, got {bounded(global_scale)}")
    chosen, left_out = entries(PreparedModel(who, model))
    problems = {
        name: problem
        for name, entry in chosen.items()
        if (problem := _problem(entry, weight_scale, global_scale))
    }
    refuse(who, problems, f"see help(torch_ext.export.tvm_scales); or {TO_FLOAT}")
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "weight_scale": weight_scale,
        "global_scale": None if global_scale is None else float(global_scale),
        "quantizers": {name: _record(entry) for name, entry in chosen.items()},
    }
    text = dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(target, (text + "\n").encode())
    return ExportReport(str(target), "TVM scales", tuple(chosen), left_out)


def _positive(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < float(value) < math.inf  # type: ignore[arg-type]


def _largest(entry: Entry) -> int:
    """The greatest level of a quantizer's dtype if it is signed: 127 for int8 and uint8."""
    bits = dtype_bits(entry.quantizer.observer.dtype)
    return int(2 ** (bits - 1)) - 1


def _record(entry: Entry) -> dict[str, Any]:
    scale, largest = float(entry.scale), _largest(entry)
    return {
        "of": entry.role,
        "threshold": scale * (largest + 1),
        "dom_scale": scale,
        "clip_min": -largest,
        "clip_max": largest,
    }


def _problem(entry: Entry, weight_scale: str, global_scale: float | None) -> str:
    """Why TVM cannot represent a quantizer; empty if it can."""
    grid = entry.params
    if entry.groups:
        return entry.groups
    if grid.is_float:
        return f"its grid is {grid.values}, not of integers"
    largest = _largest(entry)
    if len(entry.scale) > 1 or grid.ch_axis >= 0:
        return f"it is per channel (axis {grid.ch_axis})"
    if (grid.quant_min, grid.quant_max) != (-largest, largest):
        return f"its grid is {grid.values}, not [{-largest}, {largest}]"
    if bool(entry.zero_point.any()):
        return "its zero point is not 0"
    threshold = float(entry.scale) * (largest + 1)
    if entry.is_weight and weight_scale == "power2" and math.frexp(threshold)[0] != 0.5:
        return f"its threshold {threshold:g} is no power of two"
    if not entry.is_weight and global_scale not in (None, threshold):
        return f"its threshold is {threshold:g}, not the global_scale {global_scale:g}"
    return ""


def read_tvm_scales(path: PathLike) -> TvmScales:
    """Reads a file of :func:`tvm_scales` and checks every value.

    Raises:
        FileError: a ValueError with the file and the field that is wrong.
        FileNotFoundError: if there is no such file.
    """
    document = read_object(path, _LIMIT)
    if (document.get("format"), document.get("version")) != (_FORMAT, _VERSION):
        have = f"{document.get('format')!r:.80} {document.get('version')!r:.80}"
        raise FileError(path, f"format, version: expected {_FORMAT!r} {_VERSION}, got {have}")
    weight_scale, global_scale = document.get("weight_scale"), document.get("global_scale")
    if weight_scale not in _WEIGHT_SCALES:
        known = " or ".join(_WEIGHT_SCALES)
        raise FileError(path, f"weight_scale: expected {known}, got {weight_scale!r:.80}")
    if global_scale is not None and not _positive(global_scale):
        raise FileError(path, f"global_scale: expected null or above 0, got {global_scale!r:.80}")
    records = document.get("quantizers")
    if not isinstance(records, dict) or not records:
        raise FileError(path, "quantizers: expected an object with at least one")
    scales = {}
    for name, record in records.items():
        if name and (problem := name_problem(name)):
            raise FileError(path, f"quantizers: expected names to be {problem}, got {name[:80]!r}")
        scales[name] = _parse_record(path, name, record)
    return TvmScales(weight_scale, global_scale, scales)


def _parse_record(path: PathLike, name: str, record: Any) -> TvmScale:
    """Reads a quantizer's record; raises FileError for other fields or inconsistent numbers."""
    if not isinstance(record, dict) or record.keys() != _FIELDS or record["of"] not in _ROLES:
        raise FileError(
            path,
            f"{label_of(name)}: expected {', '.join(sorted(_FIELDS))}, with of one of "
            f"{', '.join(_ROLES)}",
        )
    scale = TvmScale(**record)
    integers = all(
        isinstance(level, int) and not isinstance(level, bool)
        for level in (scale.clip_min, scale.clip_max)
    )
    if not (
        integers
        and _positive(scale.threshold)
        and _positive(scale.dom_scale)
        and scale.clip_min == -scale.clip_max < 0
        and scale.dom_scale * (scale.clip_max + 1) == scale.threshold
    ):
        raise FileError(
            path,
            f"{label_of(name)}: expected clip_min to be -clip_max and threshold to be "
            f"dom_scale * (clip_max + 1), got {record!r:.200}",
        )
    return scale
