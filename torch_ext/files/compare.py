"""Compares the ranges, scales and zero points of two files of quantizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_ext.files.quantizer_params import Params


@dataclass(frozen=True)
class Difference:
    """How far a quantizer differs between two files.

    A relative difference is divided by the larger magnitude of the two sides.
    """

    #: Name of the quantizer.
    name: str
    #: Largest relative difference of the scales over the channels; infinite if only one side has a
    #: range, the numbers of channels differ, or dynamic scales are computed in another way.
    scale: float
    #: Largest relative difference of the ranges' ends over the channels; infinite as above.
    range: float
    #: Largest absolute difference of the zero points.
    zero_point: int
    #: Why the two sides cannot be compared, or in what their formats differ; else empty.
    note: str = ""

    @property
    def largest(self) -> float:
        """The larger of the two relative differences."""
        return max(self.scale, self.range)


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`."""

    #: Quantizers of both files, the largest difference first.
    rows: tuple[Difference, ...]
    #: Names of quantizers that only the first file has.
    only_first: tuple[str, ...]
    #: Names of quantizers that only the second file has.
    only_second: tuple[str, ...]

    def within(self, tolerance: float) -> bool:
        """Whether both files have the same quantizers, and no relative difference is larger."""
        exceeding = [row for row in self.rows if row.largest > tolerance]
        return not (exceeding or self.only_first or self.only_second)


def compare(first: Mapping[str, Params], second: Mapping[str, Params]) -> Comparison:
    """Compares two mappings of quantizer names to parameters, as files hold them.

    A per-tensor range is compared with every channel of a per-channel one. Formats that differ are
    noted; scales that are dynamic are equal if they are computed in the same way.
    """
    rows = [_difference(name, first[name], second[name]) for name in first if name in second]
    rows.sort(key=lambda row: (-row.largest, row.name))
    return Comparison(
        tuple(rows),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


# What decides, beside the range, which values a quantizer gives; and dynamic ones also by these.
_FORMAT = ("dtype", "dynamic", "scale_rule", "power_of_two", "scale_dtype")
_DYNAMIC = ("qscheme", "group_size", "ch_axis")
_ENDS = ("quant_min", "quant_max")


def _formats(first: Params, second: Params) -> str:
    """In what the formats differ: ``dtype int8 and float8_e4m3``; empty if in nothing."""
    keys: tuple[str, ...] = _FORMAT
    if first.is_dynamic and second.is_dynamic:
        keys += _DYNAMIC + (_ENDS if first.spec["dtype"] == second.spec["dtype"] else ())
    usual = {"dynamic": False, "scale_dtype": None, "group_size": None}
    sides = [usual | dict(params.spec) for params in (first, second)]
    pairs = [(key, *(side[key] for side in sides)) for key in keys]
    return ", ".join(f"{key} {one} and {two}" for key, one, two in pairs if one != two)


def _difference(name: str, first: Params, second: Params) -> Difference:
    note = ""
    formats = _formats(first, second)
    if formats and (first.is_dynamic or second.is_dynamic):
        return Difference(name, math.inf, math.inf, 0, formats)
    if first.group_size != second.group_size:
        note = f"{first.groups} and {second.groups}"
    elif not (first.solved and second.solved):
        sides = [side for side, params in (("A", first), ("B", second)) if not params.solved]
        note = f"no range in {' and '.join(sides)}"
    elif 1 not in (first.channels, second.channels) and first.channels != second.channels:
        note = f"{first.channels} and {second.channels} channels"
    if note:
        # If neither side has a range, they do not differ.
        difference = 0.0 if not (first.solved or second.solved) else math.inf
        return Difference(name, difference, difference, 0, note)
    ranges = [params["range"].double() for params in (first, second)]
    magnitude = torch.maximum(*(range_.abs().amax(1) for range_ in ranges))
    points = (first["zero_point"].long() - second["zero_point"].long()).abs()
    scales = [params["scale"].double() for params in (first, second)]
    return Difference(
        name,
        _largest((scales[0] - scales[1]).abs(), torch.maximum(*scales)),
        _largest((ranges[0] - ranges[1]).abs().amax(1), magnitude),
        int(points.max()),
        formats,
    )


def _largest(difference: Tensor, magnitude: Tensor) -> float:
    """The largest relative difference; where the magnitude is 0, the difference is 0 too."""
    divisor = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude))
    return float((difference / divisor).max())
