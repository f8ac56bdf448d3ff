"""Quantized ONNX graphs made by hand, of which it is known what engines make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def conv_file(path: Path, second: bool = True, opset: int = 18) -> tuple[Any, Any]:
    """Two convolutions 1x1; returns their weights.

    The second is quantized, or else reads a sine in float.
    Activations are uint8 with scale 1/8 and zero point 128, weights int8 per output channel.
    """
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    random = np.random.default_rng(0)
    nodes, tensors = [], []

    def add(name: str, value: Any) -> str:
        tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def pair(x: str, name: str) -> str:
        grid = [add(f"{name}.scale", np.float32(0.125)), add(f"{name}.zero", np.uint8(128))]
        nodes.append(helper.make_node("QuantizeLinear", [x, *grid], [f"{name}.q"], f"{name}.q"))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.q", *grid], [f"{name}.dq"], f"{name}.dq")
        )
        return f"{name}.dq"

    weights = []
    x = pair("x", "in")
    for i in range(2):
        levels = random.integers(-100, 100, (4, 4, 1, 1)).astype(np.int8)
        scale = np.float32(2.0) ** -random.integers(6, 9, 4).astype(np.float32)
        weights.append(levels * scale.reshape(4, 1, 1, 1))
        if i and not second:
            nodes.append(helper.make_node("Sin", [x], ["sine"], "sine"))
            x = "sine"
        inputs = [add(f"w{i}.q", levels), add(f"w{i}.scale", scale)]
        inputs.append(add(f"w{i}.zero", np.zeros(4, np.int8)))
        weight = f"w{i}.dq"
        nodes.append(helper.make_node("DequantizeLinear", inputs, [weight], weight, axis=0))
        name = ("first", "second")[i]
        nodes.append(helper.make_node("Conv", [x, weight], [f"{name}.y"], name))
        x = pair(f"{name}.y", f"{name}.out")
    nodes.append(helper.make_node("Identity", [x], ["y"], "end"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", 4, 6, 6])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return weights[0], weights[1]
