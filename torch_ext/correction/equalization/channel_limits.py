"""Clips each channel at a limit of its own: a ReLU6 behind which channels were scaled."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelLimits(nn.Module):
    """``min(max(x, 0), limits)``, with limits whose shape broadcasts to that of ``x``.

    :func:`torch_ext.equalize` puts it in the place of a ``ReLU6`` or ``Hardtanh``. The limits are a
    buffer, part of the state dict.
    """

    limits: Tensor

    def __init__(self, limits: Tensor) -> None:
        super().__init__()
        self.register_buffer("limits", limits)

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self.limits.to(x.dtype))

    def extra_repr(self) -> str:
        return f"limits of {self.limits.numel()} channels"
