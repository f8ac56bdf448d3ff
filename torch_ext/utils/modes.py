"""Context managers that restore a model's modes and the random states."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
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
    """Restores random states at the end: Python's, NumPy's, torch's and its CUDA devices' of the
    model."""
    tensors = (*model.parameters(), *model.buffers())
    cuda = {tensor.device for tensor in tensors if tensor.is_cuda}
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(device.index or 0 for device in cuda)):
            yield
    finally:
        random.setstate(of_python)
        numpy.random.set_state(of_numpy)


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
