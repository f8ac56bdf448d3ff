"""The tensors of an ONNX file: quantized ones, those that nodes read, and inputs from a batch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torch_ext.files.storage import FileError, PathLike
from torch_ext.utils.batches import tensors_in

# Operators that only move values; the optimiser carries QuantizeLinear across them.
CARRIERS = (
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice",
    "Split", "Gather", "Expand",
)  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """A call of a quantizer in a file."""

    #: The quantizer's name.
    quantizer: str
    #: The tensor that it quantizes.
    source: str
    #: The integers.
    quantized: str
    #: Their values in float.
    dequantized: str
    #: The tensor of its scale.
    scale: str


def file_tensors(
    path: PathLike, proto: Any, noted: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[FileTensor]]:
    """The calls of each quantizer of a file of ``export.onnx``, in the order of the graph.

    `noted` is what its metadata says of the quantizers. Raises FileError for one without nodes.
    """
    producers = {name: node for node in proto.graph.node for name in node.output}
    found: dict[str, list[FileTensor]] = {name: [] for name in noted}
    for node in proto.graph.node:
        label = node.name.removesuffix("/dequantized")
        if node.op_type != "DequantizeLinear" or label == node.name:
            continue
        name = node.input[1].removesuffix("/scale")
        if name not in found or not re.fullmatch(re.escape(name) + r"(_\d+)?", label):
            continue
        before = producers.get(node.input[0])
        source = node.input[0] if before is None else before.input[0]
        found[name].append(FileTensor(name, source, node.input[0], node.output[0], node.input[1]))
    if missing := [name for name, calls in found.items() if not calls]:
        raise FileError(path, f"{missing[0]}: its QuantizeLinear and DequantizeLinear are missing")
    return found


def feeds_of(who: str, label: object, session: Any, batch: Any) -> dict[str, Any]:
    """The session's inputs from a batch's tensors, in their order.

    Raises:
        ValueError: for another number of tensors, or a shape or a type that the file does not take.
    """
    wanted = session.get_inputs()
    given = [tensor.detach().cpu() for tensor in tensors_in(batch)]
    if len(given) != len(wanted):
        names = ", ".join(one.name for one in wanted)
        raise ValueError(
            f"{who}: expected batch to hold the {len(wanted)} inputs of {label} ({names}), got "
            f"{len(given)} tensors"
        )
    feeds = {}
    for one, tensor in zip(wanted, given, strict=True):
        array = tensor.float().numpy() if _is_bfloat16(tensor) else tensor.numpy()
        kind = _TYPES.get(str(array.dtype), str(array.dtype))
        if not fits(array.shape, one.shape):
            raise ValueError(
                f"{who}: expected batch's {one.name} to have the shape {list(one.shape)} that "
                f"{label} was exported with, got {list(array.shape)}"
            )
        if one.type != f"tensor({kind})":
            raise ValueError(
                f"{who}: expected batch's {one.name} to be {one.type} as in {label}, got {kind}"
            )
        feeds[one.name] = np.ascontiguousarray(array)
    return feeds


def fits(shape: Sequence[int], wanted: Sequence[Any]) -> bool:
    """Whether a tensor's shape is that of an input, whose open dimensions are text or None."""
    return len(shape) == len(wanted) and all(
        not isinstance(want, int) or have == want for have, want in zip(shape, wanted, strict=True)
    )


_TYPES = {"float32": "float", "float64": "double"}  # onnxruntime's names, where they differ


def _is_bfloat16(tensor: Any) -> bool:
    return str(tensor.dtype) == "torch.bfloat16"


def reads(node: Any) -> Iterator[str]:
    """Names of what a node reads; bodies of If and Loop read tensors around them, too."""
    yield from node.input
    for graph in bodies(node):
        for inner in graph.node:
            yield from reads(inner)
        yield from (value.name for value in graph.output)


def bodies(node: Any) -> Iterator[Any]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)
