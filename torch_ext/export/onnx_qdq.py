"""Puts QuantizeLinear and DequantizeLinear where a graph names quantizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_ext.export.common.entries import Entry
from torch_ext.export.common.trace import BATCH, SYMBOL, TracedInput
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import WeightSource
from torch_ext.quantizers.grid import dtype_name, parse_dtype

PLAIN_OPSET = 18  # the least that torch.onnx makes
_WIDE_OPSET = 21  # the first with 4 and 16 bits
_HALF = {torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}


@dataclass(frozen=True)
class OnnxGrid:
    """A quantizer's grid, in the ONNX type that holds it."""

    type: str  # "int8", as in TensorProto less the capitals
    least: int  # of the type
    most: int
    quant_min: int
    quant_max: int
    axis: int  # -1: per tensor

    @classmethod
    def of(cls, quantizer: FakeQuantize) -> OnnxGrid:
        observer = quantizer.observer
        name = dtype_name(observer.dtype)
        bits = int(name.partition("int")[2])
        size = next(one for one in (4, 8, 16) if bits <= one)
        kind = f"{'u' if name.startswith('u') else ''}int{size}"
        _, least, most = parse_dtype("export.onnx", kind)
        return cls(kind, least, most, observer.quant_min, observer.quant_max, observer.ch_axis)

    @property
    def opset(self) -> int:
        return PLAIN_OPSET if self.type.endswith("int8") else _WIDE_OPSET

    @property
    def whole(self) -> bool:
        return (self.quant_min, self.quant_max) == (self.least, self.most)


class Rewriter:
    """Works on one model, a ModelProto of torch.onnx with one node per use of a quantizer."""

    def __init__(
        self,
        packages: Any,
        proto: Any,
        chosen: Mapping[str, Entry],
        grids: Mapping[str, OnnxGrid],
        sources: Mapping[FakeQuantize, WeightSource],
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
        self.made: dict[str, str] = {}  # of weights: quantizer -> its dequantized tensor
        self.tensors: dict[str, dict[str, Any]] = {}
        self.renamed: dict[str, str] = {}
        self.outputs = {one.name for one in self.graph.output}
        self.taken = {one.name for one in self.graph.initializer}

    def quantize(self) -> dict[str, dict[str, Any]]:
        """Replaces every quantizer; returns its tensors and grid by name."""
        for name, node in self._quantizers():
            entry, x, y = self.chosen[name], self._name(node.input[0]), node.output[0]
            source = self.sources.get(entry.quantizer)
            if source is None:
                self._keep_output(self._activation(entry, x), y)
                continue
            if name not in self.made:
                self.made[name] = self._weight(entry, source)
            self._keep_output(self.made[name], y)
        self._finish()
        return self.tensors

    def remove(self) -> dict[str, dict[str, Any]]:
        """Removes every quantizer; returns the tensors that each would quantize."""
        for name, node in self._quantizers():
            x, y = self._name(node.input[0]), node.output[0]
            if source := self.sources.get(self.chosen[name].quantizer):
                label = _label(source)
                if name not in self.made:
                    self.made[name] = self._constant(label, source.read().cpu())
                x = self.made[name]
            self._keep_output(x, y)
            self._note(name, x)
        self._finish()
        return self.tensors

    def _quantizers(self) -> Iterator[tuple[str, Any]]:
        """The nodes to replace; all others are kept on the way."""
        for node in self.graph.node:
            if (node.domain, node.op_type) != SYMBOL:
                for i, name in enumerate(node.input):
                    node.input[i] = self._name(name)
                self.nodes.append(node)
            else:
                yield node.attribute[0].s.decode(), node

    def _name(self, tensor: str) -> str:
        return self.renamed.get(tensor, tensor)

    def _keep_output(self, tensor: str, name: str) -> None:
        """What read `name` reads `tensor`; an output of the model keeps its name."""
        if name in self.outputs:
            self._add("Identity", [tensor], name, name)
        else:
            self.renamed[name] = tensor

    def _activation(self, entry: Entry, x: str) -> str:
        uses = self.tensors.get(entry.name, {}).get("tensors", [])
        label = entry.name + (f"_{len(uses)}" if uses else "")
        self._note(entry.name, x)
        half = self._half(entry)
        if half:
            x = self._add("Cast", [x], f"{label}/float", to=self.onnx.TensorProto.FLOAT)
        x = self._clip(entry, x, label)
        y = self._pair(entry, x, label)
        return self._add("Cast", [y], f"{label}/{half.lower()}", to=self._code(half)) if half else y

    def _weight(self, entry: Entry, source: WeightSource) -> str:
        label, half = _label(source), self._half(entry)
        weight = source.read()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"export.onnx: expected {label} to be finite, got other values")
        if self.quantized_weights:
            name = self._integers(entry, weight, label)
            y = self._dequantize(entry, name, entry.name)
        else:
            low, high = self._bounds(entry)
            shape = _broadcast(weight.dim(), self.grids[entry.name].axis)
            plain = weight.detach().cpu().float()
            if not self.grids[entry.name].whole:
                plain = plain.clamp(low.view(shape), high.view(shape))
            name = self._constant(label, plain)
            y = self._pair(entry, name, entry.name)
        self._note(entry.name, name)
        return self._add("Cast", [y], f"{entry.name}/cast", to=self._code(half)) if half else y

    def _integers(self, entry: Entry, weight: Tensor, label: str) -> str:
        """The quantized weight, from what VALIDATION makes of it: (q - zero_point) * scale."""
        grid = self.grids[entry.name]
        with torch.no_grad():
            made = entry.quantizer(weight.float()).cpu().double()
        shape = _broadcast(weight.dim(), grid.axis)
        scale, zero_point = entry.scale.double().view(shape), entry.zero_point.view(shape)
        values = ((made / scale).round() + zero_point).to(torch.int32)
        return self._initializer(f"{label}/{grid.type}", grid.type, values.numpy())

    def _clip(self, entry: Entry, x: str, label: str) -> str:
        """To the grid where it is narrower than its type; in float, as no engine clips integers of
        every type. A value that is clipped to a level's is quantized to that level."""
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
        """What the grid's ends stand for, [C] each."""
        grid = self.grids[entry.name]
        low, high = (
            (end - entry.zero_point).float() * entry.scale
            for end in (grid.quant_min, grid.quant_max)
        )
        return low, high

    def _pair(self, entry: Entry, x: str, label: str) -> str:
        inputs = [x, *self._parameters(entry)]
        q = self._add("QuantizeLinear", inputs, f"{label}/quantized", **self._axis(entry))
        return self._dequantize(entry, q, label)

    def _dequantize(self, entry: Entry, q: str, label: str) -> str:
        inputs = [q, *self._parameters(entry)]
        return self._add("DequantizeLinear", inputs, f"{label}/dequantized", **self._axis(entry))

    def _axis(self, entry: Entry) -> dict[str, Any]:
        axis = self.grids[entry.name].axis
        return {} if axis < 0 else {"axis": axis}

    def _parameters(self, entry: Entry) -> list[str]:
        """Scale and zero point: scalars per tensor."""
        grid = self.grids[entry.name]
        shape = (-1,) if grid.axis >= 0 else ()
        scale = self._constant(f"{entry.name}/scale", entry.scale.reshape(shape))
        zero_point = entry.zero_point.reshape(shape).numpy()
        return [scale, self._initializer(f"{entry.name}/zero_point", grid.type, zero_point)]

    def _constant(self, name: str, value: Tensor) -> str:
        if name not in self.taken:
            plain = value.detach().contiguous()
            plain = plain.float() if plain.dtype == torch.bfloat16 else plain
            self.graph.initializer.append(self.onnx.numpy_helper.from_array(plain.numpy(), name))
            self.taken.add(name)
        return name

    def _initializer(self, name: str, kind: str, values: Any) -> str:
        """Integers; two to a byte, the first in the lower half, where they have 4 bits."""
        if name not in self.taken:
            if kind.endswith("int4"):
                flat = (values.reshape(-1) & 15).astype(np.uint8)
                flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
                data = (flat[0::2] | flat[1::2] << 4).tobytes()
            else:
                data = values.astype(np.dtype(kind).newbyteorder("<")).tobytes()
            made = self.onnx.helper.make_tensor(
                name, self._code(kind), values.shape, data, raw=True
            )
            self.graph.initializer.append(made)
            self.taken.add(name)
        return name

    def _code(self, kind: str) -> int:
        code: int = getattr(self.onnx.TensorProto, kind.upper())
        return code

    def _half(self, entry: Entry) -> str:
        return next((_HALF[d] for d in self.seen[entry.name].dtypes if d in _HALF), "")

    def _add(
        self, op: str, inputs: list[str], output: str, name: str | None = None, **given: Any
    ) -> str:
        node = self.onnx.helper.make_node(op, inputs, [output], name=name or output, **given)
        self.nodes.append(node)
        return output

    def _note(self, name: str, tensor: str) -> None:
        grid = self.grids[name]
        note = self.tensors.setdefault(
            name,
            {
                "tensors": [],
                "type": grid.type,
                "quant_min": grid.quant_min,
                "quant_max": grid.quant_max,
                "axis": grid.axis,
                "weight": self.chosen[name].is_weight,
            },
        )
        if tensor not in note["tensors"]:
            note["tensors"].append(tensor)

    def _finish(self) -> None:
        """Takes the new nodes, less what nothing reads any more; names the batch."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if any(name in needed for name in node.output):
                kept.append(node)
                needed.update(_read_by(node))
        kept.reverse()
        constants = [one for one in self.graph.initializer if one.name in needed]
        shapes = [one for one in self.graph.value_info if one.name in needed]
        shapes = [one for one in shapes if one.name not in self.renamed]
        for field, those in (
            (self.graph.node, kept),
            (self.graph.initializer, constants),
            (self.graph.value_info, shapes),
        ):
            those = [type(one).FromString(one.SerializeToString()) for one in those]
            del field[:]
            field.extend(those)
        domains = [one for one in self.proto.opset_import if one.domain != SYMBOL[0]]
        domains = [type(one).FromString(one.SerializeToString()) for one in domains]
        del self.proto.opset_import[:]
        self.proto.opset_import.extend(domains)
        self._name_batch()

    def _name_batch(self) -> None:
        """torch.onnx calls a free axis s77, or the like."""
        axes = [
            one.type.tensor_type.shape.dim[0].dim_param
            for one in self.graph.input
            if one.type.tensor_type.shape.dim
        ]
        free = [name for name in axes if name]
        for one in (*self.graph.input, *self.graph.output, *self.graph.value_info):
            for axis in one.type.tensor_type.shape.dim:
                if free and axis.dim_param == free[0]:
                    axis.dim_param = BATCH


def _label(source: WeightSource) -> str:
    return f"{source.owner}.{source.parameter}".strip(".")


def _broadcast(rank: int, axis: int) -> list[int]:
    return [-1 if i == axis else 1 for i in range(rank)]


def _read_by(node: Any) -> Iterator[str]:
    """What a node reads, also in the bodies of a loop or a branch."""
    yield from node.input
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield from _read_by(inner)
            for output in graph.output:
                yield output.name
