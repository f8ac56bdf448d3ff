"""Two files of quantizers side by side: how far apart their ranges and scales are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_ext.files.quantizer_params import Params


@dataclass(frozen=True)
class Difference:
    """A quantizer of two files.

    ``scale`` and ``range`` are the largest relative differences over the channels, each relative
    to the larger magnitude of the two sides; infinite where there is nothing to compare, as
    ``note`` says.
    """

    name: str
    scale: float
    range: float
    zero_point: int
    note: str = ""

    @property
    def largest(self) -> float:
        return max(self.scale, self.range)


@dataclass(frozen=True)
class Comparison:
    """Largest difference first."""

    rows: tuple[Difference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def within(self, tolerance: float) -> bool:
        """Whether both have the same quantizers, and none differs by more."""
        apart = [row for row in self.rows if row.largest > tolerance]
        return not (apart or self.only_first or self.only_second)


def compare(first: Mapping[str, Params], second: Mapping[str, Params]) -> Comparison:
    """One range on one side is compared with those of all channels on the other."""
    rows = [_difference(name, first[name], second[name]) for name in first if name in second]
    rows.sort(key=lambda row: (-row.largest, row.name))
    return Comparison(
        tuple(rows),
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


def _difference(name: str, one: Params, two: Params) -> Difference:
    note = ""
    if not (one.solved and two.solved):
        sides = [side for side, params in (("A", one), ("B", two)) if not params.solved]
        note = f"no range in {' and '.join(sides)}"
    elif 1 not in (one.channels, two.channels) and one.channels != two.channels:
        note = f"{one.channels} and {two.channels} channels"
    if note:
        # Two that have no range are equal in that.
        apart = 0.0 if one.solved == two.solved and not one.solved else math.inf
        return Difference(name, apart, apart, 0, note)
    ranges = [params["range"].double() for params in (one, two)]
    reach = torch.maximum(*(range_.abs().amax(1) for range_ in ranges))
    points = (one["zero_point"].long() - two["zero_point"].long()).abs()
    scales = [params["scale"].double() for params in (one, two)]
    return Difference(
        name,
        _largest((scales[0] - scales[1]).abs(), torch.maximum(*scales)),
        _largest((ranges[0] - ranges[1]).abs().amax(1), reach),
        int(points.max()),
    )


def _largest(difference: Tensor, reach: Tensor) -> float:
    return float((difference / torch.where(reach > 0, reach, torch.ones_like(reach))).max())
