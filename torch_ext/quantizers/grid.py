"""Parsing of the keys that say which integer grid a tensor is quantized to."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from torch_ext.utils.arguments import parse_integer

_NAME = re.compile(r"(?:torch\.)?q?(u?)int(\d+)")
_MIN_BITS, _MAX_BITS = 2, 16
_KNOWN_DTYPES = "int4, uint4, int8, uint8, int16, uint16 and others of 2 to 16 bits"

# Dtypes that Torch holds numbers in; the others are known by name alone.
_PLAIN = {str(d): d for d in (torch.int8, torch.uint8, torch.int16, torch.uint16)}
_SCHEMES = {
    str(s): s
    for s in (
        torch.per_tensor_symmetric,
        torch.per_tensor_affine,
        torch.per_channel_symmetric,
        torch.per_channel_affine,
    )
}

DType = torch.dtype | str


def parse_dtype(who: str, dtype: object) -> tuple[DType, int, int]:
    """The dtype under one name, and its least and greatest value.

    ``torch.int8``, ``"int8"``, ``"qint8"`` and ``torch.qint8`` are the same grid.
    """
    found = _NAME.fullmatch(str(dtype)) if isinstance(dtype, (str, torch.dtype)) else None
    bits = int(found[2]) if found and len(found[2]) < 3 else 0
    if not found or not _MIN_BITS <= bits <= _MAX_BITS:
        raise ValueError(f"{who}: unknown dtype {dtype!r}; known: {_KNOWN_DTYPES}")
    name = f"{found[1]}int{bits}"
    low, high = (0, 2**bits - 1) if found[1] else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return _PLAIN.get(f"torch.{name}", name), low, high


def dtype_name(dtype: DType) -> str:
    return str(dtype).removeprefix("torch.")


def parse_qscheme(who: str, qscheme: object) -> torch.qscheme:
    name = str(qscheme)
    name = name if name.startswith("torch.") else f"torch.{name}"
    if not isinstance(qscheme, (str, torch.qscheme)) or name not in _SCHEMES:
        known = ", ".join(n.removeprefix("torch.") for n in _SCHEMES)
        raise ValueError(f"{who}: unknown qscheme {qscheme!r}; known: {known}")
    return _SCHEMES[name]


@dataclass(frozen=True)
class Grid:
    """A checked grid and the axis it varies along."""

    dtype: DType
    qscheme: torch.qscheme
    quant_min: int
    quant_max: int
    ch_axis: int
    channel_len: int

    @property
    def symmetric(self) -> bool:
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    @property
    def per_channel(self) -> bool:
        return self.ch_axis >= 0


def parse_grid(
    who: str,
    dtype: object,
    qscheme: object,
    ch_axis: object,
    channel_len: object,
    quant_min: object,
    quant_max: object,
) -> Grid:
    parsed, low, high = parse_dtype(who, dtype)
    scheme = parse_qscheme(who, qscheme)
    least = low if quant_min is None else parse_integer(who, "quant_min", quant_min, low, high)
    most = high if quant_max is None else parse_integer(who, "quant_max", quant_max, low, high)
    if not (least < most and least <= 0 <= most):
        raise ValueError(
            f"{who}: expected quant_min < quant_max and quant_min <= 0 <= quant_max, "
            f"got {least} and {most}"
        )
    axis = parse_integer(who, "ch_axis", ch_axis, -1, 63)
    channels = parse_integer(who, "channel_len", channel_len, 1, 2**31 - 1)
    per_channel = scheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    name = str(scheme).removeprefix("torch.")
    if per_channel and axis < 0:
        raise ValueError(f"{who}: expected ch_axis to be 0 or more with {name}, got {axis}")
    if not per_channel and axis >= 0:
        raise ValueError(f"{who}: expected ch_axis to be -1 with {name}, got {axis}")
    if not per_channel and channels != 1:
        raise ValueError(f"{who}: expected channel_len to be 1 with {name}, got {channels}")
    return Grid(parsed, scheme, least, most, axis, channels)
