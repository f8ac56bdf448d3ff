"""Input values by name: what activations look like, and what is hard on a histogram."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Device = torch.device | str


def _generator(seed: int, device: Device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def gauss(n: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    return torch.randn(n, generator=_generator(seed, device), device=device)


def relu(n: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    """Half of the values are zero, in no order."""
    return gauss(n, seed, device).relu_()


def lognormal(n: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    """Magnitudes over many octaves, all positive."""
    values = torch.empty(n, device=device)
    return values.log_normal_(0.0, 2.0, generator=_generator(seed, device))


def laplace(n: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    """Heavier tails than Gauss, as activations have before the non-linearity."""
    sign = torch.randint(0, 2, (n,), generator=_generator(seed + 1, device), device=device)
    values = torch.empty(n, device=device).exponential_(generator=_generator(seed, device))
    return values * sign.mul_(2).sub_(1)


def constant(n: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    """Every value in one counter."""
    return torch.full((n,), 0.7, device=device)


def small_integers(n: int, seed: int = 0, device: Device = "cpu") -> Tensor:
    """The values -8 .. 8: few counters, equal neighbours."""
    made = _generator(seed, device)
    return torch.randint(-8, 9, (n,), generator=made, device=device).float()


DISTRIBUTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": relu,
    "lognormal": lognormal,
    "constant": constant,
    "small integers": small_integers,
}
