"""Values of many distributions, and views of a tensor with strides of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

Sampler = Callable[[np.random.Generator, int], npt.NDArray[np.float64]]

KINDS: dict[str, Sampler] = {
    "gauss": lambda r, n: r.standard_normal(n),
    "laplace": lambda r, n: r.laplace(size=n),
    "relu": lambda r, n: np.maximum(r.standard_normal(n), 0),
    "negative": lambda r, n: -np.abs(r.standard_normal(n)) - 0.01,
    "uniform": lambda r, n: r.uniform(-3, 5, n),
    "shifted": lambda r, n: r.standard_normal(n) + 7,
    "heavy": lambda r, n: r.standard_cauchy(n),
    "outlier": lambda r, n: np.append(r.standard_normal(n - 1), 1e4),
    "sparse": lambda r, n: r.standard_normal(n) * (r.random(n) < 0.02),
    "lattice": lambda r, n: r.integers(-20, 21, n) / 8.0,
    "two_scales": lambda r, n: r.standard_normal(n) * np.where(r.random(n) < 0.5, 1e-3, 10.0),
    "huge": lambda r, n: r.standard_normal(n) * 1e37,
    "small": lambda r, n: r.standard_normal(n) * 1e-30,
    "constant": lambda r, n: np.full(n, 1.7),
}


def sample(kind: str, count: int, seed: int = 0) -> Tensor:
    values = KINDS[kind](np.random.default_rng([seed, *map(ord, kind)]), count)
    return torch.from_numpy(np.clip(values, -3e38, 3e38)).float()


def strided_views(x: Tensor) -> dict[str, Tensor]:
    """Views of a [4, 6, 8, 10] tensor, each with strides of its own."""
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 3),
        "permuted": x.permute(2, 0, 3, 1),
        "channels_last": x.to(memory_format=torch.channels_last),
        "step": x[:, ::2, ::3, ::2],
        "offset": x[1:, 2:, 3:, 1:],
        "expanded": x[:, :1].expand(-1, 5, -1, -1),
        "stride0": x[0, 0, 0, :1].expand(4, 6, 8, 10),
        "flipped_copy": x.flip(3),
        "select": x[..., 3],
        "one": x[:1, :1, :1, :1],
        "unfolded": x.unfold(3, 4, 2),
    }


VIEWS = list(strided_views(torch.zeros(4, 6, 8, 10)))
