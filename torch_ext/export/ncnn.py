"""ncnn's calibration table: for each layer the scales of its weights and of its input.

A row is a line of text: a key, then numbers, separated by blanks; rows of weights come first. ncnn
multiplies a value by the number to quantize it, so the number is the inverse of our scale::

    conv1_param_0 812.345642 790.001221
    conv1 52.310001
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from torch_ext.export.common.entries import (
    TO_FLOAT,
    Entry,
    ExportReport,
    check_path,
    entries,
    read_lines,
    refuse,
)
from torch_ext.export.common.network_names import network_names
from torch_ext.export.common.trace import trace
from torch_ext.export.ncnn_layers import Layer, layers_of
from torch_ext.files.storage import FileError, PathLike, name_problem, write_atomically
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import shown

_WEIGHT = "_param_"
_LONGEST_KEY = 255
_GREATEST = float(np.finfo(np.float32).max)
_LIMIT = 256 * 2**20
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?")
_LAYER_KEYS = {"weight", "input", "groups", "channels"}
_UNREAD = "no Convolution, ConvolutionDepthWise or InnerProduct of ncnn reads it"


@dataclass(frozen=True)
class NcnnTable:
    """The contents of a calibration table: multipliers (1 / scale) by key."""

    #: Of weights, such as ``"conv1_param_0"``, one per output channel or one per group.
    weights: Mapping[str, tuple[float, ...]]
    #: Of layers' inputs, such as ``"conv1"``.
    activations: Mapping[str, tuple[float, ...]]


def ncnn_table(
    model: nn.Module,
    example_inputs: Any,
    path: PathLike,
    names: Mapping[str, str] | None = None,
) -> ExportReport:
    """Writes ncnn's calibration table of a model, for ncnn2int8 or ncnn itself.

    The table has rows for each Conv2d (depthwise too) and Linear whose weight is quantized. Such a
    layer has to read a quantized value, directly or through ReLU and operations that only move or
    pick values: max pooling, dropout, reshaping, slicing, padding by 0 and so on. Quantizers that
    no such layer reads are left out, because ncnn computes in float there. With these in FLOAT,
    VALIDATION computes what ncnn does, except for ties, which ncnn rounds away from zero.

    Args:
        model: calibrated, in VALIDATION.
        example_inputs: arguments of the model's forward, as a tensor, a tuple of positional or a
            mapping of keyword arguments. The forward is traced with them, to see which quantizer
            each layer reads.
        path: ends in ``.table``; the file appears complete or not at all.
        names: ncnn's name of the layer for each module; by default the modules' own names.

    Returns:
        Which quantizers are in the table, and which were left out and why.

    Raises:
        ValueError: by name, for quantizers that are not symmetric on [-127, 127]
            (``quant_min=-127``), activations per channel, weights on another axis than 0 or with
            several scales in one group; weights of other layers; layers whose input is not
            quantized; names that ncnn cannot read (blanks, ``_param_``, more than 247 bytes); and
            for a model that torch.export cannot trace.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    who = "export.ncnn_table"
    target = check_path(who, path, ".table")
    prepared = PreparedModel(who, model)
    chosen, left_out = entries(prepared)
    grouped = {name: entry.groups for name, entry in chosen.items() if entry.groups}
    refuse(who, grouped, "ncnn has one scale for an output channel")
    program = trace(who, model, example_inputs, dynamic_batch=False)
    owners = {
        name: prepared.weights[entry.quantizer].owner
        for name, entry in chosen.items()
        if entry.is_weight
    }
    layers, problems = layers_of(program, owners)
    _check_quantizers(who, chosen, layers.items(), problems, left_out)
    if not layers:
        raise ValueError(f"{who}: expected model to have a quantized Conv2d or Linear, got none")
    keys = network_names(who, names, [owners[name] for name in layers])
    _check_keys(who, keys)
    rows = [(key, name, layers[name]) for name in layers for key in keys[owners[name]]]
    return _write(who, target, chosen, left_out, rows)


def ncnn_table_of(
    model: nn.Module, layers: Mapping[str, Mapping[str, str | int]], path: PathLike
) -> ExportReport:
    """Writes ncnn's calibration table for layers that the caller lists.

    Nothing is traced, so ``model`` may be what ``torch_ext.read_quantizers`` returns.

    Args:
        model: calibrated, in VALIDATION; or the quantizers of a file.
        layers: for ncnn's name of each layer, a mapping with ``weight`` and ``input``, the names of
            its quantizers; ``groups`` of a convolution (default 1); ``channels``, the number of
            output channels, required if its weight has one scale for all of them::

                {"conv1": {"weight": "conv1.parametrizations.weight.0", "input": "x_quantizer"}}

        path: ends in ``.table``; the file appears complete or not at all.

    Returns:
        Which quantizers are in the table, and which were left out and why.

    Raises:
        ValueError: as :func:`ncnn_table` for grids and names; for layers whose ``weight`` or
            ``input`` is no such quantizer, and for quantized weights that no layer names.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    who = "export.ncnn_table_of"
    target = check_path(who, path, ".table")
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(f"{who}: expected layers to be a mapping of layers, got {layers!r:.80}")
    chosen, left_out = entries(PreparedModel(who, model))
    rows = [(key, *_parse_layer(f"{who}: {key}", layer, chosen)) for key, layer in layers.items()]
    _check_quantizers(who, chosen, [row[1:] for row in rows], {}, left_out)
    _check_keys(who, network_names(who, None, layers))
    return _write(who, target, chosen, left_out, rows)


def _parse_layer(who: str, layer: Any, chosen: Mapping[str, Entry]) -> tuple[str, Layer]:
    """Reads an entry of ``layers``: the name of its weight's quantizer, and the layer."""
    if not isinstance(layer, Mapping) or not {"weight", "input"} <= layer.keys() <= _LAYER_KEYS:
        want = "weight and input, and perhaps groups and channels"
        raise ValueError(f"{who}: expected a mapping of {want}, got {layer!r:.80}")
    for role in ("weight", "input"):
        known = [name for name, entry in chosen.items() if entry.is_weight == (role == "weight")]
        if layer[role] not in known:
            have = f"{layer[role]!r:.80}"
            raise ValueError(f"{who}: unknown {role} {have}; known: {shown(known)}")
    scales = len(chosen[layer["weight"]].scale)
    groups, channels = layer.get("groups", 1), layer.get("channels", scales)
    for key, value in (("groups", groups), ("channels", channels)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise ValueError(
                f"{who}: expected {key} to be an integer of 1 or more, got {value!r:.80}"
            )
    if scales == 1 and "channels" not in layer:
        raise ValueError(f"{who}: expected channels, as its weight has one scale for all")
    if channels % groups or scales not in (1, channels):
        raise ValueError(
            f"{who}: expected channels to be the weight's number of output channels and a multiple "
            f"of groups, got {channels} with {groups} groups and {scales} scales"
        )
    return layer["weight"], Layer(layer["input"], channels, groups)


def _check_quantizers(
    who: str,
    chosen: Mapping[str, Entry],
    layers: Iterable[tuple[str, Layer]],
    problems: dict[str, str],
    left_out: dict[str, str],
) -> None:
    """Adds activations that no layer reads to `left_out`; raises for what the table cannot hold.

    `layers` are pairs of a weight's quantizer and its layer; `problems` are those found so far.
    """
    pairs = list(layers)
    weights, read = {weight for weight, _ in pairs}, {layer.input for _, layer in pairs}
    for name, entry in chosen.items():
        if entry.is_weight and name not in weights and name not in problems:
            problems[name] = f"it is of a layer that has no row: {_UNREAD}"
        if not entry.is_weight and name not in read:
            left_out[name] = _UNREAD
        elif problem := _grid_problem(entry):
            problems.setdefault(name, problem)
    refuse(who, problems, f"take symmetric qschemes with quant_min=-127; or {TO_FLOAT}")


def _write(
    who: str,
    target: Path,
    chosen: Mapping[str, Entry],
    left_out: Mapping[str, str],
    rows: list[tuple[str, str, Layer]],
) -> ExportReport:
    """Writes the table; each row is the layer's key, its weight's quantizer, and the layer."""
    lines = [
        f"{key}{_WEIGHT}0 {_numbers(_weight_scales(who, chosen[weight], layer))}"
        for key, weight, layer in rows
    ]
    lines += [f"{key} {_numbers(chosen[layer.input].scale)}" for key, _, layer in rows]
    write_atomically(target, "\n".join([*lines, ""]).encode())
    used = {name for _, weight, layer in rows for name in (weight, layer.input)}
    return ExportReport(
        str(target), "ncnn table", tuple(name for name in chosen if name in used), left_out
    )


def _grid_problem(entry: Entry) -> str:
    """Why ncnn cannot use a quantizer's grid; empty if it can."""
    grid = entry.params
    if entry.groups:
        return entry.groups
    if (grid.quant_min, grid.quant_max) != (-127, 127):
        return f"its grid is {grid.values}, not [-127, 127]"
    if bool(entry.zero_point.any()):
        return "its zero point is not 0"
    if grid.ch_axis > 0 or (grid.ch_axis == 0 and not entry.is_weight):
        return f"it is per channel on axis {grid.ch_axis}"
    return ""


def _weight_scales(who: str, entry: Entry, layer: Layer) -> Tensor:
    """The weight's scales: one per output channel, or one per group if there are several."""
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
    """Multipliers 1 / scale, as the shortest decimals that read back as the same float32."""
    inverse = (1 / scale.double()).float().numpy()
    return " ".join(np.format_float_positional(value, unique=True, trim="0") for value in inverse)


def _check_keys(who: str, keys: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError for keys that ncnn could not read; `keys` are names by our layer."""
    problems = {}
    for layer, layer_keys in keys.items():
        for key in layer_keys:
            if " " in key or _WEIGHT in key:
                problems[layer] = (
                    f"expected its name to be without ' ' and {_WEIGHT}, got {bounded(key)}"
                )
            elif len(f"{key}{_WEIGHT}0".encode()) > _LONGEST_KEY:
                problems[layer] = f"expected its key to be of at most {_LONGEST_KEY} bytes"
    refuse(who, problems, "pass names={module: name in the network}")


def read_ncnn_table(path: PathLike) -> NcnnTable:
    """Reads a table of this library or of ncnn2table; as in ncnn, a blank line ends it.

    Raises:
        FileError: a ValueError with the file and the line that is wrong.
        FileNotFoundError: if there is no such file.
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
