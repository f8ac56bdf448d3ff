"""Which inputs of a model's operations lie on a quantizer's grid, seen while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_ext import named_quantizers

# Function name -> positions of the activations and of the weight.
_READ = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), ((0,), 1)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ((0,), 1)),
    **dict.fromkeys(("matmul", "bmm", "__matmul__", "__rmatmul__"), ((0, 1), None)),
    "scaled_dot_product_attention": ((0, 1, 2), None),
}


class OffGrid(TorchFunctionMode):
    """Collects convolutions, linear layers and products that read what no quantizer made.

    On the grid means: a whole number of times the scale of one quantizer of the model, exactly.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.scales = [q.calculate_qparams()[0] for q in named_quantizers(model).values()]
        self.seen: dict[str, int] = {}
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READ:
            inputs, weight = _READ[name]
            self.seen[name] = self.seen.get(name, 0) + 1
            for i in inputs:
                if not self._on_a_grid(args[i], weight=False):
                    self.found.append(f"{name} {self.seen[name]}: argument {i}")
            if weight is not None and not self._on_a_grid(args[weight], weight=True):
                self.found.append(f"{name} {self.seen[name]}: weight")
        return func(*args, **(kwargs or {}))

    def _on_a_grid(self, x: Tensor, weight: bool) -> bool:
        for scale in self.scales:
            if len(scale) == 1:
                steps = [scale]
            elif weight:
                axes = [axis for axis in range(2) if x.shape[axis] == len(scale)]
                steps = [scale.view([-1 if d == a else 1 for d in range(x.dim())]) for a in axes]
            else:
                steps = []
            if any(_whole(x, step, few=True) and _whole(x, step) for step in steps):
                return True
        return False


def _whole(x: Tensor, step: Tensor, few: bool = False) -> bool:
    if few:  # enough for almost every wrong scale
        x, step = x[:1], step[:1]
    return torch.equal((x / step).round() * step, x)


def off_grid(model: nn.Module, *inputs: Any, **named: Any) -> tuple[list[str], dict[str, int]]:
    """What is off the grid in VALIDATION, and how many calls were looked at."""
    with torch.no_grad(), OffGrid(model) as looking:
        model(*inputs, **named)
    return looking.found, looking.seen
