"""What the GPU's cases work on: statistics on a device, and buffers that rotate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import distributions
from case import MI, NONE, Ceiling, Goals, Run
from cases.observe import MANTISSA_BITS, OCTAVES
from gpu.native import rotating
from torch_ext import ops

ROTATED_BYTES = 128 * MI  # more than twice the largest second-level cache


class Statistic:
    """The three tensors that ``observe_`` fills, on a device."""

    def __init__(self, device: torch.device, channels: int = 1, histogram: bool = False) -> None:
        bins = (OCTAVES, 1 << MANTISSA_BITS) if histogram else (0, 0)
        empty = torch.tensor([[float("inf"), float("-inf")]], device=device)
        self.extrema = empty.repeat(channels, 1)
        self.tally = torch.zeros(channels, 5, dtype=torch.int64, device=device)
        self.counts = torch.zeros(channels, 2, *bins, dtype=torch.int64, device=device)

    def observing(self, x: Tensor, ch_axis: int = -1) -> Run:
        return functools.partial(
            ops.observe_, x, self.extrema, self.tally, self.counts, ch_axis=ch_axis
        )


@dataclass(frozen=True)
class Inputs:
    """As many buffers as do not fit the cache together; `all` is [buffers, elements]."""

    all: Tensor

    @property
    def each(self) -> list[Tensor]:
        return list(self.all.unbind(0))

    @property
    def first(self) -> Tensor:
        return self.all[0]

    def calls(self, function: Callable[[Tensor], Run]) -> Run:
        return rotating([function(x) for x in self.each])

    def ceiling(self, kind: str, limits: Goals = NONE) -> Ceiling:
        return Ceiling(kind, self.all, limits)


def inputs(
    device: torch.device, size: int, dtype: torch.dtype = torch.float32, kind: str = "gauss"
) -> Inputs:
    make = distributions.gauss if kind == "gauss" else distributions.DISTRIBUTIONS[kind]
    buffers = max(1, ROTATED_BYTES // (size * torch.empty(0, dtype=dtype).element_size()))
    if device.type == "cpu":
        buffers = min(buffers, 2)
    return Inputs(make(size * buffers, device=device).to(dtype).view(buffers, size))
