"""ncnn's calibration table: for each layer the scales of its weights and of its input.

A line of text per row, weights first: a key, then numbers, separated by blanks. The number is what
a value is multiplied by to be quantized, the inverse of our scale::

    conv1_param_0 812.345642 790.001221
    conv1 52.310001
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from torch_ext._files import FileError, PathLike, name_problem, write_atomically
from torch_ext._walk import check_model, weight_sources
from torch_ext.export._entries import (
    TO_FLOAT,
    Entry,
    ExportReport,
    check_path,
    entries,
    read_lines,
    refuse,
)
from torch_ext.export._layers import Layer, layers_of
from torch_ext.export._names import resolve
from torch_ext.export._trace import trace

_WEIGHT = "_param_"
_LONGEST_KEY = 255
_GREATEST = float(np.finfo(np.float32).max)
_LIMIT = 256 * 2**20
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?")
_UNREAD = "no Convolution, ConvolutionDepthWise or InnerProduct of ncnn reads it"


@dataclass(frozen=True)
class NcnnTable:
    """A calibration table: multipliers by key."""

    weights: Mapping[str, tuple[float, ...]]  # "conv1_param_0": one per output channel, or group
    activations: Mapping[str, tuple[float, ...]]  # "conv1": of the layer's input


def ncnn_table(
    model: nn.Module,
    example_inputs: Any,
    path: PathLike,
    names: Mapping[str, str] | None = None,
) -> ExportReport:
    """Writes ncnn's calibration table of a model in VALIDATION, for ncnn2int8 or ncnn itself.

    Rows are there for Conv2d (depthwise too) and Linear whose weight is quantized; such a layer has
    to read a quantized value, directly or behind pooling by maximum, ReLU, dropout and reshaping.
    Quantizers that no such layer reads are left out, as ncnn computes in float there; with those
    in FLOAT, VALIDATION computes what ncnn does, up to ties (which ncnn rounds away from zero).

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; shows
            which quantizer each layer reads.
        path: ends in ``.table``; appears complete or not at all.
        names: ncnn's layer names by module; by default the modules' own.

    Raises:
        ValueError: by name, quantizers that are not symmetric on [-127, 127] (``quant_min=-127``),
            activations per channel, weights on another axis than 0 or with several scales in one
            group; weights of other layers; layers whose input is not quantized; names that ncnn
            cannot read (blanks, ``_param_``, more than 247 bytes).
    """
    who = "export.ncnn_table"
    target = check_path(who, path, ".table")
    chosen, left_out = entries(who, model)
    program = trace(who, model, example_inputs, dynamic_batch=False)
    sources = weight_sources(check_model(who, model))
    owners = {name: sources[e.quantizer].owner for name, e in chosen.items() if e.is_weight}
    layers, problems = layers_of(program, owners)
    read = {layer.input for layer in layers.values()}
    for name, entry in chosen.items():
        if entry.is_weight and name not in layers and name not in problems:
            problems[name] = f"it is of a layer that has no row: {_UNREAD}"
        if not entry.is_weight and name not in read:
            left_out[name] = _UNREAD
        elif problem := _grid_problem(entry):
            problems.setdefault(name, problem)
    refuse(who, problems, f"take symmetric qschemes with quant_min=-127; or {TO_FLOAT}")
    if not layers:
        raise ValueError(f"{who}: expected model to have a quantized Conv2d or Linear, got none")

    keys = resolve(who, names, [owners[name] for name in layers])
    _check_keys(who, keys)
    rows = [
        f"{key}{_WEIGHT}0 {_numbers(_weight_scales(who, chosen[name], layer))}"
        for name, layer in layers.items()
        for key in keys[owners[name]]
    ]
    rows += [
        f"{key} {_numbers(chosen[layer.input].scale)}"
        for name, layer in layers.items()
        for key in keys[owners[name]]
    ]
    write_atomically(target, "\n".join([*rows, ""]).encode())
    used = tuple(name for name in chosen if name in layers or name in read)
    return ExportReport(str(target), "ncnn table", used, left_out)


def _grid_problem(entry: Entry) -> str:
    grid = entry.params
    if (grid.quant_min, grid.quant_max) != (-127, 127):
        return f"its grid is [{grid.quant_min}, {grid.quant_max}], not [-127, 127]"
    if bool(entry.zero_point.any()):
        return "its zero point is not 0"
    if grid.ch_axis > 0 or (grid.ch_axis == 0 and not entry.is_weight):
        return f"it is per channel on axis {grid.ch_axis}"
    return ""


def _weight_scales(who: str, entry: Entry, layer: Layer) -> Tensor:
    """One per output channel, or per group where there are several."""
    count = layer.groups if layer.groups > 1 else layer.channels
    scale = entry.scale
    if len(scale) == 1:
        return scale.expand(count)
    grouped = scale.view(count, -1)
    if bool((grouped != grouped[:, :1]).any()):
        problem = f"its {layer.groups} groups have several scales each; take it per tensor"
        refuse(who, {entry.name: problem}, "ncnn has one scale for a group")
    return grouped[:, 0]


def _numbers(scale: Tensor) -> str:
    """The shortest plain decimals that read back as the same float32."""
    inverse = (1 / scale.double()).float().numpy()
    return " ".join(np.format_float_positional(one, unique=True, trim="0") for one in inverse)


def _check_keys(who: str, keys: Mapping[str, tuple[str, ...]]) -> None:
    problems = {}
    for layer, listed in keys.items():
        for key in listed:
            if " " in key or _WEIGHT in key:
                problems[layer] = f"expected its name to be without ' ' and {_WEIGHT}, got {key!r}"
            elif len(f"{key}{_WEIGHT}0".encode()) > _LONGEST_KEY:
                problems[layer] = f"expected its key to be of at most {_LONGEST_KEY} bytes"
    refuse(who, problems, "pass names={module: name in the network}")


def read_ncnn_table(path: PathLike) -> NcnnTable:
    """A table of this library or of ncnn2table. As for ncnn, a blank line ends it.

    Raises FileError (a ValueError) with the file and the line that is wrong.
    """
    rows: dict[str, tuple[float, ...]] = {}
    for number, line in enumerate(read_lines(path, _LIMIT), start=1):
        key, *texts = line.split() or ("",)
        if not key:
            break
        if problem := name_problem(key) or ("" if len(key.encode()) <= _LONGEST_KEY else "shorter"):
            raise FileError(
                path, f"line {number}: expected a key to be {problem}, got {key[:80]!r}"
            )
        if key in rows:
            raise FileError(path, f"line {number}: {key[:80]!r} stands there twice")
        if not texts:
            raise FileError(path, f"line {number}: expected scales behind {key[:80]!r}, got none")
        rows[key] = tuple(_number(path, number, text) for text in texts)
    weights = {key: scales for key, scales in rows.items() if _WEIGHT in key}
    activations = {key: scales for key, scales in rows.items() if _WEIGHT not in key}
    for key in activations:
        if f"{key}{_WEIGHT}0" not in weights:
            raise FileError(path, f"{key[:80]}: expected a row {key[:80]}{_WEIGHT}0 beside it")
    if not rows:
        raise FileError(path, "expected at least one row, got none")
    return NcnnTable(weights, activations)


def _number(path: PathLike, line: int, text: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not 0 <= value <= _GREATEST:
        raise FileError(path, f"line {line}: expected a scale of 0 or more, got {text[:80]!r}")
    return float(np.float32(value))
