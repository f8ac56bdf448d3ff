"""Finds the convolutions and linear layers of an exported program, and what quantizes each."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import fx
from torch.export import ExportedProgram

from torch_ext.utils.operations import KEEP_VALUES

# ATen's own names of operations in KEEP_VALUES: torch.export records getitem of a tensor as slice,
# index or select, dropout2d as feature_dropout, x.T as numpy_T.
_ATEN_NAMES = ("alias", "feature_dropout", "index", "mT", "numpy_T", "slice", "split_with_sizes")
# relu changes values to 0 only, which every grid of ncnn holds: they stay on the grid.
_STAYS_ON_GRID = {*KEEP_VALUES, *_ATEN_NAMES, "relu"}
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
        operation = _operation(node)
        if operation not in (_CONVOLUTION, _LINEAR):
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
        layer = Layer(source, channels, groups if operation == _CONVOLUTION else 1)
        if layers.setdefault(weight, layer) != layer:
            problems[weight] = (
                f"{owners[weight]} is called twice, on values of {layers[weight].input} and of "
                f"{source}"
            )
    return layers, problems


def _operation(node: object) -> str:
    """``conv2d`` for aten::conv2d in any overload or in place; empty for other operators."""
    if not isinstance(node, fx.Node):
        return ""
    if node.target is operator.getitem:  # an entry of what chunk or split returns
        return "getitem"
    if not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, _, name = node.target._schema.name.partition("::")
    return name.removesuffix("_") if namespace == "aten" else ""


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
    while isinstance(node, fx.Node) and _operation(node) in _STAYS_ON_GRID:
        if _pads_with_a_number(node):
            break
        node = node.args[0]
    return node


def _pads_with_a_number(node: fx.Node) -> bool:
    """Whether a node is ``pad`` with a constant other than 0, which may not be on the grid."""
    if _operation(node) != "pad":
        return False
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return value not in (None, 0)


def _quantizer_before(node: object) -> str | None:
    """The quantizer of a weight that was computed with, such as by a batch norm's factor."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if name := _quantizer(node):
            return name
        node = node.args[0]
    return None
