"""Context managers that restore a model's modes and torch's random state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts all modules in eval mode, and restores each module's mode at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def forked_rng(model: nn.Module) -> Iterator[None]:
    """Restores torch's random state, of the CPU and of the model's CUDA devices, at the end."""
    tensors = (*model.parameters(), *model.buffers())
    cuda = {tensor.device for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index or 0 for device in cuda)):
        yield


def autocasting(autocast: torch.dtype | bool | None, device: torch.device) -> Any:
    """The ``torch.autocast`` context of a device, or a null context for None and False.

    True is the device's default dtype, a dtype is that one.
    """
    if autocast is None or autocast is False:
        return contextlib.nullcontext()
    dtype = None if autocast is True else autocast
    return torch.autocast(device.type, dtype=dtype)


def _reads_export_flag() -> bool:
    return torch.compiler._is_exporting_flag


# Dynamo of torch 2.11 takes torch.compiler.is_exporting() for True in every compiled forward.
is_exporting: Callable[[], bool] = (
    _reads_export_flag if torch.__version__.startswith("2.11.") else torch.compiler.is_exporting
)
"""Whether ``torch.export`` runs the forward, also seen from compiled code."""
