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


def product_file(path: Path, names: tuple[str, str]) -> None:
    """Two matrix products with a sigmoid between them, named so; only the first is quantized."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    random = np.random.default_rng(0)
    levels = random.integers(-100, 100, (64, 64)).astype(np.int8)
    tensors = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in {
            "a.weight": levels,
            "b.weight": random.standard_normal((64, 64)).astype(np.float32),
            "x.scale": np.float32(0.01),
            "a.scale": np.float32(0.02),
            "x.zero": np.uint8(128),
            "a.zero": np.int8(0),
        }.items()
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero"], ["x.q"]),
        helper.make_node("DequantizeLinear", ["x.q", "x.scale", "x.zero"], ["x.dq"]),
        helper.make_node("DequantizeLinear", ["a.weight", "a.scale", "a.zero"], ["a.dq"]),
        helper.make_node("MatMul", ["x.dq", "a.dq"], ["a.y"], names[0]),
        helper.make_node("Sigmoid", ["a.y"], ["b.x"]),
        helper.make_node("MatMul", ["b.x", "b.weight"], ["y"], names[1]),
    ]
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [8, 64]) for n in "xy"]
    graph = helper.make_graph(nodes, "net", value[:1], value[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    onnx.save(model, path)
