"""All that a model holds, by identity and by value, to see whether a call left it as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Classes, attributes, hooks, modes, parameters, gradients, buffers, and the random states.

    Two are equal if nothing was changed, replaced or added.
    """
    found: dict[str, Any] = {
        "random": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "torch": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
    }
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}:class"] = type(module)
        for key, value in vars(module).items():
            found[f"{name}:{key}"] = _described(value)
    return found


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = None if not value.is_leaf or value.grad is None else _described(value.grad)
        return id(value), value._version, value.detach().tolist(), value.requires_grad, grad
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return id(value), [(key, _described(entry)) for key, entry in value.items()]
    if isinstance(value, (list, tuple)):
        return id(value), [_described(entry) for entry in value]
    return id(value), value if isinstance(value, (int, float, str, bool)) else None
