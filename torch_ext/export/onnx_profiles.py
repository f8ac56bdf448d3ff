"""What the profiles of ``export.onnx`` ask of a file, so that their engine computes in integers."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from torch_ext.export.common.entries import TO_FLOAT, Entry, refuse
from torch_ext.export.engines.file_tensors import CARRIERS, reads
from torch_ext.export.engines.integer_layers import EngineLayer, layers_in_onnxruntime
from torch_ext.export.engines.openvino_runs import openvino_compiled, openvino_layers
from torch_ext.export.onnx_grid import OnnxGrid
from torch_ext.export.tensorrt.onnx_rules import grid_problem, violations
from torch_ext.quantizers.transition import QuantizationWarning

Profile = Literal["onnxruntime", "openvino", "tensorrt", "float"]
PROFILES = (None, *get_args(Profile))


def refuse_grids(
    who: str, profile: Profile | None, chosen: Mapping[str, Entry], grids: Mapping[str, OnnxGrid]
) -> None:
    """Raises ValueError that names the quantizers whose grids the profile's engine does not take.

    What engines make of integers depends on the surroundings: :func:`refuse_file` asks them.
    """
    checks = {
        "tensorrt": grid_problem,
        "openvino": _openvino_problem,
        "onnxruntime": _onnxruntime_problem,
    }
    check = checks.get(profile or "")
    if check is not None:
        found = {name: check(entry, grids[name]) for name, entry in chosen.items()}
        refuse(
            who,
            {name: problem for name, problem in found.items() if problem},
            f'resolve(model, backend="{profile}") gives the grids that it takes; or {TO_FLOAT}',
        )


def refuse_file(who: str, profile: Profile | None, packages: Any, proto: Any, data: bytes) -> None:
    """Raises ValueError that names what the profile's engine would compute in float.

    Args:
        data: `proto` as bytes.

    Warns:
        QuantizationWarning: the engine is not installed, so nothing has judged the file.
    """
    if profile == "tensorrt":
        refuse(who, violations(packages, proto), "these nodes are not what TensorRT takes")
    elif profile in _ENGINES:
        _refuse_float_layers(who, profile, packages, proto, data)


def _onnxruntime_problem(entry: Entry, grid: OnnxGrid) -> str:
    """Why onnxruntime computes with a quantizer's grid in float; empty if that is not known."""
    if entry.groups:
        return f"{entry.groups}, which it computes in float"
    return f"its type is {grid.type}, which it computes in float" if grid.is_float else ""


def _openvino_problem(entry: Entry, grid: OnnxGrid) -> str:
    """Why OpenVINO does not compute with a quantizer's grid in integers; empty if it does."""
    if entry.groups:
        return entry.groups
    if grid.type not in ("int8", "uint8"):
        return f"its type is {grid.type}, not int8 or uint8"
    if entry.is_weight and bool(entry.zero_point.any()):
        return "it quantizes a weight, and its zero point is not 0"
    if grid.axis >= 0 and not entry.is_weight:
        return f"it quantizes an activation per channel (axis {grid.axis})"
    return ""


def _layers_in_openvino(
    who: str, packages: Any, proto: Any, path: Path, label: object
) -> list[EngineLayer]:
    return openvino_layers(openvino_compiled(who, path, label), packages, proto)


# By profile, what lists the layers of a file as the engine computes them.
_ENGINES: dict[str, Callable[..., list[EngineLayer]]] = {
    "onnxruntime": layers_in_onnxruntime,
    "openvino": _layers_in_openvino,
}


def _refuse_float_layers(who: str, profile: str, packages: Any, proto: Any, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        path.write_bytes(data)
        try:
            layers = _ENGINES[profile](who, packages, proto, path, "the result")
        except ImportError:
            warnings.warn(
                f'{who}: {profile} is not installed, so nothing has judged whether profile="'
                f'{profile}" runs in integers: pip install {profile}',
                QuantizationWarning,
                stacklevel=4,
            )
            return
        except ValueError as error:
            reason = str(error).replace(str(path), "the result")
            raise ValueError(f"{reason}; nothing was written") from error
    slow = [layer for layer in layers if layer.quantized and not layer.integer]
    if slow:
        advice = dict.fromkeys(layer.advice for layer in slow)
        lines = [f"  {layer.name or layer.node}: {layer.reason}" for layer in slow]
        raise ValueError(
            f"{who}: expected {profile} to compute every quantized layer in integers, got "
            f"{len(slow)} of {len(layers)} in float; nothing was written ({'; '.join(advice)})\n"
            + "\n".join(lines)
        )


def quantize_biases(packages: Any, proto: Any) -> None:
    """Stores the biases of linear layers as int32, in place.

    Theirs are the only ones that onnxruntime does not quantize itself where the result stays in
    float, and with a bias in float it computes the layer in float. The scale is that of the sums:
    the input's times the weight's. A bias that does not fit into 32 bits stays.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    pairs = []
    for node in graph.node:
        operands = [producers.get(name) for name in node.input[:2]]
        if (
            node.op_type == "Gemm"
            and len(node.input) > 2
            and node.input[2] in constants
            and all(pair is not None and pair.op_type == "DequantizeLinear" for pair in operands)
            and (made := _int32_bias(packages, node, operands, constants))
        ):
            pair, tensors = made
            graph.initializer.extend(tensors)
            pairs.append(pair)
            node.input[2] = pair.output[0]
    read = {name for node in graph.node for name in reads(node)}
    for name, tensor in constants.items():
        if pairs and name not in read and name.endswith("bias"):
            graph.initializer.remove(tensor)
    for pair in reversed(pairs):
        graph.node.insert(0, pair)


def _int32_bias(
    packages: Any, node: Any, operands: list[Any], constants: Mapping[str, Any]
) -> tuple[Any, list[Any]] | None:
    """A DequantizeLinear for the bias of a Gemm, and its tensors; None if int32 cannot hold it."""
    array = packages.numpy_helper.to_array
    attributes = {entry.name: entry for entry in node.attribute}
    bias = array(constants[node.input[2]])
    scales = [array(constants[pair.input[1]]) for pair in operands]
    axis = next((entry.i for entry in operands[1].attribute if entry.name == "axis"), 1)
    turned = "transB" in attributes and attributes["transB"].i
    by_output = scales[1].ndim == 0 or axis == (0 if turned else 1)
    if bias.ndim != 1 or scales[0].ndim or not by_output:
        return None
    if any(key in attributes and attributes[key].f != 1 for key in ("alpha", "beta")):
        return None
    scale = (scales[0] * scales[1]).astype(np.float32)
    with np.errstate(all="ignore"):
        levels = np.rint(bias.astype(np.float64) / scale)
    if not bool((np.abs(levels) < 2**31).all()):  # NaN too
        return None
    # After the bias, for the eye, and the use: a layer called twice has an input scale for each.
    use = f"{node.input[2]}/{node.output[0]}"
    name = f"{use}/dequantized"
    tensors = [
        packages.numpy_helper.from_array(levels.astype(np.int32), f"{use}/int32"),
        packages.numpy_helper.from_array(scale, f"{use}/scale"),
    ]
    inputs = [tensor.name for tensor in tensors]
    keys = {"axis": 0} if scale.ndim else {}
    return packages.helper.make_node("DequantizeLinear", inputs, [name], name, **keys), tensors


def quantize_behind_concats(packages: Any, proto: Any) -> None:
    """Quantizes the result of each Concat of values on one grid to that grid, in place.

    No value changes. onnxruntime looks for a DequantizeLinear before a layer, and carries none
    across this operator.
    """
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    make = packages.helper.make_node

    def grid_of(name: str) -> tuple[str, ...]:
        node = producers.get(name)
        while node is not None and node.op_type in CARRIERS:
            node = producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear" or not _is_scalar(node, constants):
            return ()
        return tuple(node.input[1:])

    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        grids = {grid_of(name) for name in node.input} if node.op_type == "Concat" else set()
        grid = list(grids.pop()) if len(grids) == 1 else []
        if grid:
            result = node.output[0]
            joined, levels = f"{result}/joined", f"{result}/joined/levels"
            node.output[0] = joined
            nodes.append(make("QuantizeLinear", [joined, *grid], [levels], levels))
            producers[result] = make("DequantizeLinear", [levels, *grid], [result], result)
            nodes.append(producers[result])
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def quantize_before_pads(packages: Any, proto: Any) -> dict[str, str]:
    """Moves each QuantizeLinear that alone reads a Pad before it, in place; the results are equal.

    In float a Pad would keep the convolution before it in float: onnxruntime carries QuantizeLinear
    across other operators that move values, but not across this one.

    Returns:
        By the name of a tensor that is quantized no longer, that of the one in its place.
    """
    moved: dict[str, str] = {}
    while turned := _turn_pads(packages, proto.graph):  # again, for a Pad before a Pad
        moved = {name: turned.get(source, source) for name, source in moved.items()} | turned
    return moved


def _turn_pads(packages: Any, graph: Any) -> dict[str, str]:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {output.name: [None] for output in graph.output}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)

    def per_tensor(node: Any) -> bool:
        return node is not None and node.op_type == "QuantizeLinear" and _is_scalar(node, constants)

    moved = {}
    nodes: list[Any] = []
    for node in graph.node:
        quantizers = readers.get(node.output[0], []) if node.op_type == "Pad" else []
        if quantizers and all(per_tensor(reader) for reader in quantizers):
            moved[node.output[0]] = node.input[0]
            for quantizer in quantizers:
                nodes += _quantized_pad(packages, node, quantizer)
        elif not (node.op_type == "QuantizeLinear" and node.input[0] in moved):
            nodes.append(type(node).FromString(node.SerializeToString()))
    del graph.node[:]
    graph.node.extend(nodes)
    for info in [info for info in graph.value_info if info.name in moved]:
        graph.value_info.remove(info)
    return moved


def _is_scalar(quantizer: Any, constants: Mapping[str, Any]) -> bool:
    """Whether a QuantizeLinear has one scale and one zero point for the tensor."""
    names = quantizer.input[1:]
    return len(names) == 2 and all(name in constants and not constants[name].dims for name in names)


def _quantized_pad(packages: Any, pad: Any, quantizer: Any) -> list[Any]:
    """The nodes for a Pad and a QuantizeLinear of its result, in the other order."""
    grid, result = list(quantizer.input[1:]), quantizer.output[0]
    make = packages.helper.make_node
    before = f"{result}/before_pad"
    nodes = [make("QuantizeLinear", [pad.input[0], *grid], [before], before)]
    fill = grid[1]  # of a padding by zeros
    if len(pad.input) > 2 and pad.input[2]:
        fill = f"{result}/padding"
        nodes.append(make("QuantizeLinear", [pad.input[2], *grid], [fill], fill))
    turned = type(pad).FromString(pad.SerializeToString())
    del turned.input[:], turned.output[:]
    turned.input.extend([before, pad.input[1], fill, *pad.input[3:]])
    turned.output.append(result)
    turned.name = result
    return [*nodes, turned]
