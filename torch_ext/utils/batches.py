"""Batches of a data loader: calling the model, moving to a device, counting samples, hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.utils.arguments import bounded

Forward = Callable[[nn.Module, Any], object]


def default_forward(who: str) -> Forward:
    """The function that calls a model with one batch, unless the user gives another.

    A tensor is passed as the argument. Of a tuple or list only the first entry is, since the
    others are usually labels. A mapping is passed as keyword arguments.

    The returned function raises ValueError, naming ``who``, for an empty tuple or list.
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
    """Raises TypeError unless ``batches`` is an iterable that can hold batches.

    Tensors, text and mappings are iterable too, but give samples, characters and keys; they raise.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            f"{who}: expected {argument} to be batches, got {bounded(batches)}, a single batch: "
            "pass a list, such as tensor.split(32), or a DataLoader"
        )
    if isinstance(batches, (str, bytes, Mapping, nn.Module)) or not isinstance(batches, Iterable):
        raise TypeError(f"{who}: expected {argument} to be batches, got {bounded(batches)}")


def model_device(who: str, model: nn.Module, device: torch.device | str | None) -> torch.device:
    """The device that batches are moved to.

    It is ``device`` if given, else that of the model's first parameter (or buffer, without
    parameters).

    Raises:
        TypeError: ``device`` is neither text nor a ``torch.device``.
        ValueError: torch does not know the device.
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
    """A batch with its tensors moved to the device.

    Descends into mappings, tuples and lists. Named tuples and other objects are returned as they
    are.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order; descends into mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def sample_count(batch: Any) -> int:
    """The size of the first dimension of the batch's first tensor; 1 without such a dimension."""
    first = next(tensors_in(batch), None)
    return 1 if first is None or first.dim() == 0 else first.shape[0]


def digest(batch: Any) -> str:
    """A SHA-256 of the dtypes, shapes and bytes of the batch's tensors, in hexadecimal."""
    sha = hashlib.sha256()
    for tensor in tensors_in(batch):
        plain = tensor.detach().cpu().contiguous()
        sha.update(f"{plain.dtype}{list(plain.shape)}".encode())
        sha.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
