"""Which layers onnxruntime computes in integers: counted by hand, and each reason named."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from torch_ext import FileError, export, get_default_qconfig, prepare_qat
from torch_ext.export.engines.integer_layers import EngineLayer, onnxruntime_layers

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

AFFINE = {"dtype": "uint8", "qscheme": "per_tensor_affine"}


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def net(between: nn.Module | None = None) -> nn.Module:
    """Two convolutions with something in between, and a linear layer without a bias."""
    torch.manual_seed(1)
    middle = [nn.ReLU()] if between is None else [between]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), *middle, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 5, bias=False),
    ).eval()  # fmt: skip


def layers(
    model: nn.Module, path: Path, activation: Any = None, weight: Any = None, **keys: Any
) -> dict[str, EngineLayer]:
    model.qconfig = get_default_qconfig(activation_qkwargs=activation, weight_qkwargs=weight)
    quantized = prepare_qat(model, example_inputs=images()[:1])
    torch_ext.calibrate(quantized, [images()], progress=False)
    export.onnx(quantized, images()[:2], path, **keys)
    return {layer.name: layer for layer in onnxruntime_layers(path)}


def test_uint8_runs_in_integers(tmp_path: Path) -> None:
    found = layers(net(), tmp_path / "net.onnx", AFFINE)
    assert {name: layer.op for name, layer in found.items()} == {
        "0": "QLinearConv", "2": "QLinearConv", "5": "QGemm"
    }  # fmt: skip
    assert all(layer.integer and not layer.reason for layer in found.values())


def test_the_float_file_has_none(tmp_path: Path) -> None:
    found = layers(net(), tmp_path / "net.onnx", AFFINE, profile="float")
    assert len(found) == 3
    assert all("is not quantized" in layer.reason for layer in found.values())


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, str, str]] = {
    "int8 behind a ReLU": (net, None, None, "0", r"a Relu stands before 1\.activation_quantizer"),
    "int8 behind a ReLU6": (
        lambda: net(nn.ReLU6()), None, None, "0", r"a Clip stands before 1\.activation_quantizer"
    ),
    "a norm that is not folded": (
        lambda: net(nn.BatchNorm2d(8)), AFFINE, None, "0", "BatchNormalization .* not folded"
    ),
    "an activation that no grid implies": (
        lambda: net(nn.Sigmoid()), AFFINE, None, "0", "a Sigmoid reads its result in float"
    ),
    "16 bits": (net, {"dtype": "int16"}, None, "2", r"1\.activation_quantizer has int16"),
    "weights of 4 bits": (net, AFFINE, {"dtype": "int4"}, "2", r"2\.param.* has int4"),
    "a transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), AFFINE, None, "0",
        "no integer kernel for ConvTranspose",
    ),
    "a convolution at the end": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), AFFINE, None, "0", "an output of the model"
    ),
    "a linear layer with a bias at the end": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 3)), AFFINE, None, "1",
        r"its bias 1\.bias is in float",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_reasons(case: str, tmp_path: Path) -> None:
    make, activation, weight, name, want = CASES[case]
    layer = layers(make(), tmp_path / "net.onnx", activation, weight)[name]
    assert not layer.integer
    assert layer.reason
    assert str(layer).startswith(f"{name}: float ({layer.op}), as ")
    assert re.search(want, layer.reason), layer.reason


def test_layers_that_are_left_in_float_on_purpose(tmp_path: Path) -> None:
    model = net()
    model[2].qconfig = None
    found = layers(model, tmp_path / "net.onnx", AFFINE)
    assert [layer.integer for layer in found.values()] == [False, False, True]
    assert "is not quantized" in found["2"].reason


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(FileNotFoundError):
        onnxruntime_layers(path)
    path.write_bytes(b"no model")
    with pytest.raises(FileError, match=r"net\.onnx.*not an ONNX file"):
        onnxruntime_layers(path)
    node = onnx.helper.make_node("Unheard", ["x"], ["y"], domain="nowhere")
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("nowhere", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    with pytest.raises(ValueError, match=r"net\.onnx to be a model that onnxruntime .* nowhere"):
        onnxruntime_layers(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        onnxruntime_layers(path)
