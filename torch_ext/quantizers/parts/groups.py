"""Groups: consecutive values of a weight along an axis that share a scale.

Ops see a grouped weight as a matrix with one group a row, ``[G, group_size]``: the values of an
axis, then of the others in their order. Everything that is per channel in an op is per row then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_ext import ops

#: The axis that groups lie along by default: the inputs of linear and convolution layers.
INPUT_AXIS = 1
# Bytes of the histograms of the groups that are solved at a time: a histogram takes more memory
# than a group, so those of a whole weight would take a hundred times as much as the weight.
_AT_ONCE = 2**26


def check_groups(who: str, group_size: int | None, has_values: bool) -> None:
    """Raises ValueError for groups of a quantizer that has no values at hand to solve them from."""
    if group_size is not None and not has_values:
        raise ValueError(
            f"{who}: expected group_size to be None but for a weight (transient=True), got "
            f"{group_size}: the scales of an activation's groups come from the values that are "
            "quantized, which is dynamic=True"
        )


def rows_of(x: Tensor, axis: int, group_size: int) -> Tensor:
    """A tensor as one group a row; raises RuntimeError if the groups do not fill its axis."""
    if axis >= x.dim() or x.shape[axis] % group_size:
        raise RuntimeError(
            f"FakeQuantize: expected x to be of groups of {group_size} along axis {axis}, got "
            f"shape {list(x.shape)}"
        )
    return x.movedim(axis, -1).reshape(-1, group_size)


def from_rows(rows: Tensor, x: Tensor, axis: int) -> Tensor:
    """The inverse of :func:`rows_of`, with the shape and the strides of ``x``."""
    moved = x.movedim(axis, -1)
    values = rows.reshape(moved.shape).movedim(-1, axis)
    # A convolution whose weight has other strides than before may give its result other ones too.
    return values if values.stride() == x.stride() else torch.empty_like(x).copy_(values)


def blocks_of(values: Tensor, shape: Sequence[int], axis: int, group_size: int) -> Tensor:
    """One value a group [G] in the weight's layout: its shape, with the axis counted in groups."""
    sizes = [*shape[:axis], *shape[axis + 1 :], shape[axis] // group_size]
    return values.reshape(sizes).movedim(-1, axis)


def spread(values: Tensor, shape: Sequence[int], axis: int, group_size: int | None) -> Tensor:
    """One value a channel or a group [C] as one a value, in a shape; axis -1: a single one."""
    if group_size is not None:
        return blocks_of(values, shape, axis, group_size).repeat_interleave(group_size, axis)
    sizes = [-1 if i == axis else 1 for i in range(len(shape))] if axis >= 0 else [1] * len(shape)
    return values.reshape(sizes).expand(torch.Size(shape))


def follow_rows_(
    rows: Tensor,
    range_: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    solved: Tensor,
    averaging_constant: float,
    **arguments: Any,
) -> None:
    """``ops.follow_`` by a rule that reads histograms, of some groups at a time.

    The result is that of one call, whose histograms would not fit into memory.
    """
    bins = 2 * arguments["octaves"] * 2 ** arguments["mantissa_bits"]
    count = max(1, _AT_ONCE // (8 * bins))
    flags = []
    for begin in range(0, len(rows), count):
        part = slice(begin, begin + count)
        flags.append(solved.clone())  # each part moves as the flag tells that was found
        tensors = (range_[part], scale[part], zero_point[part], flags[-1])
        ops.follow_(rows[part], *tensors, averaging_constant, **arguments)
    solved.copy_(torch.stack(flags).amax(0))
