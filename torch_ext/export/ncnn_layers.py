"""Which layers a traced forward has, and which quantizer each reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import fx
from torch.export import ExportedProgram

# What gives back values of its input, so that they stay on its grid.
_SAME_VALUES = {
    "max_pool2d", "adaptive_max_pool2d", "relu", "relu_", "dropout", "view", "reshape", "flatten",
    "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "clone", "contiguous", "alias",
}  # fmt: skip
_CONVOLUTION, _LINEAR = "conv2d", "linear"
_CALL = re.compile(r"@\d+$")  # of a module's second call


class Layer(NamedTuple):
    """A convolution or a linear layer with a quantized weight."""

    input: str  # the quantizer whose values it reads
    channels: int  # of its output
    groups: int


def layers_of(
    program: ExportedProgram, owners: Mapping[str, str]
) -> tuple[dict[str, Layer], dict[str, str]]:
    """Layers by their weights' quantizers (the keys of `owners`), and why others are none."""
    layers: dict[str, Layer] = {}
    problems: dict[str, str] = {}
    for node in program.graph.nodes:
        operation = _operation(node)
        if operation not in (_CONVOLUTION, _LINEAR):
            continue
        weight = _quantizer(node.args[1])
        if weight is None:
            if behind := _somewhere_behind(node.args[1]):
                problems[behind] = "the layer reads something computed from the quantized weight"
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
    """conv2d, of aten::conv2d in any overload; nothing for other operators."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    namespace, _, name = node.target._schema.name.partition("::")
    return name if namespace == "aten" else ""


def _quantizer(node: object) -> str | None:
    """The name of the quantizer that a value comes from directly."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not node.target._schema.name.startswith("torch_ext::"):
        return None
    stack = node.meta.get("nn_module_stack") or {}
    path = [name for name, _ in stack.values()][-1]
    return _CALL.sub("", str(path))


def _origin(node: object) -> object:
    while _operation(node) in _SAME_VALUES:
        assert isinstance(node, fx.Node)
        node = node.args[0]
    return node


def _somewhere_behind(node: object) -> str | None:
    """The quantizer of a weight that was computed with (a batch norm's factor)."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if found := _quantizer(node):
            return found
        node = node.args[0]
    return None
