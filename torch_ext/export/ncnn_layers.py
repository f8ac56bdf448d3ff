"""Finds the convolutions and linear layers of an exported program, and what quantizes each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import fx
from torch.export import ExportedProgram

from torch_ext.export.common.aten import aten_name, moves_values

_CONVOLUTION, _LINEAR = "conv2d", "linear"
_CALL = re.compile(r"@\d+$")  # torch.export's suffix of a module's second call


class Layer(NamedTuple):
    """A convolution or a linear layer with a quantized weight."""

    input: str  # name of the quantizer whose values it reads
    channels: int  # output channels
    groups: int


def layers_of(
    program: ExportedProgram, owners: Mapping[str, str]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Finds the layers of a program that ncnn's table can have rows for.

    Args:
        program: the model's forward, its quantizers traced as operators of ``torch_ext``.
        owners: names of weight quantizers, with the module whose weight each quantizes.

    Returns:
        The layers by the names of their weights' quantizers; and for weight quantizers whose layer
        cannot have a row, the reason.
    """
    layers: dict[str, Layer] = {}
    problems: dict[str, str] = {}
    for node in program.graph.nodes:
        kind = aten_name(node)
        if kind not in (_CONVOLUTION, _LINEAR):
            continue
        weight = _quantizer(node.args[1])
        if weight is None:
            if before := _quantizer_before(node.args[1]):
                problems[before] = "the layer reads something computed from the quantized weight"
            continue
        if weight not in owners:
            continue
        source = _quantizer(_origin(node.args[0]))
        if source is None:
            problems[weight] = f"the input of {owners[weight]} is not quantized"
            continue
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        channels = node.args[1].meta["val"].shape[0]
        layer = Layer(source, channels, groups if kind == _CONVOLUTION else 1)
        if layers.setdefault(weight, layer) != layer:
            problems[weight] = (
                f"{owners[weight]} is called twice, on values of {layers[weight].input} and of "
                f"{source}"
            )
    return layers, problems


def _quantizer(node: object) -> str | None:
    """The name of the quantizer whose output the node is; None if it is no quantizer's."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not node.target._schema.name.startswith("torch_ext::"):
        return None
    stack = node.meta.get("nn_module_stack") or {}
    path = [name for name, _ in stack.values()][-1]
    return _CALL.sub("", str(path))


def _origin(node: object) -> object:
    """Follows first arguments up to the operation that last put values on or off a grid."""
    # relu changes values to 0 only, which every grid of ncnn holds.
    while isinstance(node, fx.Node) and (moves_values(node) or aten_name(node) == "relu"):
        node = node.args[0]
    return node


def _quantizer_before(node: object) -> str | None:
    """The quantizer of a weight that was computed with, such as by a batch norm's factor."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if name := _quantizer(node):
            return name
        node = node.args[0]
    return None
