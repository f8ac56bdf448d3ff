"""What groups of a weight become, by numpy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from reference.fake_quant import fake_quant
from reference.grid import Grid


def by_numpy(x: Tensor, size: int, affine: bool, low: int, high: int) -> Tensor:
    """Each group of inputs by itself, from the definition: min and max, scale, rounding."""
    values, out = x.numpy(), np.empty(x.shape, np.float32)
    for o in range(x.shape[0]):
        for first in range(0, x.shape[1], size):
            for position in np.ndindex(*x.shape[2:]):
                index = (o, slice(first, first + size), *position)
                least, most = values[index].astype(np.float64).min(), values[index].max()
                least, most = min(float(least), 0.0), max(float(most), 0.0)
                if affine:
                    scale = (most - least) / (high - low)
                    point = np.clip(np.rint(low - least * (high - low) / (most - least)), low, high)
                else:
                    scale, point = 2 * max(-least, most) / (high - low), 0
                grid = Grid(low, high, not affine)
                out[index] = fake_quant(values[index], np.float32(scale), np.float32(point), grid)
    return torch.from_numpy(out)
