"""Saves and reads files of observer parameters: ranges, qparams and statistics by quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from torch_ext.files.quantizer_params import (
    FIELDS,
    Params,
    check_parameters,
    check_statistic,
    params_from,
    params_of,
)
from torch_ext.files.storage import FileError, PathLike, name_problem, read_tensors, write_tensors
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.text import label_of

_KIND = "observer_params"
_VERSION = 1


def save_observer_params(model: nn.Module, path: PathLike) -> None:
    """Saves every quantizer's range, qparams, statistic and configuration in a safetensors file.

    The ranges of weights that have one are first solved from the present weights, in the model too.
    With FSDP2, whose weights are sharded, every rank has to make this call.

    Args:
        model: a prepared model, wrapped or not, or what :func:`read_quantizers` returned.
        path: the file, which is written completely or not at all.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no quantizers, a weight without a finite value, or values that could not be
            loaded again, such as a scale of 0.
        FileError: names that are not printable or too long, or too much data.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    who = "save_observer_params"
    prepared = PreparedModel(who, model)
    for name, why in prepared.refresh_weights().items():
        raise ValueError(f"{who}: {label_of(name)}: {why}")
    quantizers = prepared.quantizers
    write_params(who, {name: params_of(quantizer) for name, quantizer in quantizers.items()}, path)


def write_params(who: str, quantizers: Mapping[str, Params], path: PathLike) -> None:
    """Writes the file that :func:`read_observer_params` reads; ``who`` is named in errors."""
    tensors: dict[str, Tensor] = {}
    specs = {}
    for name, params in quantizers.items():
        on_cpu = {field: tensor.detach().cpu() for field, tensor in params.tensors.items()}
        try:
            check_parameters(params)
            check_statistic(on_cpu)
        except ValueError as error:
            raise ValueError(f"{who}: {label_of(name)}.{error}") from error
        specs[name] = {**params.spec, "synced": params.synced}
        tensors |= {f"{name}.{field}".strip("."): tensor for field, tensor in on_cpu.items()}
    write_tensors(path, tensors, _KIND, _VERSION, {"quantizers": specs})


def read_observer_params(path: PathLike) -> dict[str, Params]:
    """The parameters in a file of :func:`save_observer_params`, by quantizer name.

    Every value is checked.

    Raises:
        FileError: invalid contents; the message names the file and the field.
        OSError: the file cannot be read.
    """
    tensors, extra = read_tensors(Path(path), _KIND, _VERSION)
    specs = extra.get("quantizers") if isinstance(extra, dict) else None
    if not isinstance(specs, dict):
        raise FileError(path, "quantizers: missing from the description")
    quantizers: dict[str, Params] = {}
    used = 0
    for name, spec in specs.items():
        if name and (problem := name_problem(name)):
            raise FileError(path, f"quantizers: expected names to be {problem}, got {name[:80]!r}")
        keys = {field: f"{name}.{field}".strip(".") for field in FIELDS}
        fields = {field: tensors[key] for field, key in keys.items() if key in tensors}
        used += len(fields)
        try:
            quantizers[name] = params_from(fields, spec)
        except ValueError as error:
            raise FileError(path, f"{label_of(name)}.{error}") from error
    if used != len(tensors):
        known = {f"{name}.{field}".strip(".") for name in specs for field in FIELDS}
        unknown = next((key for key in tensors if key not in known), "quantizers")
        raise FileError(path, f"{unknown}: belongs to no quantizer of the description")
    return quantizers
