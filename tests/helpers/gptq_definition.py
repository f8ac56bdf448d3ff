"""GPTQ by its definition: each value fixed, the best of the rest computed anew."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def hessian(groups: int, inputs: int, seed: int = 0) -> Tensor:
    """Of correlated inputs, as neighbours of an image are."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(groups):
        mixed = random.normal(size=(inputs, inputs)) / np.sqrt(inputs) + 0.5
        x = random.normal(size=(40 + 3 * inputs, inputs)) @ mixed
        found.append(x.T @ x)
    return torch.from_numpy(np.stack(found))


def by_definition(
    weight: np.ndarray, h: np.ndarray, scale: float, zero_point: int, low: int, high: int
) -> np.ndarray:
    """Levels of one row. When value j is fixed, the values behind it move to where the cost, a
    quadratic form, is least given the error of j: the inverse of what is left of ``h`` says."""
    w = weight.astype(np.float64).copy()
    levels = np.zeros(len(w), dtype=np.int64)
    for j in range(len(w)):
        levels[j] = np.clip(np.rint(w[j] / scale) + zero_point, low, high)
        error = w[j] - (levels[j] - zero_point) * scale
        inverse = np.linalg.inv(h[j:, j:])
        w[j:] -= error * inverse[:, 0] / inverse[0, 0]
    return levels
