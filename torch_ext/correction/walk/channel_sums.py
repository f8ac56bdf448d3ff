"""Means of what layers make, for each output channel, over all data and positions."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 4096  # whose sum is taken at once


class ChannelSums:
    """Sums in float64 over tensors of several modules, by the modules' names."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # float64 [channels]
        self.squares: dict[str, Tensor] = {}  # the same of the squares
        self.counts: dict[str, int] = {}  # of values in each channel

    def add(self, name: str, x: Tensor, ch_axis: int) -> None:
        """Adds a tensor with its channels on an axis."""
        channels = x.detach().movedim(ch_axis, 0).reshape(x.shape[ch_axis], -1)
        total = channels.sum(1, dtype=torch.float64)
        squares = torch.linalg.vector_norm(channels, dim=1, dtype=torch.float64).square()
        if name in self.sums:
            total, squares = total + self.sums[name], squares + self.squares[name]
        self.sums[name], self.squares[name] = total, squares
        self.counts[name] = self.counts.get(name, 0) + channels.shape[1]

    def add_sums(self, name: str, x: Tensor, ch_axis: int) -> None:
        """Adds a tensor to the sums alone, in a tenth of the time.

        Sums of at most one image or 4096 rows are taken in float32, which is below the rounding of
        the values themselves; what is wider stays so.
        """
        x = x.detach()
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        if ch_axis == -1:
            rows = x.reshape(-1, x.shape[-1])
            parts = torch.stack([part.sum(0, dtype=wide) for part in torch.split(rows, _ROWS)])
            count = rows.shape[0]
        else:
            parts = x.flatten(ch_axis + 1).sum(-1, dtype=wide).reshape(-1, x.shape[ch_axis])
            count = x.numel() // max(1, x.shape[ch_axis])
        total = parts.sum(0, dtype=torch.float64)
        self.sums[name] = total + self.sums[name] if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def mean(self, name: str) -> Tensor:
        """The mean of each channel, float64."""
        return self.sums[name] / self.counts[name]

    def variance(self, name: str) -> Tensor:
        """The variance of each channel, with N - 1, float64."""
        count = self.counts[name]
        centred = self.squares[name] / count - self.mean(name).square()
        return centred.clamp(min=0) * (count / (count - 1))

    def power(self, name: str) -> float:
        """The root mean square of all values."""
        squares = self.squares[name]
        return float((squares.sum() / (self.counts[name] * len(squares))).sqrt())

    def not_finite(self) -> list[str]:
        """Names of the modules with a NaN or an infinite value."""
        return [name for name, s in self.squares.items() if not bool(s.isfinite().all())]
