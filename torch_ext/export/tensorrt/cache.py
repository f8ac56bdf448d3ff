"""TensorRT's calibration cache, up to TensorRT 10: one scale for each tensor of the network.

The first line of the text has the version and the algorithm. One line per tensor follows: its name,
a colon, a space, and the bits of the float32 scale in hexadecimal, most significant digit first::

    TRT-8601-EntropyCalibration2
    images: 3c010a14

The scale is the step of the int8 grid: the range ends at 127 times the scale.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from torch_ext.export.common.entries import (
    TO_FLOAT,
    Entry,
    ExportReport,
    check_path,
    entries,
    refuse,
    split_lines,
)
from torch_ext.export.common.network_names import Names, network_names
from torch_ext.files.storage import FileError, PathLike, name_problem, write_atomically
from torch_ext.quantizers.find import PreparedModel
from torch_ext.utils.arguments import bounded

ALGORITHMS = ("EntropyCalibration2", "MinMaxCalibration")
_LAST_MAJOR = 10  # 11 has no calibrators
_HEADER = re.compile(r"TRT-(\d{4,6})-(\w{1,64})")
_BITS = re.compile(r"[0-9a-fA-F]{1,8}")
_INFINITY = 0x7F800000  # bits of inf; greater ones are NaN, or have the sign of a negative number
_LIMIT = 64 * 2**20
WEIGHT_REASON = "TensorRT quantizes weights itself, per channel, by max|w|"


@dataclass(frozen=True)
class TensorrtCache:
    """The contents of a calibration cache."""

    #: The version of TensorRT, such as ``"8.6.1"``.
    version: str
    #: The calibration algorithm, such as ``"EntropyCalibration2"``.
    algorithm: str
    #: The scales by the network's tensors; 0 for a tensor that was all zero.
    scales: Mapping[str, float]


def tensorrt_cache(
    model: nn.Module,
    path: PathLike,
    version: str | None = None,
    algorithm: str = "EntropyCalibration2",
    names: Names = None,
) -> ExportReport:
    """Writes the scales of a model's activations as a TensorRT calibration cache.

    TensorRT uses the cache if its version and algorithm are those of the builder and its
    calibrator; otherwise it calibrates again without a message. The algorithm has no other effect.
    Weights are not in the cache: the builder quantizes them by max|w| per output channel, as
    ``weight_observer="min_max"`` with ``quant_min=-127`` does.

    Args:
        model: calibrated, in VALIDATION.
        path: with any suffix but that of another format; the file appears complete or not at all.
        version: of the TensorRT that will read the cache, such as ``"8.6.1"``; by default that of
            the installed package ``tensorrt``. At most 10, as TensorRT 11 reads no caches.
        algorithm: ``"EntropyCalibration2"`` (default; what trtexec and Polygraphy expect) or
            ``"MinMaxCalibration"``. It need not match the observers that found the scales.
        names: the network's tensors for each quantizer: a mapping to one name or several, or an
            ONNX file of :func:`onnx`, which lists them. By default the quantizers' own names.

    Returns:
        Which quantizers are in the cache, and which were left out and why.

    Raises:
        ValueError: by name, for quantizers that are not symmetric int8 per tensor, that have no
            name in the network or share it; for an invalid version or an unknown algorithm; for a
            model without quantizers of activations.
        FileNotFoundError: if the folder of ``path`` does not exist.
    """
    who = "export.tensorrt_cache"
    target = check_path(who, path, None)
    text, report = cache_text(who, model, version, algorithm, names)
    write_atomically(target, text.encode())
    return ExportReport(str(target), "TensorRT cache", *report)


def cache_text(
    who: str, model: nn.Module, version: str | None, algorithm: str, names: Names
) -> tuple[str, tuple[tuple[str, ...], dict[str, str]]]:
    """The text of a cache; then the quantizers in it, and those left out with the reason.

    Arguments and errors are those of :func:`tensorrt_cache`.
    """
    header = f"TRT-{_encode_version(who, version)}-{_check_algorithm(who, algorithm)}"
    chosen, left_out = entries(PreparedModel(who, model))
    activations = {name: entry for name, entry in chosen.items() if not entry.is_weight}
    left_out |= {name: WEIGHT_REASON for name, entry in chosen.items() if entry.is_weight}
    problems = {
        name: problem for name, entry in activations.items() if (problem := _problem(entry))
    }
    refuse(who, problems, f'take dtype="int8", symmetric, per tensor; or {TO_FLOAT}')
    if not activations:
        raise ValueError(f"{who}: expected model to have activation quantizers, got none")
    lines = [header]
    for name, tensors in network_names(who, names, activations).items():
        scale = float(activations[name].scale)
        lines += [f"{tensor}: {encode_scale(scale)}" for tensor in tensors]
    return "\n".join([*lines, ""]), (tuple(activations), left_out)


def encode_scale(scale: float) -> str:
    """A scale's bits as eight hexadecimal digits, with leading zeros, which some readers need."""
    return struct.pack(">f", scale).hex()


def _problem(entry: Entry) -> str:
    """Why a cache cannot hold a quantizer of an activation; empty if it can."""
    grid = entry.params
    if grid.channels > 1 or grid.ch_axis >= 0:
        return f"it is per channel (axis {grid.ch_axis})"
    if grid.quant_min not in (-128, -127) or grid.quant_max != 127:
        return f"its grid is {grid.values}"
    if bool(entry.zero_point.any()):
        return f"its zero point is {int(entry.zero_point)}"
    return ""


def _encode_version(who: str, version: str | None) -> int:
    """The version as in the first line: 8.6.1 is 8601, and from TensorRT 10 on 10.3.0 is 100300.

    None is the version of the installed package. Raises ValueError for text that is no version, for
    TensorRT 11 and later, and for None without the package.
    """
    if version is None:
        try:
            import tensorrt
        except ImportError as error:
            raise ValueError(
                f"{who}: expected version to be that of the TensorRT which will read the cache, "
                'such as "8.6.1", got None, and the package tensorrt is not installed'
            ) from error
        version = tensorrt.__version__
    match = re.match(r"(\d{1,2})\.(\d{1,2})\.(\d{1,2})(\.|$)", str(version))
    if not match or not isinstance(version, str):
        raise ValueError(f'{who}: expected version to be such as "8.6.1", got {bounded(version)}')
    major, minor, patch = (int(part) for part in match.groups()[:3])
    if major > _LAST_MAJOR:
        raise ValueError(
            f"{who}: expected version to be at most {_LAST_MAJOR}, got {version}, which has no "
            'calibrators; take export.onnx(..., profile="tensorrt")'
        )
    if major < _LAST_MAJOR and minor > 9:
        raise ValueError(f'{who}: expected version to be such as "8.6.1", got {bounded(version)}')
    return major * (10000 if major >= _LAST_MAJOR else 1000) + minor * 100 + patch


def _decode_version(code: int) -> str:
    """The inverse of :func:`_encode_version`: 8601 is 8.6.1."""
    unit = 10000 if code >= _LAST_MAJOR * 10000 else 1000
    return f"{code // unit}.{code % unit // 100}.{code % 100}"


def _check_algorithm(who: str, algorithm: str) -> str:
    if algorithm not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise ValueError(f"{who}: unknown algorithm {algorithm!r}; known: {known}")
    return algorithm


def read_tensorrt_cache(path: PathLike) -> TensorrtCache:
    """Reads a cache that this library or TensorRT wrote, of any algorithm.

    Names may hold colons and spaces; a scale may lack leading zeros.

    Raises:
        FileError: a ValueError with the file and the line that is wrong.
        FileNotFoundError: if there is no such file.
    """
    with open(path, "rb") as file:
        return parse_cache(path, file.read(_LIMIT + 1))


def parse_cache(path: PathLike, data: bytes) -> TensorrtCache:
    """Reads a cache from a file's bytes, as :func:`read_tensorrt_cache`; `path` is for errors."""
    lines = split_lines(path, data, _LIMIT)
    header = _HEADER.fullmatch(lines[0]) if lines else None
    if not header:
        have = repr(lines[0][:80]) if lines else "an empty file"
        raise FileError(path, f"line 1: expected TRT-<version>-<algorithm>, got {have}")
    scales: dict[str, float] = {}
    for number, line in enumerate(lines[1:], start=2):
        name, colon, digits = line.rpartition(": ")
        if not colon or not _BITS.fullmatch(digits):
            raise FileError(
                path, f"line {number}: expected a name, ': ' and 1 to 8 digits, got {line[:80]!r}"
            )
        if problem := name_problem(name):
            raise FileError(path, f"line {number}: expected a name to be {problem}")
        if name in scales:
            raise FileError(path, f"line {number}: {name[:80]!r} stands there twice")
        scale = struct.unpack(">f", bytes.fromhex(digits.zfill(8)))[0]
        if int(digits, 16) >= _INFINITY:
            raise FileError(path, f"line {number}: expected a scale of 0 or more, got {scale}")
        scales[name] = scale
    return TensorrtCache(_decode_version(int(header[1])), header[2], scales)
