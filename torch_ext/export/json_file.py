"""JSON of ranges, qparams, rules and options, and of each statistic what is not its histogram.

``calibration.schema.json``, beside this file, is its JSON Schema.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext._C import build_info
from torch_ext.export.common.entries import Entry, ExportReport, check_path, entries
from torch_ext.files.quantizer_params import STATISTIC, Params, params_from, spec_of
from torch_ext.files.storage import FileError, PathLike, name_problem, read_object, write_atomically
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.text import label_of

_FORMAT = "torch_ext.calibration"
_VERSION = 1
_LIMIT = 256 * 2**20
_DIGEST_LENGTH = 64
_ROLES = ("input", "output", "weight")

SCHEMA = Path(__file__).with_name("calibration.schema.json")


@dataclass(frozen=True)
class QuantizerRecord:
    """A quantizer as a file describes it."""

    of: str  # "input", "output" or "weight"
    spec: Mapping[str, Any]  # method, observer, options, dtype, qscheme, quant_min, ...
    range: Tensor  # float32 [C,2]
    scale: Tensor  # float32 [C]
    zero_point: Tensor  # int32 [C]
    extrema: Tensor  # float32 [C,2], inf and -inf where nothing was seen
    tally: Tensor  # int64 [C,5]
    digest: str  # SHA-256 of the statistic, histogram included


@dataclass(frozen=True)
class Calibration:
    """The contents of a file of :func:`json`."""

    quantizers: Mapping[str, QuantizerRecord]
    left_out: Mapping[str, str]


def json(model: nn.Module, path: PathLike) -> ExportReport:
    """Writes everything that is known of a model's quantizers, as JSON; the model in VALIDATION.

    For each quantizer: what it is of, method, rule and options, grid, ``range`` [C,2], ``scale``
    [C], ``zero_point`` [C], and of the statistic ``extrema`` [C,2], ``tally`` [C,5] (finite, zeros,
    tiny, inf, nan) and ``sha256``, see :func:`statistic_digest`. Numbers read back bit for bit.
    Quantizers in FLOAT, and those that saw no data and pass through, are under ``left_out``.

    Args:
        path: ends in ``.json``; appears complete or not at all.

    Raises:
        ValueError: quantizers in another state or without a range, by name.
    """
    who = "export.json"
    target = check_path(who, path, ".json")
    chosen, left_out = entries(PreparedModel(who, model))
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "torch_ext": build_info()["version"],
        "quantizers": {name: _record(entry) for name, entry in chosen.items()},
        "left_out": left_out,
    }
    text = dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(target, (text + "\n").encode())
    return ExportReport(str(target), "JSON", tuple(chosen), left_out)


def statistic_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a statistic: for extrema, tally and counts the shape as text, then the values as
    they lie in memory, least significant byte first."""
    digest = hashlib.sha256()
    for field in STATISTIC:
        tensor = tensors[field].detach().cpu().contiguous()
        digest.update(f"{field}{list(tensor.shape)}".encode())
        plain = tensor.numpy()
        digest.update(plain.astype(plain.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _record(entry: Entry) -> dict[str, Any]:
    params = entry.params
    extrema = params["observer.extrema"].tolist()
    return {
        "of": entry.role,
        **spec_of(entry.quantizer),
        "synced": params.synced,
        "range": params["range"].tolist(),
        "scale": params["scale"].tolist(),
        "zero_point": params["zero_point"].tolist(),
        "statistic": {
            "extrema": [[x if math.isfinite(x) else None for x in row] for row in extrema],
            "tally": params["observer.tally"].tolist(),
            "sha256": statistic_digest(params.tensors),
        },
    }


def read_json(path: PathLike) -> Calibration:
    """The contents of a file of :func:`json`, checked value by value.

    Raises FileError (a ValueError) with the file and the field that is wrong.
    """
    document = read_object(path, _LIMIT)
    if document.get("format") != _FORMAT:
        raise FileError(path, f"format: expected {_FORMAT!r}, got {_shown(document.get('format'))}")
    version = document.get("version")
    if version != _VERSION or isinstance(version, bool):
        raise FileError(path, f"version: this release reads {_VERSION}, got {_shown(version)}")
    _check_keys(path, "document", document, {"format", "version", "torch_ext", *_OBJECTS})
    for field in _OBJECTS:
        if not isinstance(document[field], dict):
            raise FileError(path, f"{field}: expected an object, got {_shown(document[field])}")
        for name in document[field]:
            if name and (problem := name_problem(name)):
                raise FileError(path, f"{field}: expected names to be {problem}, got {name[:80]!r}")
    if not document["quantizers"]:
        raise FileError(path, "quantizers: expected at least one, got none")
    for name, why in document["left_out"].items():
        if not isinstance(why, str):
            raise FileError(path, f"left_out.{name}: expected text, got {_shown(why)}")
    found = {}
    for name, record in document["quantizers"].items():
        try:
            found[name] = _parse_record(record)
        except ValueError as error:
            raise FileError(path, f"{label_of(name)}.{error}") from error
    return Calibration(found, document["left_out"])


_OBJECTS = ("quantizers", "left_out")
# Name -> dtype of the numbers.
_VALUES = {"range": torch.float32, "scale": torch.float32, "zero_point": torch.int32}
_SPEC = (
    "method", "averaging_constant", "observer", "options", "dtype", "qscheme", "ch_axis",
    "channel_len", "quant_min", "quant_max", "scale_rule", "power_of_two", "mantissa_bits",
    "octaves", "histogram", "transient", "synced",
)  # fmt: skip
_LEARNED = ("use_grad_scaling", "learn_zero_point")


def _check_keys(path: PathLike, where: str, have: Mapping[str, Any], want: set[str]) -> None:
    for key in (*sorted(want - have.keys()), *sorted(have.keys() - want)):
        raise FileError(
            path, f"{where}: {'missing' if key in want else 'unknown'} key {key[:80]!r}"
        )


def _parse_record(record: Any) -> QuantizerRecord:
    """ValueError says which field is wrong, and how."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_shown(record)}")
    want = {"of", *_SPEC, *_VALUES, "statistic"}
    for key in (*sorted(want - record.keys()), *sorted(record.keys() - want - {*_LEARNED})):
        kind = "missing" if key in want else "unknown"
        raise ValueError(f"{key[:80]}: {kind}")
    if record["of"] not in _ROLES:
        raise ValueError(f"of: expected one of {', '.join(_ROLES)}, got {_shown(record['of'])}")
    statistic = record["statistic"]
    if not isinstance(statistic, dict) or statistic.keys() != {"extrema", "tally", "sha256"}:
        raise ValueError("statistic: expected an object of extrema, tally and sha256")
    digest = statistic["sha256"]
    if not (
        isinstance(digest, str)
        and len(digest) == _DIGEST_LENGTH
        and not digest.strip("0123456789abcdef")
    ):
        raise ValueError(f"statistic.sha256: expected 64 hexadecimal digits, got {_shown(digest)}")
    tensors = {field: _tensor(field, record[field], dtype) for field, dtype in _VALUES.items()}
    tensors["solved"] = torch.ones(1, dtype=torch.uint8)
    tensors["observer.extrema"] = _extrema(statistic["extrema"])
    tensors["observer.tally"] = _tensor("statistic.tally", statistic["tally"], torch.int64)
    channels = len(tensors["scale"])
    tensors["observer.counts"] = torch.empty(channels, 2, 0, 0, dtype=torch.int64)
    spec = {key: record[key] for key in (*_SPEC, *_LEARNED) if key in record}
    params: Params = params_from(tensors, spec, histogram=False)
    return QuantizerRecord(
        of=record["of"],
        spec=spec,
        range=params["range"],
        scale=params["scale"],
        zero_point=params["zero_point"],
        extrema=params["observer.extrema"],
        tally=params["observer.tally"],
        digest=digest,
    )


def _tensor(field: str, values: Any, dtype: torch.dtype) -> Tensor:
    """Numbers in lists, one or two deep; whole ones where the dtype is."""
    kinds = (int, float) if dtype.is_floating_point else (int,)

    def numbers(one: Any) -> bool:
        return isinstance(one, kinds) and not isinstance(one, bool)

    rows = values if isinstance(values, list) else None
    if not rows or not all(
        numbers(row) or (isinstance(row, list) and all(map(numbers, row))) for row in rows
    ):
        kind = "numbers" if dtype.is_floating_point else "whole numbers"
        raise ValueError(f"{field}: expected a list of {kind}, got {_shown(values)}")
    try:
        return torch.tensor(rows, dtype=dtype, device="cpu")
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{field}: {error}") from error


def _extrema(rows: Any) -> Tensor:
    """Null where no finite value was seen."""
    if isinstance(rows, list):
        rows = [[math.inf, -math.inf] if row == [None, None] else row for row in rows]
    return _tensor("statistic.extrema", rows, torch.float32)


def _shown(value: Any) -> str:
    return repr(value)[:80]
