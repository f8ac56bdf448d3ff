"""Finds what would make the host wait for a device, also where there is none."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What turns values into Python numbers, sizes or decisions.
_READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::allclose",
}


# The same by methods that on the CPU come down to no op.
_METHODS = ("cpu", "cuda", "numpy", "tolist")


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a method of Tensor reads a value on the host")


class HostReads(TorchDispatchMode):
    """Refuses every op that reads values on the host or moves them between devices."""

    def __enter__(self) -> Any:
        self._patches = [mock.patch.object(torch.Tensor, name, _refuse) for name in _METHODS]
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for patch in self._patches:
            patch.stop()
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if name in _READS:
            raise RuntimeError(f"{name} reads a value on the host")
        if name in ("aten::_to_copy", "aten::copy_") and _moves(args, kwargs or {}):
            raise RuntimeError(f"{name} moves values between devices")
        return func(*args, **(kwargs or {}))


def _moves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    devices = {a.device for a in args if isinstance(a, torch.Tensor) and a.dim() > 0}
    if kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]))
    return len(devices) > 1
