"""The float model of a quantized ONNX file: the same graph without its quantizers."""

from __future__ import annotations

from typing import Any

import numpy as np

from torch_ext.export.common.onnx_bytes import model_bytes, model_copy
from torch_ext.export.engines.file_tensors import CARRIERS, bodies, reads

_TOO_LARGE = "so it is not timed against itself in float"
_MOVERS = (*CARRIERS, "Pad")
_OWN_CLIPS = ("/clipped", "/above")  # before a grid that is narrower than its type


def float_twin(who: str, packages: Any, proto: Any, label: object) -> bytes:
    """A ModelProto without QuantizeLinear and DequantizeLinear, as bytes.

    A pair of them is taken out, also from around operators that only move the integers, which then
    move floats; and integers of the file become the floats that they stand for.
    Integers that an operator computes, as in files without pairs, stay as they are. `packages` is
    the package onnx, `proto` holds its weights and stays as it is. Errors name the function `who`
    and call the model `label`. Raises ValueError if it is too large for a message of protobuf.
    """
    twin = model_copy(who, proto, label, _TOO_LARGE)
    _Twin(packages, twin.graph).make()
    return model_bytes(who, twin, label, _TOO_LARGE)


class _Twin:
    """Takes the quantizers out of one graph, in place."""

    def __init__(self, packages: Any, graph: Any) -> None:
        self.onnx = packages
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                if value is not None:
                    self.constants[node.output[0]] = value
        # A constant that is an input, too, as up to IR 3, would without a value have to be given.
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.producers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for name in set(reads(node)):
                self.readers.setdefault(name, []).append(node)
        self.renamed: dict[str, str] = {}
        self.moved: set[str] = set()  # results of what moved integers and now moves floats

    def make(self) -> None:
        kept = []
        for node in self.graph.node:
            source = self._source(node)
            if source is None:
                kept.append(node)
                self._move_floats(node)
            elif node.output[0] in self.outputs:
                kept.append(
                    self.onnx.helper.make_node("Identity", [source], [node.output[0]], node.name)
                )
            else:
                self.renamed[node.output[0]] = source
        for node in kept:
            _rename(node, self.renamed)
        self._keep(kept)

    def _source(self, node: Any) -> str | None:
        """What a DequantizeLinear's result is in float; None for a node that stays."""
        if node.op_type != "DequantizeLinear":
            return None
        if node.input[0] in self.constants:
            return self._constant(node)
        if node.input[0] in self.moved:
            return str(node.input[0])
        pair = self.producers.get(node.input[0])
        if pair is None or pair.op_type != "QuantizeLinear":
            return None
        return self._quantized(pair)

    def _quantized(self, pair: Any) -> str:
        """What a QuantizeLinear quantizes, before clips of this package."""
        name = str(pair.input[0])
        while (clip := self.producers.get(name)) is not None and clip.name.endswith(_OWN_CLIPS):
            name = str(clip.input[0])
        return self.renamed.get(name, name)

    def _move_floats(self, mover: Any) -> None:
        """Has an operator that moves integers move floats, if all results are only dequantized."""
        if mover.op_type not in _MOVERS or not self._only_dequantized(mover):
            return
        pair = self.producers.get(mover.input[0])
        if mover.input[0] not in self.moved:
            if pair is None or pair.op_type != "QuantizeLinear":
                return
            mover.input[0] = self._quantized(pair)
        self.moved.update(mover.output)
        if mover.op_type == "Pad" and len(mover.input) > 2 and mover.input[2]:
            mover.input[2] = self._padding(mover)

    def _only_dequantized(self, mover: Any) -> bool:
        """Whether all that reads its results is DequantizeLinear, or moves them to one."""
        return not self.outputs.intersection(mover.output) and all(
            reader.op_type == "DequantizeLinear"
            or (reader.op_type in _MOVERS and self._only_dequantized(reader))
            for name in mover.output
            for reader in self.readers.get(name, [])
        )

    def _padding(self, pad: Any) -> str:
        """The value in float that a Pad of integers puts around them."""
        name = str(pad.input[2])
        maker, reader = self.producers.get(name), self._dequantizer(pad)
        if maker is not None and maker.op_type == "QuantizeLinear":
            return str(maker.input[0])
        if name not in self.constants or reader is None:
            return name
        return self._constant(reader, name, f"{pad.output[0]}/padding")

    def _dequantizer(self, mover: Any) -> Any:
        """A DequantizeLinear of what an operator moves."""
        for reader in self.readers.get(mover.output[0], []):
            if reader.op_type == "DequantizeLinear":
                return reader
            if (found := self._dequantizer(reader)) is not None:
                return found
        return None

    def _constant(self, node: Any, integers: str = "", name: str = "") -> str:
        """Adds the floats that a constant's integers stand for; returns their name.

        `node` dequantizes; the integers are its own, or else those of that name.
        """
        names = [integers or node.input[0], *node.input[1:]]
        arrays = [self.onnx.numpy_helper.to_array(self.constants[one]) for one in names]
        levels, scale = arrays[0].astype(np.float32), arrays[1]
        zero_point = arrays[2].astype(np.float32) if len(arrays) > 2 else np.float32(0)
        given = {attribute.name: attribute.i for attribute in node.attribute}
        wide = [_spread(one, levels.shape, given) for one in (scale, zero_point)]
        floats = ((levels - wide[1]) * wide[0].astype(np.float32)).astype(scale.dtype)
        name = name or f"{node.output[0]}/float"
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(floats, name))
        return name

    def _keep(self, nodes: list[Any]) -> None:
        """Sets the graph's nodes, without those whose results nothing reads."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(nodes):
            if any(name in needed for name in node.output):
                kept.append(type(node).FromString(node.SerializeToString()))
                needed.update(reads(node))
        kept.reverse()
        constants = [
            type(tensor).FromString(tensor.SerializeToString())
            for tensor in self.graph.initializer
            if tensor.name in needed or tensor.name in self.inputs
        ]
        for field, messages in ((self.graph.node, kept), (self.graph.initializer, constants)):
            del field[:]
            field.extend(messages)
        del self.graph.value_info[:]


def _spread(values: Any, shape: tuple[int, ...], given: dict[str, int]) -> Any:
    """A grid's values along a tensor of that shape: one for all, per channel or per block."""
    values = np.asarray(values)
    axis = given.get("axis", 1) % max(len(shape), 1)
    if values.size == 1:
        return values.reshape(())
    if block := given.get("block_size", 0):
        return np.repeat(values, block, axis)[
            tuple(slice(size) if i == axis else slice(None) for i, size in enumerate(shape))
        ]
    return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def _rename(node: Any, names: dict[str, str]) -> None:
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)
    for graph in bodies(node):
        for inner in graph.node:
            _rename(inner, names)
