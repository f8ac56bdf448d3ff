"""The training loop of tests: the same batch over and over."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def losses_of(
    net: nn.Module, x: Tensor, target: Tensor, optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    """Trains a net towards a target by squared error; the loss before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
