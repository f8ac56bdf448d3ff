"""Replaces the quantizers of an ONNX graph by QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_ext.export.common.entries import Entry
from torch_ext.export.common.trace import BATCH, SYMBOL, TracedInput
from torch_ext.export.onnx_grid import OnnxGrid
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import AnyWeightSource
from torch_ext.quantizers.parts.groups import blocks_of, spread

_HALF = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


class Rewriter:
    """Replaces the quantizers of one ModelProto, in place.

    In the ModelProto each call of a quantizer is a node of the operator ``SYMBOL``, whose attribute
    is the quantizer's name. `packages` is the package onnx; the mappings are by quantizer's name,
    `sources` by quantizer. Call one of `quantize` and `remove`, once.
    """

    def __init__(
        self,
        packages: Any,
        proto: Any,
        chosen: Mapping[str, Entry],
        grids: Mapping[str, OnnxGrid],
        sources: Mapping[FakeQuantize, AnyWeightSource],
        seen: Mapping[str, TracedInput],
        quantized_weights: bool,
    ) -> None:
        self.onnx = packages
        self.graph = proto.graph
        self.proto = proto
        self.chosen = chosen
        self.grids = grids
        self.sources = sources
        self.seen = seen
        self.quantized_weights = quantized_weights
        self.nodes: list[Any] = []
        self.weights: dict[str, str] = {}  # a weight's quantizer -> the tensor in its place
        self.shapes: dict[str, torch.Size] = {}  # a weight's quantizer -> the weight's shape
        self.tensors: dict[str, dict[str, Any]] = {}
        self.renamed: dict[str, str] = {}
        self.labels: set[str] = set()  # of the calls of quantizers
        self.outputs = {output.name for output in self.graph.output}
        self.taken = {tensor.name for tensor in self.graph.initializer}

    def quantize(self) -> dict[str, dict[str, Any]]:
        """Replaces every quantizer; returns its tensors and its grid by name, for the metadata."""
        for name, node in self._quantizers():
            entry, x, y = self.chosen[name], self._name(node.input[0]), node.output[0]
            source = self.sources.get(entry.quantizer)
            if source is None:
                self._redirect(y, self._activation(entry, x))
                continue
            if name not in self.weights:
                self.weights[name] = self._weight(entry, source)
            self._redirect(y, self.weights[name])
        self._finish()
        return self.tensors

    def remove(self) -> dict[str, dict[str, Any]]:
        """Removes every quantizer; returns the tensors that each would quantize, and its grid."""
        for name, node in self._quantizers():
            x, y = self._name(node.input[0]), node.output[0]
            if source := self.sources.get(self.chosen[name].quantizer):
                label = _label(source)
                if name not in self.weights:
                    self.weights[name] = self._constant(label, source.read().cpu())
                x = self.weights[name]
            self._redirect(y, x)
            self._note(name, x)
        self._finish()
        return self.tensors

    def _quantizers(self) -> Iterator[tuple[str, Any]]:
        """Yields each quantizer's name and node in order; adds the other nodes to `nodes`."""
        for node in self.graph.node:
            if (node.domain, node.op_type) != SYMBOL:
                for i, name in enumerate(node.input):
                    node.input[i] = self._name(name)
                self.nodes.append(node)
            else:
                yield node.attribute[0].s.decode(), node

    def _name(self, tensor: str) -> str:
        return self.renamed.get(tensor, tensor)

    def _redirect(self, name: str, tensor: str) -> None:
        """Redirects the consumers of `name` to `tensor`; an output of the model keeps its name."""
        if name in self.outputs:
            self._add("Identity", [tensor], name, name)
        else:
            self.renamed[name] = tensor

    def _activation(self, entry: Entry, x: str) -> str:
        """Adds the nodes that quantize `x`, and returns their output."""
        label = self._label(entry.name)
        self._note(entry.name, x)
        half = self._half(entry)
        if half:
            x = self._add("Cast", [x], f"{label}/float", to=self.onnx.TensorProto.FLOAT)
        x = self._clip(entry, x, label)
        y = self._pair(entry, x, label)
        return self._add("Cast", [y], f"{label}/{half.lower()}", to=self._code(half)) if half else y

    def _label(self, quantizer: str) -> str:
        """A label for a call of a quantizer: its name, then with a number that no other has."""
        label, count = quantizer, 0
        while label in self.labels or (count and label in self.chosen):
            count += 1
            label = f"{quantizer}_{count}"
        self.labels.add(label)
        return label

    def _weight(self, entry: Entry, source: AnyWeightSource) -> str:
        """Stores a weight and adds its nodes; returns the dequantized tensor.

        Raises ValueError for a weight that is not finite.
        """
        label, half = _label(source), self._half(entry)
        weight = source.read()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"export.onnx: expected {label} to be finite, got other values")
        self.shapes[entry.name] = weight.shape
        if self.quantized_weights:
            name = self._levels(entry, weight, label)
            y = self._dequantize(entry, name, entry.name)
        else:
            plain = weight.detach().cpu().float()
            if not self.grids[entry.name].whole:
                plain = plain.clamp(*(_spread(entry, end, plain) for end in self._bounds(entry)))
            name = self._constant(label, plain)
            y = self._pair(entry, name, entry.name)
        self._note(entry.name, name)
        return self._add("Cast", [y], f"{entry.name}/cast", to=self._code(half)) if half else y

    def _levels(self, entry: Entry, weight: Tensor, label: str) -> str:
        """Stores a weight's levels q, from its fake-quantized values (q - zero_point) * scale."""
        grid = self.grids[entry.name]
        with torch.no_grad():
            values = entry.quantizer(weight.float()).cpu().double()
        scale, zero_point = (
            _spread(entry, t, values) for t in (entry.scale.double(), entry.zero_point)
        )
        if grid.dtype is not None:
            # The quotient is a number of the format but for the rounding of the product.
            numbers = (values / scale).float().to(grid.dtype)
            return self._initializer(f"{label}/{grid.type}", grid.type, _bytes_of(numbers))
        levels = ((values / scale).round() + zero_point).to(torch.int32)
        return self._initializer(f"{label}/{grid.type}", grid.type, levels.numpy())

    def _clip(self, entry: Entry, x: str, label: str) -> str:
        """Clips `x` to a grid that is narrower than its type; returns the result, or `x` itself.

        Clips float values, before QuantizeLinear, because no engine clips integers of every type.
        A value at an end of the grid is quantized to that end, so the result is the same.
        """
        grid = self.grids[entry.name]
        if grid.whole:
            return x
        low, high = self._bounds(entry)
        if grid.axis >= 0:
            shape = _broadcast(self.seen[entry.name].rank, grid.axis)[grid.axis :]
            x = self._add(
                "Max", [x, self._constant(f"{entry.name}/low", low.view(shape))], f"{label}/above"
            )
            return self._add(
                "Min",
                [x, self._constant(f"{entry.name}/high", high.view(shape))],
                f"{label}/clipped",
            )
        ends = [
            self._constant(f"{entry.name}/{end}", value.reshape(()))
            for end, value in (("low", low), ("high", high))
        ]
        return self._add("Clip", [x, *ends], f"{label}/clipped")

    def _bounds(self, entry: Entry) -> tuple[Tensor, Tensor]:
        """The values of quant_min and quant_max, float32 [C] each."""
        grid = self.grids[entry.name]
        low, high = (
            (end - entry.zero_point).float() * entry.scale
            for end in (grid.quant_min, grid.quant_max)
        )
        return low, high

    def _pair(self, entry: Entry, x: str, label: str) -> str:
        inputs = [x, *self._parameters(entry)]
        keys = self._axis(entry)
        if self.grids[entry.name].is_float:
            keys["saturate"] = 1  # the default, which nobody should overlook
        q = self._add("QuantizeLinear", inputs, f"{label}/quantized", **keys)
        return self._dequantize(entry, q, label)

    def _dequantize(self, entry: Entry, q: str, label: str) -> str:
        inputs = [q, *self._parameters(entry)]
        return self._add("DequantizeLinear", inputs, f"{label}/dequantized", **self._axis(entry))

    def _axis(self, entry: Entry) -> dict[str, Any]:
        grid = self.grids[entry.name]
        if grid.block is not None:
            return {"axis": grid.axis, "block_size": grid.block}
        return {} if grid.axis < 0 else {"axis": grid.axis}

    def _parameters(self, entry: Entry) -> list[str]:
        """The tensors of scale and zero point: scalars per tensor, of blocks in their layout."""
        grid = self.grids[entry.name]
        tensors = [entry.scale, entry.zero_point]
        if grid.block is not None:
            layout = (self.shapes[entry.name], grid.axis, grid.block)
            tensors = [blocks_of(tensor, *layout).contiguous() for tensor in tensors]
        elif grid.axis < 0:
            tensors = [tensor.reshape(()) for tensor in tensors]
        scale, zero_point = self._constant(f"{entry.name}/scale", tensors[0]), tensors[1].numpy()
        return [scale, self._initializer(f"{entry.name}/zero_point", grid.type, zero_point)]

    def _constant(self, name: str, value: Tensor) -> str:
        """Stores a floating tensor under a name, once; bfloat16 becomes float32."""
        if name not in self.taken:
            plain = value.detach().contiguous()
            plain = plain.float() if plain.dtype == torch.bfloat16 else plain
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(plain.numpy(), name))
            self.taken.add(name)
        return name

    def _initializer(self, name: str, kind: str, values: Any) -> str:
        """Stores integers of an ONNX type, or the bytes of a float8 type, under a name, once.

        4-bit integers are packed by two into a byte, the first in the lower half, as ONNX requires.
        """
        if name not in self.taken:
            if kind.endswith("int4"):
                flat = (values.reshape(-1) & 15).astype(np.uint8)
                flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
                data = (flat[0::2] | flat[1::2] << 4).tobytes()
            elif kind.startswith("float8"):
                data = values.astype(np.uint8).tobytes()  # of a zero point, 0 is +0
            else:
                data = values.astype(np.dtype(kind).newbyteorder("<")).tobytes()
            tensor = self.onnx.helper.make_tensor(
                name, self._code(kind), values.shape, data, raw=True
            )
            self.graph.initializer.append(tensor)
            self.taken.add(name)
        return name

    def _code(self, kind: str) -> int:
        code: int = getattr(self.onnx.TensorProto, kind.upper())
        return code

    def _half(self, entry: Entry) -> str:
        """ONNX's name of the half type that a quantizer was traced with; empty for float32."""
        dtypes = self.seen[entry.name].dtypes
        return next((_HALF[dtype] for dtype in dtypes if dtype in _HALF), "")

    def _add(
        self, op: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any
    ) -> str:
        node = self.onnx.helper.make_node(op, inputs, [output], name=name or output, **attributes)
        self.nodes.append(node)
        return output

    def _note(self, name: str, tensor: str) -> None:
        """Adds a tensor to those that a quantizer quantizes, for the metadata."""
        grid = self.grids[name]
        note = self.tensors.setdefault(
            name,
            {
                "tensors": [],
                "type": grid.type,
                "quant_min": grid.quant_min,
                "quant_max": grid.quant_max,
                "axis": grid.axis,
                **({} if grid.block is None else {"block_size": grid.block}),
                "weight": self.chosen[name].is_weight,
            },
        )
        if tensor not in note["tensors"]:
            note["tensors"].append(tensor)

    def _finish(self) -> None:
        """Puts the new nodes into the graph, without those that nothing reads; names the batch."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output):
                kept.append(node)
                needed.update(_read_by(node))
        kept.reverse()
        constants = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        shapes = [
            info
            for info in self.graph.value_info
            if info.name in needed and info.name not in self.renamed
        ]
        domains = [entry for entry in self.proto.opset_import if entry.domain != SYMBOL[0]]
        _replace(self.graph.node, kept)
        _replace(self.graph.initializer, constants)
        _replace(self.graph.value_info, shapes)
        _replace(self.proto.opset_import, domains)
        self._name_batch()

    def _name_batch(self) -> None:
        """Names the dynamic batch axis; torch.onnx calls it ``s77`` or the like."""
        axes = [
            value.type.tensor_type.shape.dim[0].dim_param
            for value in self.graph.input
            if value.type.tensor_type.shape.dim
        ]
        dynamic = [name for name in axes if name]
        for value in (*self.graph.input, *self.graph.output, *self.graph.value_info):
            for axis in value.type.tensor_type.shape.dim:
                if dynamic and axis.dim_param == dynamic[0]:
                    axis.dim_param = BATCH


def _replace(field: Any, messages: list[Any]) -> None:
    """Sets a repeated field to some of its messages, which are copied before it is emptied."""
    copies = [type(message).FromString(message.SerializeToString()) for message in messages]
    del field[:]
    field.extend(copies)


def _bytes_of(numbers: Tensor) -> Any:
    """The bytes of a float8 tensor, which numpy has no type for."""
    return numbers.contiguous().view(torch.uint8).numpy()


def _label(source: AnyWeightSource) -> str:
    """A weight's name in the model, such as ``conv1.weight``."""
    return f"{source.owner}.{source.parameter}".strip(".")


def _spread(entry: Entry, values: Tensor, like: Tensor) -> Tensor:
    """One value a channel or a group of a weight as one for each of its values."""
    return spread(values, like.shape, entry.params.ch_axis, entry.params.group_size)


def _broadcast(rank: int, axis: int) -> list[int]:
    """The shape that lays [C] along an axis of a tensor."""
    return [-1 if i == axis else 1 for i in range(rank)]


def _read_by(node: Any) -> Iterator[str]:
    """The tensors that a node reads, also inside the bodies of a loop or a branch."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read_by(inner)
            for output in graph.output:
                yield output.name
