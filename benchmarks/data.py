"""Input values by name: what activations look like, and what is hard on a histogram."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gauss(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=_generator(seed))


def relu(n: int, seed: int = 0) -> Tensor:
    """Half of the values are zero, in no order."""
    return gauss(n, seed).relu_()


def lognormal(n: int, seed: int = 0) -> Tensor:
    """Magnitudes over many octaves, all positive."""
    return torch.empty(n).log_normal_(0.0, 2.0, generator=_generator(seed))


def laplace(n: int, seed: int = 0) -> Tensor:
    """Heavier tails than Gauss, as activations have before the non-linearity."""
    sign = torch.randint(0, 2, (n,), generator=_generator(seed + 1)).mul_(2).sub_(1)
    return torch.empty(n).exponential_(generator=_generator(seed)) * sign


def constant(n: int, seed: int = 0) -> Tensor:
    """Every value in one counter."""
    return torch.full((n,), 0.7)


def small_integers(n: int, seed: int = 0) -> Tensor:
    """The values -8 .. 8: few counters, equal neighbours."""
    return torch.randint(-8, 9, (n,), generator=_generator(seed)).float()


DISTRIBUTIONS: dict[str, Callable[[int], Tensor]] = {
    "relu": relu,
    "lognormal": lognormal,
    "constant": constant,
    "small integers": small_integers,
}
