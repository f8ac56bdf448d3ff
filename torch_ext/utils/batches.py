"""Taking a loader's batches apart: what the model is called with, how many samples, which bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], object]


def default_forward(model: nn.Module, batch: Any) -> object:
    """A tensor is the argument; of a tuple or list the first entry is; a mapping holds keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("calibrate: expected batches to hold inputs, got an empty one")
        return model(batch[0])
    return model(batch)


def model_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where batches go: what is asked for, else to the model's first parameter."""
    if device is not None:
        return torch.device(device)
    first = next(iter((*model.parameters(), *model.buffers())))
    return first.device


def to_device(value: Any, device: torch.device) -> Any:
    """The same batch with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(one, device) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(one, device) for one in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_in(one)


def sample_count(batch: Any) -> int:
    """The first dimension of the batch's first tensor."""
    first = next(tensors_in(batch), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def digest(batch: Any) -> str:
    """A name for the batch's contents: bytes, dtypes and shapes of its tensors."""
    found = hashlib.sha256()
    for tensor in tensors_in(batch):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{plain.dtype}{list(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
