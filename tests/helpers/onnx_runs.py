"""Running exported ONNX files with onnxruntime, and looking at tensors inside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snapshots import same_bits
from torch_ext import export
from torch_ext.quantizers.find import PreparedModel, named_quantizers


def session(model: Any, optimized: bool = False) -> Any:
    """Of a path or of a ModelProto."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def run(model: Any, *inputs: Tensor, optimized: bool = False) -> list[Tensor]:
    made = session(model, optimized)
    names = [one.name for one in made.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in made.run(None, feeds)]


def watch(path: Path, names: Sequence[str], *inputs: Tensor) -> dict[str, Tensor]:
    """Tensors inside the graph, constants too."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(path)
    kinds = {one.name: one.data_type for one in proto.graph.initializer}
    for name in dict.fromkeys(names):
        if name in kinds or name in {one.name for one in proto.graph.input}:
            proto.graph.node.add(
                op_type="Identity", input=[name], output=[f"{name}/seen"], name=f"{name}/seen"
            )
            name = f"{name}/seen"
        if name not in {one.name for one in proto.graph.output}:
            proto.graph.output.add(name=name)
    made = session(proto)
    feeds = {i.name: x.numpy() for i, x in zip(made.get_inputs(), inputs, strict=True)}
    listed = [one.name for one in made.get_outputs()]
    found = dict(zip(listed, map(torch.from_numpy, made.run(None, feeds)), strict=True))
    return {name: found[name if name in found else f"{name}/seen"] for name in names}


def check_pairs(model: nn.Module, path: Path, *inputs: Tensor) -> int:
    """Every pair of nodes gives the bits that VALIDATION gives for the same input, and weights are
    those that the model computes with; how many there were."""
    noted = export.read_onnx_metadata(path)["quantizers"]
    own = named_quantizers(model)
    sources = PreparedModel("weights", model).weights
    outputs: dict[str, tuple[str, str]] = {}  # of a pair: the quantizer, and what it reads
    for name, note in noted.items():
        for i, tensor in enumerate(note["tensors"]):
            outputs[f"{name}{f'_{i}' if i else ''}/dequantized"] = name, tensor
    read = [x for name, x in outputs.values() if own[name] not in sources]
    found = watch(path, [*outputs, *read], *inputs)
    for y, (name, x) in outputs.items():
        quantizer = own[name]
        value = sources[quantizer].read() if quantizer in sources else found[x]
        with torch.no_grad():
            assert same_bits(found[y], quantizer(value)), name
    return len(outputs)
