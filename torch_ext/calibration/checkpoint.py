"""Checkpoint files of a calibration: its statistics, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_ext.files.quantizer_params import (
    FIELDS,
    STATISTIC,
    check_shapes,
    check_statistic,
    spec_of,
)
from torch_ext.files.storage import FileError, PathLike, read_tensors, write_tensors
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.utils.arguments import bounded

_KIND = "calibration"
_VERSION = 1
_RNG = "rng_state"


@dataclass(frozen=True)
class Progress:
    """How far a calibration has come."""

    #: Number of batches in the statistics.
    batches: int
    #: Number of samples in the statistics.
    samples: int
    #: Hash of the last batch's contents, see ``digest``.
    last_digest: str
    #: Torch's random state before the loader was iterated, uint8.
    rng_state: Tensor


def write_progress(
    path: PathLike, quantizers: Mapping[str, FakeQuantize], progress: Progress
) -> None:
    """Writes the quantizers' statistics and the progress to a file, atomically."""
    tensors: dict[str, Tensor] = {_RNG: progress.rng_state}
    for name, quantizer in quantizers.items():
        state = quantizer.state_dict()
        tensors |= {f"{name}.{field}".strip("."): state[field] for field in STATISTIC}
    content = {
        "quantizers": {name: spec_of(quantizer) for name, quantizer in quantizers.items()},
        "batches": progress.batches,
        "samples": progress.samples,
        "last_digest": progress.last_digest,
    }
    write_tensors(path, tensors, _KIND, _VERSION, content)


def read_progress(path: PathLike, quantizers: Mapping[str, FakeQuantize]) -> Progress | None:
    """Reads a checkpoint into the observers; returns None if there is no file.

    Raises:
        FileError: the file is damaged, or its quantizers have other names, rules, options, grids
            or shapes than ``quantizers``. No observer is changed then.
    """
    if not Path(path).exists():
        return None
    tensors, content = read_tensors(path, _KIND, _VERSION)
    if not isinstance(content, dict):
        raise FileError(path, "description: expected an object")
    _check_specs(path, content.get("quantizers"), quantizers)
    batches, samples = (_count(path, content, key) for key in ("batches", "samples"))
    last = content.get("last_digest")
    if not isinstance(last, str):
        raise FileError(path, f"last_digest: expected text, got {bounded(last)}")

    loaded: list[tuple[Tensor, Tensor]] = []
    for name, quantizer in quantizers.items():
        loaded += _read_statistic(path, tensors, name, quantizer)
    rng_state = tensors.get(_RNG)
    current = torch.get_rng_state()
    if rng_state is None or rng_state.shape != current.shape or rng_state.dtype != current.dtype:
        raise FileError(path, f"{_RNG}: expected {list(current.shape)} bytes")
    with torch.no_grad():
        for buffer, value in loaded:
            buffer.copy_(value)
    return Progress(batches, samples, last, rng_state)


def _count(path: PathLike, content: Mapping[str, Any], key: str) -> int:
    value = content.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise FileError(path, f"{key}: expected a count, got {bounded(value)}")
    return value


def _check_specs(path: PathLike, specs: Any, quantizers: Mapping[str, FakeQuantize]) -> None:
    """Raises FileError if the specs of the file are not those of the quantizers."""
    if not isinstance(specs, dict):
        raise FileError(path, "quantizers: missing from the description")
    if set(specs) != set(quantizers):
        other = sorted(set(specs) ^ set(quantizers))
        raise FileError(
            path,
            f"quantizers: of another model: differs in {', '.join(other[:10])}; delete the file to "
            "start over",
        )
    for name, quantizer in quantizers.items():
        mine = spec_of(quantizer)
        theirs = specs[name] if isinstance(specs[name], dict) else {}
        for key in {**mine, **theirs}:
            want, have = mine.get(key), theirs.get(key)
            if want != have:
                raise FileError(path, f"{name}.{key}: expected {want!r}, got {bounded(have)}")


def _read_statistic(
    path: PathLike, tensors: Mapping[str, Tensor], name: str, quantizer: FakeQuantize
) -> list[tuple[Tensor, Tensor]]:
    """Checks the statistic of one quantizer; returns its buffers with the values to copy in."""
    keys = {field: f"{name}.{field}".strip(".") for field in STATISTIC}
    values = {field: tensors[key] for field, key in keys.items() if key in tensors}
    shapes = {field: FIELDS[field] for field in STATISTIC}
    try:
        rows = len(quantizer.observer.extrema)
        check_shapes(values, shapes, quantizer.observer.channel_len, rows)
        check_statistic(values)
        want, have = quantizer.observer.counts.shape, values["observer.counts"].shape
        if want != have:
            raise ValueError(f"observer.counts: expected {list(want)}, got {list(have)}")
    except ValueError as error:
        raise FileError(path, f"{name}.{error}") from error
    return [(quantizer.get_buffer(field), value) for field, value in values.items()]
