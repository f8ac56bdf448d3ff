"""TensorRT's rules for ONNX files with QuantizeLinear and DequantizeLinear, and their check.

From NVIDIA's documentation of explicit quantization: type int8 (TensorRT also has FP8 and INT4,
which are not checked here), zero points of 0, constant scales, activations per tensor, weights per
tensor or per output channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch_ext.export.common.entries import Entry
from torch_ext.export.common.packages import load_onnx
from torch_ext.export.onnx_grid import OnnxGrid
from torch_ext.files.storage import PathLike

_PAIR = ("QuantizeLinear", "DequantizeLinear")
_LEAST_OPSET = 13  # the first with an axis


def grid_problem(entry: Entry, grid: OnnxGrid) -> str:
    """Why TensorRT does not take a quantizer's grid; empty if it does."""
    if entry.groups:
        return entry.groups
    if grid.type != "int8":
        return f"its type is {grid.type}, not int8"
    if bool(entry.zero_point.any()):
        return "its zero point is not 0"
    if grid.axis >= 0 and not entry.is_weight:
        return f"it quantizes an activation per channel (axis {grid.axis})"
    return ""


def tensorrt_violations(path: PathLike) -> dict[str, str]:
    """Checks QuantizeLinear and DequantizeLinear in an ONNX file against TensorRT's rules.

    The rules: type int8, zero points of 0, constant scales, QuantizeLinear followed by
    DequantizeLinear with the same scale, activations per tensor, weights per tensor or per output
    channel.

    Returns:
        Names of the nodes that TensorRT would not take (of their outputs, for nodes without a
        name), with the reason; empty if it would take all.

    Raises:
        FileError: a ValueError, for a file that is not ONNX.
        FileNotFoundError: if there is no such file.
        ImportError: if the packages onnx and onnxscript are missing.
    """
    packages, proto = load_onnx("export.tensorrt_violations", path)
    return violations(packages, proto)


def violations(packages: Any, proto: Any) -> dict[str, str]:
    """What :func:`tensorrt_violations` returns, for a ModelProto; `packages` is onnx."""
    checker = _Checker(packages, proto)
    problems = {}
    for node in proto.graph.node:
        if node.op_type in _PAIR and (problem := checker.problem(node)):
            problems[node.name or node.output[0]] = problem
    return problems


class _Checker:
    """Checks nodes of one ModelProto against TensorRT's rules.

    Its methods return what is wrong with a node, or an empty text.
    """

    def __init__(self, packages: Any, proto: Any) -> None:
        self.onnx = packages
        opsets = (entry.version for entry in proto.opset_import if entry.domain == "")
        self.opset = max(opsets, default=0)
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.producers: dict[str, Any] = {}  # the node that computes each tensor
        # The nodes that read each tensor, and at which input.
        self.readers: dict[str, list[tuple[Any, int]]] = {}
        for node in proto.graph.node:
            self.producers.update(dict.fromkeys(node.output, node))
            for i, name in enumerate(node.input):
                self.readers.setdefault(name, []).append((node, i))
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t

    def problem(self, node: Any) -> str:
        checks: tuple[Callable[[Any], str], ...] = (
            self._parameters, self._pairing, self._granularity
        )  # fmt: skip
        if self.opset < _LEAST_OPSET:
            return f"the model is of opset {self.opset}, below {_LEAST_OPSET}"
        return next((problem for check in checks if (problem := check(node))), "")

    def _value(self, name: str) -> Any:
        """A constant tensor as an array; None for a tensor that is computed."""
        tensor = self.constants.get(name)
        return None if tensor is None else self.onnx.numpy_helper.to_array(tensor)

    def _parameters(self, node: Any) -> str:
        """Scale: constant, positive, finite. Zero point: constant, int8, 0."""
        scale = self._value(node.input[1])
        if scale is None:
            return "its scale is no constant"
        if not ((scale > 0) & (scale < float("inf"))).all():
            return "its scale is not positive and finite"
        if len(node.input) < 3 or not node.input[2]:
            return "it has no zero point, so its type is uint8" if node.op_type == _PAIR[0] else ""
        zero_point = self.constants.get(node.input[2])
        if zero_point is None:
            return "its zero point is no constant"
        if zero_point.data_type != self.onnx.TensorProto.INT8:
            kind = self.onnx.TensorProto.DataType.Name(zero_point.data_type).lower()
            return f"its type is {kind}, not int8"
        return "its zero point is not 0" if self._value(node.input[2]).any() else ""

    def _pairing(self, node: Any) -> str:
        """Only DequantizeLinear, with the same scale, may read the output of QuantizeLinear.

        DequantizeLinear has to read QuantizeLinear or a constant.
        """
        if node.op_type == "DequantizeLinear":
            source = self.producers.get(node.input[0])
            if node.input[0] in self.constants or (source and source.op_type == _PAIR[0]):
                return ""
            return "it reads neither a QuantizeLinear nor a constant"
        readers = [reader for reader, _ in self.readers.get(node.output[0], [])]
        others = [reader.op_type for reader in readers if reader.op_type != _PAIR[1]]
        if others or not readers:
            return f"it is read by {', '.join(others) or 'nothing'}, not by DequantizeLinear alone"
        scale = self._value(node.input[1])
        for reader in readers:
            other = self._value(reader.input[1])
            if other is None or other.shape != scale.shape or (other != scale).any():
                return "its DequantizeLinear has another scale"
        return ""

    def _granularity(self, node: Any) -> str:
        """Activations per tensor; weights per tensor or by output channels of their layer."""
        if self._value(node.input[1]).ndim == 0:
            return ""
        tensor = node.input[0]
        source = self.producers.get(tensor)
        if node.op_type == _PAIR[1] and source is not None and source.op_type == _PAIR[0]:
            tensor = source.input[0]
        if tensor not in self.constants:
            return "it quantizes an activation per channel"
        if any(entry.name == "block_size" and entry.i for entry in node.attribute):
            return "it has a scale for each group"
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        rank = len(self.constants[tensor].dims)
        quantizes = node.op_type == _PAIR[0]
        dequantizers = (
            [reader for reader, _ in self.readers[node.output[0]]] if quantizes else [node]
        )
        for dequantizer in dequantizers:
            for reader, position in self.readers.get(dequantizer.output[0], []):
                want = _output_axis(reader, position, rank)
                if want is None:
                    return f"it is per channel and read by {reader.op_type}, not by a layer"
                if axis % rank != want:
                    return f"its axis is {axis}, not the output channels' {want}"
        return ""


def _output_axis(layer: Any, position: int, rank: int) -> int | None:
    """The axis of a layer's output channels in its weight of `rank`; None if it is no weight.

    `position` is that of the weight among the layer's inputs.
    """
    if position != 1:
        return None
    if layer.op_type in ("Conv", "ConvTranspose"):
        return 0 if layer.op_type == "Conv" else 1
    if layer.op_type == "Gemm":
        transposed = any(entry.name == "transB" and entry.i for entry in layer.attribute)
        return 0 if transposed else 1
    return rank - 1 if layer.op_type == "MatMul" else None
