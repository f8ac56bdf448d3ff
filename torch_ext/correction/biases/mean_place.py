"""Where the mean of what a layer makes can be moved without a parameter more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_ext.correction.biases.bias_place import bias_names, parameter_names
from torch_ext.correction.walk.layer_walk import WalkedLayer
from torch_ext.quantizers.find import WeightSource
from torch_ext.quantizers.folded_weight import FoldedWeight


class MeanPlace(NamedTuple):
    """A layer's bias; or the mean that the norm which is folded into the layer takes off again."""

    values: Tensor  # [channels]
    is_bias: bool

    @torch.no_grad()
    def add(self, shift: Tensor) -> None:
        """Moves the mean of each output channel by float64 [channels]."""
        self.values.copy_(self.values + shift if self.is_bias else self.values - shift)


def mean_places(root: nn.Module, layers: Mapping[str, WalkedLayer]) -> dict[str, MeanPlace]:
    """Those of the layers that have one for themselves."""
    holders = parameter_names(root)
    norms = {name: norm for name, layer in layers.items() if (norm := _folded_norm(layer))}
    uses = Counter(map(id, norms.values()))
    places = {}
    for name, layer in layers.items():
        bias = layer.module._parameters.get("bias")
        if bias is not None:
            if len(bias_names(layer, holders)) == 1:
                places[name] = MeanPlace(bias, is_bias=True)
        elif layer.module.bias is None and name in norms and uses[id(norms[name])] == 1:
            mean = norms[name].running_mean
            assert isinstance(mean, Tensor)
            places[name] = MeanPlace(mean, is_bias=False)
    return places


def _folded_norm(layer: WalkedLayer) -> nn.Module | None:
    if isinstance(layer.source, WeightSource):
        for step in layer.source.chain:
            if isinstance(step, FoldedWeight):
                return step.norm
    return None
