"""Batch norms of models: with statistics that matter, and by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shake(model: nn.Module) -> nn.Module:
    """Batch norms whose folding changes something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: no nn.BatchNorm2d, and computed by hand."""

    def __init__(self, factor: float = 1) -> None:
        super().__init__()
        self.eps, self.factor = 1e-3, factor
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return (x - self.running_mean.view(1, -1, 1, 1)) * scale * self.factor + self.bias.view(
            1, -1, 1, 1
        )
