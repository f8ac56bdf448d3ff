"""Folds a batch norm into the layer before it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.prepare.batch_norms.pair import Pair, Step, parameter
from torch_ext.quantizers.folded_weight import along_channels, folding_factor


class AfterNorm(nn.Module):
    """What the module of a folded norm applies behind the norm, where functions are part of it.

    They are called in its own forward, so quantizers of their results have the names that they have
    with the norm.
    """

    def __init__(self, children: dict[str, nn.Module], steps: tuple[Step, ...]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.steps = steps

    def forward(self, x: Any) -> Any:
        for name, function, args, kwargs in self.steps:
            x = getattr(self, name)(x) if function is None else function(x, *args, **kwargs)
        return x

    def extra_repr(self) -> str:
        return ", ".join(step.name for step in self.steps)


@torch.no_grad()
def fold(model: nn.Module, pair: Pair) -> None:
    """Folds in place: ``w * f`` and ``(b - mean) * f + beta`` with ``f = gamma / sqrt(var + eps)``.

    In the norm's stead stands an Identity, or what its module applies behind the norm.
    """
    norm = model.get_submodule(pair.norm)
    mean, beta = norm.running_mean, getattr(norm, "bias", None)
    assert isinstance(mean, Tensor)
    weight, bias = parameter(model, pair.weight), parameter(model, pair.bias)
    assert weight is not None
    factor = folding_factor(norm)
    scale = along_channels(factor.to(weight.dtype), weight, pair.ch_axis)
    shift = (-mean if bias is None else bias - mean) * factor
    if isinstance(beta, Tensor):
        shift = shift + beta
    # A new bias replaces the norm's, so it trains if the weight does.
    trains = (weight if bias is None else bias).requires_grad
    _set(model, pair.weight, nn.Parameter(weight * scale, weight.requires_grad))
    _set(model, pair.bias, nn.Parameter(shift.to(weight.dtype), trains))
    _set(model, pair.norm, _what_is_left(norm, pair.steps))


def _what_is_left(norm: nn.Module, steps: tuple[Step, ...]) -> nn.Module:
    children = {step.name: norm.get_submodule(step.name) for step in steps if not step.function}
    left: nn.Module = nn.Identity()
    if len(children) < len(steps):
        left = AfterNorm(children, steps)
    elif steps:
        left = nn.Sequential(OrderedDict(children))
    left.training = norm.training
    # It takes over the batch norm's hooks and qconfig.
    kept = {key: value for key, value in vars(norm).items() if "hook" in key or key == "qconfig"}
    vars(left).update(kept)
    return left


def _set(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    holder, _, own = name.rpartition(".")
    setattr(model.get_submodule(holder), own, value)
