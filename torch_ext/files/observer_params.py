"""Carrying quantization parameters from model to model, directly or through a file."""

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
    """Saves every quantizer's range, parameters, statistic and keys, as one safetensors file.

    The file appears complete or not at all. Values that could not be loaded again (a scale of 0,
    say) are refused.
    """
    who = "save_observer_params"
    quantizers = PreparedModel(who, model).quantizers
    write_params(who, {name: params_of(quantizer) for name, quantizer in quantizers.items()}, path)


def write_params(who: str, found: Mapping[str, Params], path: PathLike) -> None:
    """Writes what :func:`read_observer_params` reads."""
    tensors: dict[str, Tensor] = {}
    specs = {}
    for name, params in found.items():
        own = {key: value.detach().cpu() for key, value in params.tensors.items()}
        try:
            check_parameters(params)
            check_statistic(own)
        except ValueError as error:
            raise ValueError(f"{who}: {label_of(name)}.{error}") from error
        specs[name] = {**params.spec, "synced": params.synced}
        tensors |= {f"{name}.{key}".strip("."): value for key, value in own.items()}
    write_tensors(path, tensors, _KIND, _VERSION, {"quantizers": specs})


def read_observer_params(path: PathLike) -> dict[str, Params]:
    """The contents of a file of :func:`save_observer_params`, checked value by value.

    Raises a ValueError ``FILE: FIELD: what is wrong with it``, or OSError.
    """
    tensors, extra = read_tensors(Path(path), _KIND, _VERSION)
    specs = extra.get("quantizers") if isinstance(extra, dict) else None
    if not isinstance(specs, dict):
        raise FileError(path, "quantizers: missing from the description")
    found: dict[str, Params] = {}
    used = 0
    for name, spec in specs.items():
        if name and (problem := name_problem(name)):
            raise FileError(path, f"quantizers: expected names to be {problem}, got {name[:80]!r}")
        keys = {key: f"{name}.{key}".strip(".") for key in FIELDS}
        own = {key: tensors[full] for key, full in keys.items() if full in tensors}
        used += len(own)
        try:
            found[name] = params_from(own, spec)
        except ValueError as error:
            raise FileError(path, f"{label_of(name)}.{error}") from error
    if used != len(tensors):
        known = {f"{name}.{key}".strip(".") for name in specs for key in FIELDS}
        stranger = next((key for key in tensors if key not in known), "quantizers")
        raise FileError(path, f"{stranger}: belongs to no quantizer of the description")
    return found
