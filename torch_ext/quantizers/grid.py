"""Parses the arguments that describe the grid of a quantizer: integers, or a float format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from torch_ext import _C
from torch_ext.ops.grid_text import grid_text, words
from torch_ext.quantizers.parts.groups import INPUT_AXIS
from torch_ext.utils.arguments import parse_integer

_NAME = re.compile(r"(?:torch\.)?q?(u?)int(\d+)")
MIN_BITS, MAX_BITS = 2, 16
_KNOWN_DTYPES = (
    "int4, uint4, int8, uint8, int16, uint16 and others of 2 to 16 bits, float8_e4m3, "
    "float8_e5m2, float6_e2m3, float6_e3m2, float4_e2m1"
)

# The float formats of quantizers, by all their names.
_FLOATS = {name: name for name in _C.float_formats()} | {"float8_e4m3fn": "float8_e4m3"}

# Grids that are dtypes of Torch; the others are given as text, such as "int4".
_TORCH_DTYPES = {
    str(dtype): dtype for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16)
}
_SCHEMES = {
    str(scheme): scheme
    for scheme in (
        torch.per_tensor_symmetric,
        torch.per_tensor_affine,
        torch.per_channel_symmetric,
        torch.per_channel_affine,
    )
}

_PER_CHANNEL = {
    torch.per_tensor_symmetric: torch.per_channel_symmetric,
    torch.per_tensor_affine: torch.per_channel_affine,
}

DType = torch.dtype | str


def parse_dtype(who: str, dtype: object) -> tuple[DType, Any, Any]:
    """The normalized dtype, and its least and greatest value.

    ``torch.int8``, ``"int8"``, ``"qint8"`` and ``torch.qint8`` all give ``torch.int8``. Dtypes that
    Torch lacks stay text, such as ``"int4"``. Float formats are text: ``"float8_e4m3"``, also for
    ``torch.float8_e4m3fn``.

    Raises:
        ValueError: neither an integer dtype of 2 to 16 bits nor a known float format.
    """
    if isinstance(dtype, (str, torch.dtype)):
        floats = _FLOATS.get(str(dtype).removeprefix("torch."))
        if floats is not None:
            largest = _C.float_formats()[floats]["largest"]  # 7.5 of float6_e2m3, else an integer
            largest = int(largest) if largest == int(largest) else largest
            return floats, -largest, largest
    match = _NAME.fullmatch(str(dtype)) if isinstance(dtype, (str, torch.dtype)) else None
    bits = int(match[2]) if match and len(match[2]) < 3 else 0
    if not match or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{who}: unknown dtype {dtype!r}; known: {_KNOWN_DTYPES}")
    name = f"{match[1]}int{bits}"
    low, high = (0, 2**bits - 1) if match[1] else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return _TORCH_DTYPES.get(f"torch.{name}", name), low, high


def is_float(dtype: DType) -> bool:
    """Whether a normalized dtype is a float format."""
    return isinstance(dtype, str) and dtype in _FLOATS


def needs_groups(dtype: DType) -> bool:
    """Whether a format has so few levels that a scale for few values alone suits it."""
    return is_float(dtype) and dtype_bits(dtype) < 8


def largest_step(dtype: DType) -> float:
    """The largest step between neighbours on the grid, in units of the scale."""
    return _C.float_formats()[str(dtype)]["last_step"] if is_float(dtype) else 1.0


def dtype_name(dtype: DType) -> str:
    """The dtype as text, without ``torch.``."""
    return str(dtype).removeprefix("torch.")


def text_of_grid(
    dtype: DType,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    scale_rule: str = "grid",
    power_of_two: bool = False,
) -> str:
    """A quantizer's grid as the text that ops take."""
    how = (symmetric, scale_rule, power_of_two)
    return f"{dtype}{words(*how)}" if is_float(dtype) else grid_text(quant_min, quant_max, *how)


def dtype_bits(dtype: DType) -> int:
    """The number of bits of a dtype that :func:`parse_dtype` accepts."""
    if is_float(dtype):
        return int(_C.float_formats()[str(dtype)]["bits"])
    return int(dtype_name(dtype).partition("int")[2])


def parse_qscheme(who: str, qscheme: object) -> torch.qscheme:
    """The qscheme of a name such as ``"per_tensor_affine"``; ValueError lists the known ones."""
    name = str(qscheme)
    name = name if name.startswith("torch.") else f"torch.{name}"
    if not isinstance(qscheme, (str, torch.qscheme)) or name not in _SCHEMES:
        known = ", ".join(n.removeprefix("torch.") for n in _SCHEMES)
        raise ValueError(f"{who}: unknown qscheme {qscheme!r}; known: {known}")
    return _SCHEMES[name]


@dataclass(frozen=True)
class Grid:
    """A checked grid, and the axis of its channels.

    The ends of a float format are its least and its largest number. With ``group_size`` each group
    of values along ``ch_axis`` counts as a channel, and the qscheme is one per channel.
    """

    dtype: DType
    qscheme: torch.qscheme
    quant_min: int
    quant_max: int
    ch_axis: int  # -1: per tensor
    channel_len: int
    group_size: int | None = None

    @property
    def symmetric(self) -> bool:
        return self.qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)

    @property
    def per_channel(self) -> bool:
        return self.ch_axis >= 0


def _check_float(
    who: str, dtype: DType, scheme: torch.qscheme, ends: Mapping[str, tuple[object, int]]
) -> None:
    """Raises ValueError for what a float format does not have: a zero point, or other ends."""
    if scheme not in (torch.per_tensor_symmetric, torch.per_channel_symmetric):
        name = str(scheme).removeprefix("torch.")
        raise ValueError(f"{who}: expected qscheme to be symmetric with {dtype}, got {name}")
    for name, (given, end) in ends.items():
        if given is not None and given != end:
            raise ValueError(f"{who}: expected {name} to be {end} with {dtype}, got {given}")


def grid_of_bits(grid: Grid, bits: int) -> Grid:
    """The same kind of grid with 2 to 16 bits: of its signedness, scheme and channels.

    [-127, 127] becomes [-7, 7] with 4 bits, [-128, 127] becomes [-8, 7]. Of its own width it is
    the grid itself, which may be narrower than its dtype. Another width than that of a float format
    is an integer grid's.
    """
    if bits == dtype_bits(grid.dtype):
        return grid
    sign = "u" if dtype_name(grid.dtype).startswith("u") else ""
    dtype, low, high = parse_dtype("grid_of_bits", f"{sign}int{bits}")
    if grid.quant_min in (0, -grid.quant_max):
        low = 0 if grid.quant_min == 0 else -high
    return replace(grid, dtype=dtype, quant_min=low, quant_max=high)


def parse_grid(
    who: str,
    dtype: object,
    qscheme: object,
    ch_axis: object,
    channel_len: object,
    quant_min: object,
    quant_max: object,
    group_size: object = None,
    in_groups: bool = False,
) -> Grid:
    """Checks the arguments of an :class:`Observer` that describe its grid.

    ``quant_min`` and ``quant_max`` may be None, for the ends of the dtype. With ``group_size`` the
    scheme only says whether the grid is symmetric. ``in_groups``: scales are of a few values each
    although there is no ``group_size``, as they are computed elsewhere.

    Raises:
        TypeError: a number is no int.
        ValueError: an unknown dtype or qscheme, or numbers that do not fit it or each other.
    """
    parsed, low, high = parse_dtype(who, dtype)
    scheme = parse_qscheme(who, qscheme)
    if needs_groups(parsed) and group_size is None and not in_groups:
        raise ValueError(
            f"{who}: expected group_size with {parsed}, got None: one scale for a whole tensor or "
            "channel does not suit so few levels"
        )
    if is_float(parsed):
        ends = {"quant_min": (quant_min, low), "quant_max": (quant_max, high)}
        _check_float(who, parsed, scheme, ends)
        quant_min = quant_max = None
    least = low if quant_min is None else parse_integer(who, "quant_min", quant_min, low, high)
    most = high if quant_max is None else parse_integer(who, "quant_max", quant_max, low, high)
    if not (least < most and least <= 0 <= most):
        raise ValueError(
            f"{who}: expected quant_min < quant_max and quant_min <= 0 <= quant_max, "
            f"got {least} and {most}"
        )
    axis = parse_integer(who, "ch_axis", ch_axis, -1, 63)
    channels = parse_integer(who, "channel_len", channel_len, 1, 2**31 - 1)
    if group_size is not None:
        size = parse_integer(who, "group_size", group_size, 2, 2**31 - 1)
        axis = INPUT_AXIS if axis < 0 else axis
        return Grid(parsed, _PER_CHANNEL.get(scheme, scheme), least, most, axis, channels, size)
    per_channel = scheme in (torch.per_channel_symmetric, torch.per_channel_affine)
    name = str(scheme).removeprefix("torch.")
    if per_channel and axis < 0:
        raise ValueError(f"{who}: expected ch_axis to be 0 or more with {name}, got {axis}")
    if not per_channel and axis >= 0:
        raise ValueError(f"{who}: expected ch_axis to be -1 with {name}, got {axis}")
    if not per_channel and channels != 1:
        raise ValueError(f"{who}: expected channel_len to be 1 with {name}, got {channels}")
    return Grid(parsed, scheme, least, most, axis, channels)
