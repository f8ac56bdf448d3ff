"""Data that is hard on a histogram, on windows and on roundings; sizes around block boundaries."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from sample_data import sample

FLOAT_MAX = torch.finfo(torch.float32).max
LEAST_NORMAL = 2.0**-126


def _random(n: int) -> np.random.Generator:
    return np.random.default_rng([n, 17])


def _mixed(n: int) -> Tensor:
    x = sample("gauss", n)
    x[::5], x[1::7], x[2::11], x[3::13] = torch.nan, torch.inf, -torch.inf, 0.0
    return x


def _spread(n: int) -> Tensor:
    """Signs and exponents -120 to 120 at random, growing windows all the time."""
    random = _random(n)
    exponents = random.integers(-120, 121, n)
    values = random.uniform(1, 2, n) * random.choice([-1.0, 1.0], n) * 2.0**exponents
    return torch.from_numpy(values).float()


def _growing(n: int) -> Tensor:
    """The octave of the largest value moves up all the way through."""
    rise = torch.linspace(-60, 60, n, dtype=torch.float64) if n else torch.empty(0)
    return (sample("gauss", n).double() * torch.exp2(rise)).float()


def _half_zero(n: int) -> Tensor:
    x = sample("gauss", n).relu()
    x[1::3] = -0.0
    return x


ZOO: dict[str, Callable[[int], Tensor]] = {
    "gauss": lambda n: sample("gauss", n),
    "uniform": lambda n: sample("uniform", n),
    "relu": _half_zero,
    "constant": lambda n: torch.full((n,), 1.7),
    "two_constants": lambda n: torch.tensor([0.3, -900.0]).repeat(n // 2 + 1)[:n],
    "lognormal": lambda n: torch.from_numpy(_random(n).lognormal(0, 3, n)).float(),
    "small_integers": lambda n: torch.from_numpy(_random(n).integers(-8, 9, n)).float(),
    "one_outlier": lambda n: torch.cat([sample("gauss", max(n - 1, 0)), torch.full((1,), 1e6)])[:n],
    "outlier_first": lambda n: torch.cat([torch.full((1,), -1e30), sample("gauss", n)])[:n],
    "denormals": lambda n: sample("gauss", n) * 1e-40,
    "around_the_least": lambda n: sample("gauss", n) * (4 * LEAST_NORMAL),
    "float_max": lambda n: torch.where(sample("gauss", n) > 0, FLOAT_MAX, -FLOAT_MAX),
    "mixed": _mixed,
    "all_nan": lambda n: torch.full((n,), torch.nan),
    "all_inf": lambda n: torch.full((n,), -torch.inf),
    "all_zero": lambda n: torch.zeros(n) * torch.tensor([1.0, -1.0]).repeat(n // 2 + 1)[:n],
    "growing": _growing,
    "falling": lambda n: _growing(n).flip(0),
    "spread": _spread,
}

# Warps, blocks, tiles and vectors end at powers of two, or at odd multiples of small ones.
AROUND = sorted({max(2**k + d, 0) for k in range(18) for d in (-1, 0, 1)})
FEW = [0, 1, 33, 1000, 4099, 70_001]


def misaligned(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The same values, with the first at every distance from a 16-byte boundary."""
    for offset in range(16 // x.element_size()):
        memory = x.new_zeros(x.numel() + offset)
        memory[offset:] = x
        yield offset, memory[offset:]
