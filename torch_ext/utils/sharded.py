"""Tensors of which each rank holds a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which FSDP2 may have left each rank a shard (a DTensor).

    Every rank has to make the call then. A plain tensor is returned itself.
    """
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else tensor
    return full
