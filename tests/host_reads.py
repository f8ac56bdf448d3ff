"""Finds what would make the host wait for a device, also where there is none."""

from __future__ import annotations

from typing import Any

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


class HostReads(TorchDispatchMode):
    """Refuses every op that reads values on the host or moves them between devices."""

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
