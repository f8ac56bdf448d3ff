"""A layer and the batch norm that alone reads its output, and why some cannot be folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from torch_ext.prepare.module_classes import own_type

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)


class Step(NamedTuple):
    """What a norm's module applies behind the norm: a child by name, or a function of torch."""

    name: str
    function: Callable[..., Any] | None = None  # None: the child
    args: tuple[Any, ...] = ()  # after the tensor
    kwargs: dict[str, Any] = {}  # noqa: RUF012


class Pair(NamedTuple):
    """Names in one model. ``weight`` and ``bias`` are parameters; the bias may be None."""

    layer: str
    norm: str
    weight: str
    bias: str
    transposed: bool = False
    groups: int = 1  # of a transposed convolution
    steps: tuple[Step, ...] = ()

    @property
    def ch_axis(self) -> int:
        """The axis of the weight's output channels."""
        return 1 if self.transposed else 0


class Norms(NamedTuple):
    """The pairs of a model, and the reason for each other batch norm by name."""

    pairs: list[Pair]
    left: dict[str, str]

    @property
    def pairs_by_norm(self) -> dict[str, Pair]:
        return {pair.norm: pair for pair in self.pairs}


def pair_of(model: nn.Module, layer_name: str, norm_name: str) -> Pair:
    """The pair of a layer of torch's classes, or one derived from them."""
    layer = model.get_submodule(layer_name)
    transposed = isinstance(layer, TRANSPOSED)
    weight, bias = (f"{layer_name}.{name}".strip(".") for name in ("weight", "bias"))
    groups = layer.groups if isinstance(layer, TRANSPOSED) else 1
    return Pair(layer_name, norm_name, weight, bias, transposed, groups)


def all_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    return {n: module for n, module in model.named_modules() if isinstance(module, _BatchNorm)}


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is not the one that torch wrote for its class."""
    kind = own_type(module)
    written = next(base for base in kind.__mro__ if "forward" in vars(base))
    # The methods that torch's forwards of these call.
    parts = ("_conv_forward", "_check_input_dim", "_output_padding")
    changed = any(
        name in vars(base) and not base.__module__.startswith("torch.")
        for base in kind.__mro__
        for name in parts
    )
    return changed or not written.__module__.startswith("torch.") or "forward" in vars(module)


def problem(model: nn.Module, pair: Pair) -> str:
    """Why a pair cannot be folded, whatever the forward does; empty if it can."""
    norm = model.get_submodule(pair.norm)
    mean = getattr(norm, "running_mean", None)
    if not isinstance(norm, _BatchNorm) and mean is None:
        return f"{pair.norm} is a {type(norm).__name__}"
    if any(is_lazy(tensor) for tensor in (*norm.parameters(), *norm.buffers())):
        return f"{pair.norm} is lazy; run a forward first"
    if not isinstance(mean, Tensor) or norm.running_var is None:
        return f"{pair.norm} has no running statistics"
    tensors = [parameter(model, name) for name in (pair.weight, pair.bias)]
    names = (pair.weight, pair.bias)
    if tensors[0] is None or any(t is _WRITTEN for t in tensors):
        name = names[1] if tensors[1] is _WRITTEN and tensors[0] is not _WRITTEN else names[0]
        return f"{name} is no parameter, but a buffer or what a hook or parametrization writes"
    weight = tensors[0]
    if is_lazy(weight):
        return f"{pair.layer} is lazy; run a forward first"
    if not has_bias_place(model, pair.bias):
        return f"{pair.layer} has no bias, nor a place for one"
    channels = weight.shape[pair.ch_axis] * pair.groups
    if channels != mean.numel():
        return f"{pair.layer} has {channels} outputs and {pair.norm} {mean.numel()} features"
    for name, module in model.named_modules():
        for own, value in module._parameters.items():
            shared = value is not None and any(value is tensor for tensor in tensors)
            if shared and f"{name}.{own}".strip(".") not in names:
                return f"{name} shares parameters with {pair.layer}"
    return ""


_WRITTEN = torch.empty(0)  # stands for a tensor that is no parameter, but computed


def parameter(model: nn.Module, name: str) -> Tensor | None:
    """A parameter by name; None if there is none, ``_WRITTEN`` if something computes it."""
    holder_name, _, own = name.rpartition(".")
    holder = model.get_submodule(holder_name)
    if own in holder._parameters:
        return holder._parameters[own]
    return None if getattr(holder, own, None) is None else _WRITTEN


def has_bias_place(model: nn.Module, bias: str) -> bool:
    """Whether a layer has a bias, or the entry for one that torch's layers have without."""
    holder_name, _, own = bias.rpartition(".")
    return own in model.get_submodule(holder_name)._parameters
