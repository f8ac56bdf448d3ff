"""Snapshots of everything a model holds, and whether two are the same, bit for bit."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import torch_ext


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every tensor, state, rule, grid and mode, to compare before and after."""
    found: dict[str, Any] = {name: t.clone() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        found[f"{name}.training"] = module.training
        if isinstance(module, torch_ext.FakeQuantize):
            rule = module.observer
            found[f"{name}.state"] = (module.state, module.passes_through)
            found[f"{name}.rule"] = (rule.name, rule.options)
            found[f"{name}.grid"] = (rule.grid, rule.scale_rule, rule.power_of_two)
    return found


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        same_bits(left[key], right[key])
        if isinstance(left[key], Tensor)
        else left[key] == right[key]
        for key in left
    )


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = (t.detach().contiguous() for t in (left, right))
    return left.numpy().tobytes() == right.numpy().tobytes()
