"""Loads ONNX files in OpenVINO and runs them on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_ext.export.common.onnx_bytes import model_bytes, model_copy
from torch_ext.export.common.sessions import advice_for
from torch_ext.export.engines.file_tensors import FileTensor
from torch_ext.export.engines.integer_layers import FLOAT_LAYER, EngineLayer, FileLayer, file_layers
from torch_ext.export.engines.tensor_runs import SMALLER, EngineRun

# OpenVINO computes in bfloat16 where the CPU can; VALIDATION computes in float32.
_FLOAT = {"INFERENCE_PRECISION_HINT": "f32"}
_RECURRENT = ("RNNSeq", "RNNCell", "LSTMSequence", "LSTMCell", "GRUSequence", "GRUCell")
# What OpenVINO calls layers in its runtime model.
_LAYERS = frozenset(
    {
        *("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul"),
        *("ScaledDotProductAttention", *_RECURRENT),
    }
)
_INTEGERS = ("i8", "u8", "i4", "u4")


def openvino_package(who: str) -> Any:
    """The package openvino; raises ImportError without it."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(f"{who}: needs the package openvino: pip install openvino") from error
    return openvino


def openvino_compiled(who: str, model: Path | bytes, label: object, threads: int = 1) -> Any:
    """A model compiled for the CPU, in float32 where it does not compute in integers.

    Raises:
        ImportError: without openvino.
        ValueError: OpenVINO does not load the model; with its reason and a way out.
    """
    openvino = openvino_package(who)
    core = openvino.Core()
    settings = {
        **_FLOAT,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        read = core.read_model(str(model)) if isinstance(model, Path) else core.read_model(model)
        return core.compile_model(read, "CPU", settings)
    except Exception as error:  # OpenVINO raises RuntimeError, or classes of its binding
        raise ValueError(
            f"{who}: expected {label} to be a model that OpenVINO {openvino.__version__} loads, "
            f"got its error: {str(error).strip()[:1500]}{advice_for(str(error))}"
        ) from error


def run_in_openvino(
    who: str, path: Path, proto: Any, tensors: Sequence[FileTensor], feeds: Any
) -> EngineRun:
    """Runs a copy of the file with the quantized activations as outputs, and the file itself."""
    copy = model_copy(who, proto, path, SMALLER)
    own = [output.name for output in copy.graph.output]
    constants = {tensor.name for tensor in copy.graph.initializer}
    names = [one.dequantized for one in tensors if one.source not in constants]
    for name in dict.fromkeys(names):
        if name not in own:
            copy.graph.output.add(name=name)
    results = _infer(openvino_compiled(who, model_bytes(who, copy, path, SMALLER), path), feeds)
    plain = _infer(openvino_compiled(who, path, path), feeds)
    found = {name: results[len(own) + i] for i, name in enumerate(n for n in names if n not in own)}
    for i, name in enumerate(own):
        if name in names:
            found[name] = results[i]
    return EngineRun(found, plain)


def _infer(compiled: Any, feeds: Any) -> list[Any]:
    request = compiled.create_infer_request()
    results = request.infer(dict(feeds))
    return [torch.from_numpy(results[port].copy()) for port in compiled.outputs]


def openvino_layers(compiled: Any, packages: Any, proto: Any) -> list[EngineLayer]:
    """The layers of a compiled model as its runtime model has them; `proto` is the file."""
    known = file_layers(packages, proto)
    # An operation that makes an output of the model is called by the output's name.
    made = {node.output[0]: node.name for node in proto.graph.node if node.name in known}
    found = []
    elsewhere: dict[str, str] = {}  # the operations of other kinds that layers are part of
    lost = list(known)  # what no operation that is a layer was made of
    for operation in compiled.get_runtime_model().get_ordered_ops():
        about = operation.get_rt_info()
        kind, precision = _text(about, "layerType"), _text(about, "runtimePrecision")
        sources = _text(about, "originalLayersNames").split(",")
        nodes = _nodes(known, [made.get(source, source) for source in sources])
        if kind in _RECURRENT and not nodes:  # it does not keep the name of such a layer
            nodes = [node for node in lost if known[node].op in ("LSTM", "GRU", "RNN")][:1]
        if kind not in _LAYERS:
            elsewhere |= dict.fromkeys(nodes, f"a {kind} of {precision}")
            continue
        lost = [node for node in lost if node not in nodes]
        node = nodes[0] if nodes else operation.get_friendly_name()
        name, _, problem, quantized = known.get(node, FileLayer(node, kind, None))
        integer = precision in _INTEGERS
        chose = (f"OpenVINO chose {precision} for it", FLOAT_LAYER)
        why = ("", "") if integer else problem or chose
        found.append(EngineLayer(name, node, kind, integer, *why, quantized))
    for node in lost:
        where = elsewhere.get(node, "another operation, or computed in advance")
        why = known[node].problem or (
            f"OpenVINO has no layer of its own for it: it is part of {where}",
            FLOAT_LAYER,
        )
        layer = known[node]
        found.append(EngineLayer(layer.name, node, layer.op, False, *why, layer.quantized))
    return found


def _text(about: Any, key: str) -> str:
    if key not in about:
        return ""
    return str(getattr(about[key], "value", about[key]))


def _nodes(known: Mapping[str, Any], sources: Sequence[str]) -> list[str]:
    """The file's layers among the names of what an operation was made of."""
    if found := [source for source in sources if source in known]:
        return found
    for source in sources:
        while source:
            source = source.rpartition("/")[0]
            if source in known:
                return [source]
    return []
