"""Lets a quantized weight be assigned: ``head.weight = embedding.weight`` ties the two."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import WeightSource
from torch_ext.quantizers.folded_weight import WeightStep
from torch_ext.quantizers.solve import refresh_weights
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import bounded


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """``__setattr__`` of modules with quantized weights: a parameter takes the weight's place.

    In VALIDATION the range is that of the new weight.

    Raises:
        TypeError: something else is assigned to a quantized weight.
        ValueError: a parameter of another shape.
    """
    chain = _chain(module, name)
    if chain is None:
        kinds = type(module).__mro__  # before ours may stand one that fully_shard derived
        ours = max(i for i, kind in enumerate(kinds) if _is_ours(kind))
        base: Any = kinds[ours + 1]
        base.__setattr__(module, name, value)
        return
    position = next(i for i, step in enumerate(chain) if isinstance(step, FakeQuantize))
    quantizer = chain[position]
    assert isinstance(quantizer, FakeQuantize)
    owner = quantizer.label.partition(".parametrizations.")[0] or type(module).__name__
    if not isinstance(value, nn.Parameter):
        raise TypeError(
            f"{owner}.{name} = ...: expected an nn.Parameter for the quantized weight, got "
            f"{bounded(value)}; to tie it to a weight that is quantized too, assign that module's "
            f"parametrizations.{name}.original, or do it in FLOAT, where its {name} is the "
            'parameter: set_fake_quantize(model, "float")'
        )
    if chain.original.shape != value.shape:
        raise ValueError(
            f"{owner}.{name} = ...: expected a parameter of shape {list(chain.original.shape)}, "
            f"for which the quantizer was made, got {list(value.shape)}; change the float model "
            "(remove_quantizers), and prepare it again"
        )
    chain.register_parameter("original", value)
    if quantizer.state is FakeQuantState.VALIDATION:
        source = WeightSource(owner, name, chain, position)
        refresh_weights({name: quantizer}, lambda _: source.read())


def _chain(module: nn.Module, name: str) -> parametrize.ParametrizationList | None:
    """The steps of a weight whose parametrizations are quantizers alone; None for what is none."""
    chains = vars(module).get("_modules", {}).get("parametrizations")
    chain = chains[name] if isinstance(chains, nn.ModuleDict) and name in chains else None
    if not isinstance(chain, parametrize.ParametrizationList):
        return None
    ours = all(isinstance(step, (FakeQuantize, WeightStep)) for step in chain)
    return chain if ours and len(chain) > 0 else None


def _is_ours(kind: type) -> bool:
    return vars(kind).get("__setattr__") is set_attribute
