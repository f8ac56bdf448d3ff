"""Taking a loader's batches apart: what the model is called with, how many samples, which bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.utils.arguments import bounded

Forward = Callable[[nn.Module, Any], object]


def default_forward(who: str) -> Forward:
    """Calls a model with a batch, for the function that errors are to name.

    A tensor is the argument; of a tuple or list the first entry is; a mapping holds keywords.
    """

    def forward(model: nn.Module, batch: Any) -> object:
        if isinstance(batch, Mapping):
            return model(**batch)
        if isinstance(batch, (tuple, list)):
            if not batch:
                raise ValueError(f"{who}: expected batches to hold inputs, got an empty one")
            return model(batch[0])
        return model(batch)

    return forward


def check_batches(who: str, argument: str, batches: object) -> None:
    """Raises TypeError for what is no iterable of batches.

    A tensor would be taken apart into samples, text into characters, a mapping into its keys.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            f"{who}: expected {argument} to be batches, got {bounded(batches)}, which is one: "
            "pass a list, such as tensor.split(32), or a DataLoader"
        )
    if isinstance(batches, (str, bytes, Mapping, nn.Module)) or not isinstance(batches, Iterable):
        raise TypeError(f"{who}: expected {argument} to be batches, got {bounded(batches)}")


def model_device(who: str, model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where batches go: what is asked for, else to the model's first parameter.

    Raises TypeError or ValueError for what is no device.
    """
    if device is not None:
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"{who}: expected device to be a device, got {bounded(device)}")
        try:
            return torch.device(device)
        except RuntimeError as error:
            raise ValueError(
                f"{who}: expected device to be a device, got {bounded(device)}: {error}"
            ) from error
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
