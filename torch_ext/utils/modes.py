"""Context managers that restore a model's modes and torch's random state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode; each gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def forked_rng(model: nn.Module) -> Iterator[None]:
    """Torch's random state, of the CPU and of the model's devices, is put back."""
    tensors = (*model.parameters(), *model.buffers())
    cuda = {tensor.device for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in cuda)):
        yield


def autocasting(autocast: torch.dtype | bool | None, device: torch.device) -> Any:
    if autocast is None or autocast is False:
        return contextlib.nullcontext()
    dtype = None if autocast is True else autocast
    return torch.autocast(device.type, dtype=dtype)
