"""A layer as a product of matrices: its input, unfolded, times the rows of its weight.

Every convolution, transposed convolution and linear function computes, for each of its groups and
each position of its output, ``outputs [rows] = weight [rows, inputs] @ values [inputs]``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_CONVOLUTIONS = {getattr(F, f"conv{n}d"): n for n in (1, 2, 3)}
_TRANSPOSED = {getattr(F, f"conv_transpose{n}d"): n for n in (1, 2, 3)}
# What follows input, weight and bias in their signatures.
_OPTIONS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_OPTIONS = ("stride", "padding", "output_padding", "groups", "dilation")


class LayerRows(NamedTuple):
    """How one call of a function reads its input and its weight."""

    kernel: tuple[int, ...]  # of a linear function empty
    transposed: bool
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # before and after, of each axis
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, function: Any, weight: Tensor, options: Any, named: Any) -> LayerRows:
        """That of a call with these arguments after input, weight and bias."""
        if function is F.linear:
            return cls((), False, (), (), (), 1)
        transposed = function in _TRANSPOSED
        dims = (_TRANSPOSED if transposed else _CONVOLUTIONS)[function]
        names = _TRANSPOSED_OPTIONS if transposed else _OPTIONS
        given = dict(zip(names, options, strict=False)) | named
        kernel = tuple(weight.shape[2:])
        stride = _each(given.get("stride", 1), dims)
        dilation = _each(given.get("dilation", 1), dims)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = given.get("padding", 0)
        if isinstance(padding, str):
            padding = 0 if padding == "valid" else [(r // 2, r - r // 2) for r in reach]
        else:
            padding = [(p, p) for p in _each(padding, dims)]
        pads = padding if padding else [(0, 0)] * dims
        if transposed:
            more = _each(given.get("output_padding", 0), dims)
            pads = [(r - p, r - p + m) for r, (p, _), m in zip(reach, pads, more, strict=True)]
        return cls(kernel, transposed, stride, tuple(pads), dilation, int(given.get("groups", 1)))

    @property
    def _axes(self) -> int:
        return len(self.kernel)

    def of_weight(self, weight: Tensor) -> Tensor:
        """The weight as [groups, rows, inputs]."""
        if not self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        parts = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return parts.flip(self._kernel_axes()).flatten(3).flatten(2) if self.kernel else parts

    def to_weight(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The weight, of this shape, of which ``rows`` are the rows."""
        if not self.transposed:
            return rows.reshape(shape)
        per_group = shape[0] // self.groups
        parts = rows.reshape(self.groups, shape[1], per_group, *self.kernel)
        return parts.flip(self._kernel_axes()).transpose(1, 2).reshape(shape)

    def _kernel_axes(self) -> list[int]:
        return list(range(3, 3 + self._axes))

    def of_output(self, output: Tensor) -> Tensor:
        """What the function made as a view [*positions, channels]."""
        if not self.kernel:  # of a linear function all positions are one axis
            return output.reshape(-1, output.shape[-1])
        if output.dim() == self._axes + 1:  # a single sample without a batch axis
            output = output.unsqueeze(0)
        return output.movedim(1, -1)

    def of_input(self, x: Tensor) -> Tensor:
        """What the function reads as a view [*positions, groups, channels / groups, *kernel]."""
        if not self.kernel:
            return x.reshape(-1, 1, x.shape[-1])
        if x.dim() == self._axes + 1:
            x = x.unsqueeze(0)
        stride = self.stride
        if self.transposed:
            sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
            spread = x.new_zeros(*x.shape[:2], *sizes)
            index: Any = (..., *(slice(None, None, s) for s in stride))
            spread[index] = x
            x, stride = spread, (1,) * self._axes
        x = F.pad(x, list(itertools.chain(*reversed(self.pads))))
        for i, (k, s, d) in enumerate(zip(self.kernel, stride, self.dilation, strict=True)):
            x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
        x = x.reshape(len(x), self.groups, x.shape[1] // self.groups, *x.shape[2:])
        # [batch, groups, channels / groups, *positions, *kernel]
        return x.movedim((1, 2), (1 + self._axes, 2 + self._axes))

    @property
    def position_axes(self) -> int:
        """How many axes positions have: that of the batch, and those of the kernel."""
        return self._axes + 1

    def values(self, view: Tensor, chosen: Tensor) -> Tensor:
        """Of :meth:`of_input`'s view, the values at chosen positions: [groups, chosen, inputs]."""
        return _take(view, self.position_axes, chosen).flatten(2).transpose(0, 1)

    def outputs(self, made: Tensor, chosen: Tensor | None) -> Tensor:
        """What the function made, at the chosen positions or all: [groups, positions, rows]."""
        view = self.of_output(made)
        axes = self.position_axes
        taken = view.flatten(0, axes - 1) if chosen is None else _take(view, axes, chosen)
        return taken.reshape(len(taken), self.groups, taken.shape[1] // self.groups).transpose(0, 1)

    def positions(self, made: Tensor) -> int:
        """The number of positions of what the function made."""
        return math.prod(self.of_output(made).shape[:-1])


def _take(view: Tensor, axes: int, chosen: Tensor) -> Tensor:
    """The chosen of the positions that the first ``axes`` axes of a view count."""
    return view[torch.unravel_index(chosen, view.shape[:axes])]


def _each(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(value)
    return values * dims if len(values) == 1 else values
