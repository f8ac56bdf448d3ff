"""The bias of a layer: whether it can be changed, changing it, and giving it back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_ext.correction.walk.layer_walk import LayerCall, WalkedLayer
from torch_ext.quantizers.find import HookedWeight
from torch_ext.utils.text import label_of

_BIAS = "bias"


def bias_problems(
    who: str, root: nn.Module, layers: Mapping[str, WalkedLayer]
) -> tuple[dict[str, WalkedLayer], dict[str, str]]:
    """The layers whose bias is a parameter or can be one; and why the others are none.

    Raises:
        ValueError: another module has the same bias, and would change too.
    """
    holders = parameter_names(root)
    chosen: dict[str, WalkedLayer] = {}
    left: dict[str, str] = {}
    for name, layer in layers.items():
        if layer.quantizer.holds_range:
            # The float model computes with the rounded weight too, so it is no reference.
            left[name] = "reconstruct rounded its weight, and has corrected it by that"
            continue
        if _BIAS not in layer.module._parameters:
            left[name] = "its bias is no parameter"
            continue
        names = bias_names(layer, holders)
        if len(names) > 1:
            raise ValueError(
                f'{who}: expected layers with biases of their own, got "{names[0]}" and '
                f'"{names[1]}", which are one parameter; leave {label_of(name)} out by pattern, or '
                "give each a copy"
            )
        chosen[name] = layer
    return chosen, left


def parameter_names(root: nn.Module) -> dict[int, list[str]]:
    """The names of each parameter, by its id: several if modules share it."""
    found: dict[int, list[str]] = {}
    for name, module in root.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(f"{name}.{key}".strip("."))
    return found


def bias_names(layer: WalkedLayer, holders: Mapping[int, list[str]]) -> list[str]:
    """The names of a layer's bias, of those of all parameters; none if it has no bias."""
    bias = layer.module._parameters[_BIAS]
    return [] if bias is None else holders[id(bias)]


def reads_own_bias(call: LayerCall) -> bool:
    """Whether what a layer's function is given is the bias that the layer has."""
    own: Any = call.layer.module.bias
    if call.bias is None or own is None:
        return call.bias is own
    # Where a forward converts it, it is another tensor of the same values.
    return call.bias is own or torch.equal(call.bias, own.to(call.bias))


@torch.no_grad()
def add_to_bias(layer: WalkedLayer, shift: Tensor) -> None:
    """Adds float64 [channels] to a layer's bias, and creates one that is 0 if it has none."""
    module = layer.module
    bias = module._parameters[_BIAS]
    if bias is None:
        source = layer.source
        holder = source.module if isinstance(source, HookedWeight) else source.chain
        weights = list(holder.parameters(recurse=False))
        # A new bias trains if the weight does.
        trains = any(weight.requires_grad for weight in weights)
        made = nn.Parameter(shift.to(weights[0].device, weights[0].dtype), trains)
        module.register_parameter(_BIAS, made)
    else:
        bias.copy_(bias + shift)


def bias_keeper(module: nn.Module) -> Callable[[], None]:
    """What gives a module back the bias that it has now, or none."""
    bias = module._parameters[_BIAS]
    values = None if bias is None else bias.detach().clone()

    @torch.no_grad()
    def restore() -> None:
        if bias is not None and values is not None:
            bias.copy_(values)
        module._parameters[_BIAS] = bias

    return restore


@contextlib.contextmanager
def restored_biases(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Gives the modules the biases back that they had, or none, if the body raises."""
    before = [bias_keeper(module) for module in modules.values()]
    try:
        yield
    except BaseException:
        for restore in before:
            restore()
        raise
