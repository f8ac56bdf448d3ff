"""JSON of ranges, scales, zero points, rules and options, and of statistics without histograms.

``calibration.schema.json``, beside this module, is the JSON Schema of the file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping
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
    """A quantizer of a file of :func:`json`.

    C is its number of channels, 1 per tensor, or of groups, whose statistic is of all together.
    """

    #: ``"input"``, ``"output"`` or ``"weight"``, whichever it quantizes.
    of: str
    #: Its settings, such as ``method``, ``observer``, ``options``, ``dtype``, ``qscheme`` and
    #: ``quant_min``.
    spec: Mapping[str, Any]
    #: The ends of the range, float32 [C,2].
    range: Tensor
    #: float32 [C].
    scale: Tensor
    #: int32 [C].
    zero_point: Tensor
    #: The least and the greatest value seen, float32 [C,2]; inf and -inf where none was.
    extrema: Tensor
    #: How many values were finite, zero, tiny, infinite and NaN, int64 [C,5].
    tally: Tensor
    #: SHA-256 of the statistic, histogram included, as 64 hexadecimal digits.
    digest: str


@dataclass(frozen=True)
class Calibration:
    """The contents of a file of :func:`json`."""

    #: The quantizers by name.
    quantizers: Mapping[str, QuantizerRecord]
    #: Names of the quantizers that the file does not describe, with the reason.
    left_out: Mapping[str, str]


def json(model: nn.Module, path: PathLike) -> ExportReport:
    """Writes the settings, ranges and statistics of a model's quantizers as JSON.

    For each quantizer: what it quantizes, method, rule and options, grid, ``range`` [C,2],
    ``scale`` [C], ``zero_point`` [C], and of the statistic ``extrema`` [C,2], ``tally`` [C,5]
    (finite, zeros, tiny, inf, nan) and ``sha256``, a digest that covers the histogram too. Numbers
    read back bit for bit. Quantizers in FLOAT, and those that saw no data and pass values through,
    are listed under ``left_out``.

    Args:
        model: calibrated, in VALIDATION.
        path: ends in ``.json``; the file appears complete or not at all.

    Returns:
        Which quantizers are in the file, and which were left out and why.

    Raises:
        ValueError: for quantizers in another state or without a range, by name; for another
            suffix; for a model without quantizers.
        FileNotFoundError: if the folder of ``path`` does not exist.
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
    """SHA-256 of a statistic, as 64 hexadecimal digits.

    Hashes extrema, tally and counts in this order: for each its name and shape as text, then its
    values in C order, each least significant byte first.
    """
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
    """Reads a file of :func:`json` and checks every value.

    Raises:
        FileError: a ValueError with the file and the field that is wrong.
        FileNotFoundError: if there is no such file.
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
    quantizers = {}
    for name, record in document["quantizers"].items():
        try:
            quantizers[name] = _parse_record(record)
        except ValueError as error:
            raise FileError(path, f"{label_of(name)}.{error}") from error
    return Calibration(quantizers, document["left_out"])


_OBJECTS = ("quantizers", "left_out")
# The fields that become tensors, with their dtypes.
_VALUES = {"range": torch.float32, "scale": torch.float32, "zero_point": torch.int32}
_SPEC = (
    "method", "averaging_constant", "observer", "options", "dtype", "qscheme", "ch_axis",
    "channel_len", "quant_min", "quant_max", "scale_rule", "power_of_two", "mantissa_bits",
    "octaves", "histogram", "transient", "synced",
)  # fmt: skip
_OPTIONAL = ("use_grad_scaling", "learn_zero_point", "group_size")


def _check_keys(path: PathLike, where: str, have: Mapping[str, Any], want: set[str]) -> None:
    """Raises FileError for the first key that is missing or unknown."""
    if problem := _key_problem(have, want):
        raise FileError(path, f"{where}.{problem}")


def _key_problem(
    have: Mapping[str, Any], want: set[str], optional: Collection[str] = ()
) -> str | None:
    """The first key that is missing or unknown, and which of both it is."""
    for key in (*sorted(want - have.keys()), *sorted(have.keys() - want - set(optional))):
        return f"{key[:80]}: {'missing' if key in want else 'unknown'}"
    return None


def _parse_record(record: Any) -> QuantizerRecord:
    """Reads a quantizer's record; raises ValueError that names the field and what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_shown(record)}")
    want = {"of", *_SPEC, *_VALUES, "statistic"}
    if problem := _key_problem(record, want, _OPTIONAL):
        raise ValueError(problem)
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
    rows = len(tensors["observer.extrema"])
    tensors["observer.counts"] = torch.empty(rows, 2, 0, 0, dtype=torch.int64)
    spec = {key: record[key] for key in (*_SPEC, *_OPTIONAL) if key in record}
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
    """A tensor of a list of numbers, or of a list of such lists; raises ValueError for others.

    An integer dtype takes whole numbers only.
    """
    kinds = (int, float) if dtype.is_floating_point else (int,)

    def is_number(value: Any) -> bool:
        return isinstance(value, kinds) and not isinstance(value, bool)

    rows = values if isinstance(values, list) else None
    if not rows or not all(
        is_number(row) or (isinstance(row, list) and all(map(is_number, row))) for row in rows
    ):
        kind = "numbers" if dtype.is_floating_point else "whole numbers"
        raise ValueError(f"{field}: expected a list of {kind}, got {_shown(values)}")
    try:
        return torch.tensor(rows, dtype=dtype, device="cpu")
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{field}: {error}") from error


def _extrema(rows: Any) -> Tensor:
    """The extrema [C,2]: a row of nulls, where no finite value was seen, becomes inf and -inf."""
    if isinstance(rows, list):
        rows = [[math.inf, -math.inf] if row == [None, None] else row for row in rows]
    return _tensor("statistic.extrema", rows, torch.float32)


def _shown(value: Any) -> str:
    return repr(value)[:80]
