"""What layers read on average, from the batch norms before them, and the error that this makes.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.2: a norm's output has the mean beta and the standard deviation gamma in each channel; a
ReLU clips the normal distribution that has these. The mean error of a layer's output is that mean
times the rounding error of its weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torch_ext.calibration.restore import restored
from torch_ext.correction.walk.layer_walk import WalkedLayer
from torch_ext.prepare.batch_norms.pair import LAYERS, TRANSPOSED, has_own_forward
from torch_ext.prepare.batch_norms.traced import LayerTracer
from torch_ext.prepare.insertion.functions import plain_name
from torch_ext.prepare.remove_quantizers import remove_quantizers
from torch_ext.quantizers.find import HookedWeight, PreparedModel
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.modes import eval_mode, undisturbed

_UNKNOWN = "no batch norm tells the mean of what it reads"

# Modules by the name of the function that they are.
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Identity: "identity",
    nn.Flatten: "flatten",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d",
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "dropout"),
}
_CLIPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
# These give values of the same distribution, or, averages, of the same mean.
_SAME = ("identity", "dropout", "contiguous")
_AVERAGES = ("flatten", "mean", *(f"adaptive_avg_pool{n}d" for n in (1, 2, 3)))


class _Channels(NamedTuple):
    """Mean and standard deviation of each channel, float64; None where the latter is unknown.

    Linear layers read the last axis: ``last`` says whether it is known to be the channels'.
    """

    mean: Tensor
    deviation: Tensor | None
    last: bool = False


def clipped_mean(mean: Tensor, deviation: Tensor, low: float, high: float) -> Tensor:
    """The mean of a normally distributed value that is clipped to ``low`` and ``high``."""
    safe = torch.where(deviation > 0, deviation, 1)
    ends = [(torch.full_like(mean, end) - mean) / safe for end in (low, high)]
    below, under_high = (torch.special.ndtr(end) for end in ends)
    density = [(-end.square() / 2).exp() / math.sqrt(2 * math.pi) for end in ends]
    inside = mean * (under_high - below) + deviation * (density[0] - density[1])
    clipped = inside + low * below
    if math.isfinite(high):
        clipped = clipped + high * (1 - under_high)
    return torch.where(deviation > 0, clipped, mean.clamp(low, high))


def input_means(root: nn.Module, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The mean of each input channel of layers, float64, and why it is not known of others.

    The float model is traced symbolically; the mean is followed from batch norms through ReLUs,
    sums and average pooling.
    """
    model = remove_quantizers(root).eval()  # a copy: tracing runs the forward
    try:
        with undisturbed(model):
            graph = LayerTracer().trace(model)
    except Exception as error:  # the user's forward: anything may come
        text = str(error).partition("\n")[0]
        reason = f"the forward cannot be traced: {type(error).__name__}: {text}"
        return {}, dict.fromkeys(names, reason)
    known: dict[fx.Node, _Channels] = {}
    means: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    linear: set[fx.Node] = set()
    for node in graph.nodes:
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, LAYERS):
            name = str(node.target)
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Linear):
                linear.add(node)
            read = _known(known, _first(node))
            if read is not None and (read.last or not isinstance(module, nn.Linear)):
                means[name] = read.mean
            continue
        made = _made(node, module, known, _first(node) in linear)
        # What an operation in place writes to is another value from then on.
        for value in (node, _first(node)) if _is_in_place(node, module) else (node,):
            known.pop(value, None)
            if made is not None:
                known[value] = made
    found = {name: means[name] for name in names if name in means and calls[name] == 1}
    left = {}
    for name in names:
        if name not in found:
            several = calls.get(name, 0) > 1
            left[name] = f"it is called {calls[name]} times" if several else _UNKNOWN
    return found, left


def weight_shifts(
    prepared: PreparedModel, layers: Mapping[str, WalkedLayer], means: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What to add to each layer's bias, float64; the model is as before afterwards.

    Raises:
        RuntimeError: a quantizer has no range.
    """
    shifts = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(restored(prepared.quantizers))
        stack.enter_context(eval_mode(prepared.root))
        stack.enter_context(torch.no_grad())
        change_states(prepared.who, prepared.root, FakeQuantState.VALIDATION)
        for name, layer in layers.items():
            floating, quantized = _weights(layer)
            shifts[name] = _mean_output(layer.module, floating - quantized, means[name])
    return shifts


def _weights(layer: WalkedLayer) -> tuple[Tensor, Tensor]:
    """The weight in FLOAT and in VALIDATION, the present state, in float64."""
    source = layer.source
    if isinstance(source, HookedWeight):
        floating = source.read()
        return floating.double(), layer.quantizer(floating).double()
    quantized = getattr(layer.module, source.parameter).double()
    layer.quantizer.enter(FakeQuantState.FLOAT)
    floating = getattr(layer.module, source.parameter).double()
    return floating, quantized


def _mean_output(module: nn.Module, weight: Tensor, mean: Tensor) -> Tensor:
    """The mean of what a layer makes of inputs of these means, away from padding."""
    mean = mean.to(weight.device)
    if isinstance(module, nn.Linear):
        return weight @ mean.repeat_interleave(module.in_features // len(mean))
    groups = getattr(module, "groups", 1)
    per_input = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    if isinstance(module, TRANSPOSED):
        # [in, out / groups]; a position of the output is reached by one in `stride` of the taps.
        rows = per_input.view(groups, -1, per_input.shape[1])
        made = (rows * mean.view(groups, -1, 1)).sum(1).flatten()
        return made / math.prod(module.stride)
    rows = per_input.view(groups, -1, per_input.shape[1])
    return (rows * mean.view(groups, 1, -1)).sum(2).flatten()


def _made(
    node: fx.Node,
    module: nn.Module | None,
    known: Mapping[fx.Node, _Channels],
    behind_linear: bool,
) -> _Channels | None:
    """What is known of the channels of a node's result; None if nothing is."""
    if isinstance(module, _BatchNorm):
        return None if has_own_forward(module) else _of_norm(module, behind_linear)
    name = _name(node, module)
    if name == "add":
        return None if node.kwargs else _sum([_known(known, arg) for arg in node.args[:2]])
    read = _known(known, _first(node))
    if read is None:
        return None
    if name in _SAME:
        return read
    if name in _CLIPS and read.deviation is not None:
        low, high = _CLIPS[name]
        return _Channels(clipped_mean(read.mean, read.deviation, low, high), None, read.last)
    if name in _AVERAGES and _keeps_channels(node, name):
        keeps_axes = name == "mean" and (len(node.args) > 2 or "keepdim" in node.kwargs)
        return _Channels(read.mean, None, name in ("flatten", "mean") and not keeps_axes)
    return None


def _is_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return bool(getattr(module, "inplace", False) or node.kwargs.get("inplace"))


def _name(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return _MODULES.get(type(module), "")
    if node.op == "call_method":
        return str(node.target).rstrip("_")
    return plain_name(node.target) if callable(node.target) else ""


def _known(known: Mapping[fx.Node, _Channels], value: object) -> _Channels | None:
    return known.get(value) if isinstance(value, fx.Node) else None


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _keeps_channels(node: fx.Node, name: str) -> bool:
    """Whether channels stay what follows the batch: a mean over later axes, flattening from 1."""
    if node.op == "call_module" or name.startswith("adaptive"):
        return True
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if name == "flatten":
        start: object = node.kwargs.get("start_dim") if given is None else given
        return start == 1
    axes = given if isinstance(given, (tuple, list)) else [given]
    return set(axes) in ({2, 3}, {-1, -2}, {2})


def _of_norm(norm: _BatchNorm, last: bool) -> _Channels | None:
    if not isinstance(norm.running_var, Tensor):
        return None
    ones = torch.ones_like(norm.running_var, dtype=torch.float64)
    gamma, beta = (None if t is None else t.detach().double() for t in (norm.weight, norm.bias))
    mean = torch.zeros_like(ones) if beta is None else beta
    return _Channels(mean, ones if gamma is None else gamma.abs(), last)


def _sum(operands: Sequence[_Channels | None]) -> _Channels | None:
    first, *others = operands
    if first is None or not others or others[0] is None:
        return None
    if first.mean.shape != others[0].mean.shape:
        return None
    return _Channels(first.mean + others[0].mean, None, first.last and others[0].last)
