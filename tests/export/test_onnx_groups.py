"""Groups of weights as blocks of ONNX files: onnxruntime computes the bits of VALIDATION."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onnx_runs
import torch_ext
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    calibrate,
    export,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
)
from zoo import operators

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CODES = {
    "int4": "INT4",
    "uint4": "UINT4",
    "int8": "INT8",
    "float8_e4m3": "FLOAT8E4M3FN",
    "float8_e5m2": "FLOAT8E5M2",
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2, groups=3)
        self.fc = nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.conv(x))))
        return self.fc(self.up(x).flatten(1))


def images() -> Tensor:
    return torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(2))


def solved(**keys: Any) -> nn.Module:
    net = Net().eval()
    given = {"dtype": "int4", "group_size": 4, **keys}
    net.qconfig = get_default_qconfig(weight_qkwargs=given)  # type: ignore[assignment]
    net = prepare_qat(net)
    calibrate(net, [images()], progress=False)
    return net


@pytest.mark.parametrize("name", [*CODES, "int3", "uint6"])
@pytest.mark.parametrize("quantized", [False, True])
def test_engine_computes_the_bits_of_validation(name: str, quantized: bool, tmp_path: Path) -> None:
    scheme = "per_channel_affine" if name.startswith("u") else "per_channel_symmetric"
    net, path = solved(dtype=name, qscheme=scheme), tmp_path / "net.onnx"
    export.onnx(net, images(), path, quantized_weights=quantized)
    assert onnx_runs.check_pairs(net, path, images()) == 8
    with torch.no_grad():
        want = net(images())
    for optimized in (False, True):
        (have,) = onnx_runs.run(path, images(), optimized=optimized)
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    proto = onnx.load(path)
    assert [one.version for one in proto.opset_import] == [21]
    blocked = {
        node.name: {one.name: one.i for one in node.attribute}
        for node in proto.graph.node
        if any(one.name == "block_size" for one in node.attribute)
    }
    assert len(blocked) == (4 if quantized else 8)
    assert {keys["block_size"] for keys in blocked.values()} == {4}
    tensors = {one.name: one for one in proto.graph.initializer}
    sizes = {key: list(one.dims) for key, one in tensors.items() if key.endswith("/scale")}
    assert sizes["conv.parametrizations.weight.0/scale"] == [8, 2, 3, 3]
    assert sizes["grouped.parametrizations.weight.0/scale"] == [12, 1, 3, 3]
    assert sizes["fc.parametrizations.weight.0/scale"] == [5, 96]
    point = tensors["fc.parametrizations.weight.0/zero_point"]
    assert list(point.dims) == [5, 96]
    if name in CODES:
        assert point.data_type == getattr(onnx.TensorProto, CODES[name])
    note = export.read_onnx_metadata(path)["quantizers"]["fc.parametrizations.weight.0"]
    assert (note["axis"], note["block_size"]) == (1, 4)


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_hundreds_of_thousands_of_values(name: str, axis: int) -> None:
    """One pair of nodes that is made here, on values of many sizes, ends and ties."""
    torch.manual_seed(4)
    shape, size = [64, 48, 96], 16
    scheme = "per_channel_affine" if name.startswith("u") else "per_channel_symmetric"
    count = int(np.prod(shape)) // size
    keys = {"group_size": size, "ch_axis": axis, "channel_len": count, "qscheme": scheme}
    quantizer = FakeQuantize(dtype=name, transient=True, averaging_constant=1.0, **keys)
    x = torch.randn(shape) * torch.exp2(torch.randint(-30, 20, shape).float())
    quantizer.state = "qat"
    quantizer(x)
    quantizer.state = "validation"
    layout = [*shape[:axis], *shape[axis + 1 :], shape[axis] // size]
    scale, point = (
        np.moveaxis(t.numpy().reshape(layout), -1, axis)
        for t in (quantizer.scale, quantizer.zero_point)
    )
    wide = np.repeat(scale, size, axis)
    levels = np.random.default_rng(5).integers(-12, 12, shape) + np.float32(0.5)
    x = torch.where(torch.rand(shape) < 0.5, x, torch.from_numpy(levels.astype(np.float32) * wide))
    helper, proto = onnx.helper, onnx.TensorProto
    code = getattr(proto, CODES[name])
    initial = [onnx.numpy_helper.from_array(np.ascontiguousarray(scale), "s")]
    initial.append(helper.make_tensor("z", code, scale.shape, point.astype(np.float32).flatten()))
    blocks = {"axis": axis, "block_size": size}
    more = {"saturate": 1} if name.startswith("float") else {}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **blocks, **more),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **blocks),
    ]
    ends = [helper.make_tensor_value_info(key, proto.FLOAT, shape) for key in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initial)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    made.ir_version = 10
    (want,) = onnx_runs.run(made, x)
    assert same_bits(quantizer(x), want)


def test_reports_of_files_name_the_groups(tmp_path: Path) -> None:
    net, path = solved(dtype="int8"), tmp_path / "net.onnx"
    export.onnx(net, images(), path)
    layers = {layer.name: layer for layer in export.onnxruntime_layers(path)}
    assert not layers["fc"].integer
    assert "fc.parametrizations.weight.0 has a scale for each group" in layers["fc"].reason
    found = export.tensorrt_violations(path)
    assert found["conv.parametrizations.weight.0/dequantized"] == "it has a scale for each group"
    comparison = export.compare_with_engine(net, path, [images()])
    assert len(comparison.rows) == 8
    assert comparison.first() is None


@pytest.mark.parametrize("profile", ["onnxruntime", "openvino", "tensorrt"])
def test_profiles_refuse_by_name(profile: Any, tmp_path: Path) -> None:
    net = solved(dtype="int8", quant_min=-127)
    with pytest.raises(ValueError, match=r"fc.parametrizations.weight.0: it has a scale for each"):
        export.onnx(net, images(), tmp_path / "net.onnx", profile)
    assert list(tmp_path.iterdir()) == []


def test_other_exports_refuse_by_name(tmp_path: Path) -> None:
    net = solved(dtype="int8", quant_min=-127)
    text = r"fc.parametrizations.weight.0: it has a scale for each group of 4"
    with pytest.raises(ValueError, match=text):
        export.tvm_scales(net, tmp_path / "net.json")
    with pytest.raises(ValueError, match=text):
        export.ncnn_table(net, images(), tmp_path / "net.table")
    with pytest.raises(ValueError, match=text):
        export.pt2e(net, images())
    with pytest.raises(ValueError, match="expected opset to be between 21, which the grids need"):
        export.onnx(net, images(), tmp_path / "net.onnx", opset=20)
    assert list(tmp_path.iterdir()) == []


def test_resnet_without_its_first_layer(tmp_path: Path) -> None:
    operators.declare()
    models = pytest.importorskip("torchvision.models", reason="needs torchvision: run `make test`")
    torch.manual_seed(0)
    net = models.resnet18(num_classes=10).eval()
    keys = {"dtype": "int4", "group_size": 32}
    net.qconfig = get_default_qconfig(weight_qkwargs=keys)
    x = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match=r'dict.fromkeys\(\["conv1"\]\)'):
        prepare_qat(net, example_inputs=x)
    net = prepare_qat(net, example_inputs=x, mapping={"conv1": get_default_qconfig()})
    calibrate(net, [x], progress=False)
    weights = [q.observer for q in named_quantizers(net).values() if q.transient]
    assert len(weights) == 21
    assert sum(observer.group_size == 32 for observer in weights) == 20
    path = tmp_path / "net.onnx"
    export.onnx(net, x, path, quantized_weights=True)
    assert onnx_runs.check_pairs(net, path, x) == len(named_quantizers(net))
    torch_ext.set_fake_quantize(net, "qat")
    net.train()(x).sum().backward()
    assert net.fc.parametrizations.weight.original.grad is not None


SMALL_FORMATS = {
    "mxfp6_e2m3": "float6_e2m3",
    "mxfp6_e3m2": "float6_e3m2",
    "mxfp4": "float4_e2m1",
}


def small_floats(block: Any) -> nn.Module:
    """Weights in a format of 6 or 4 bits, and what they are multiplied with in int8."""
    torch.manual_seed(3)
    net: nn.Module = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)).eval()
    weight = torch_ext.get_block_qconfig(block).weight
    activation = get_default_qconfig(activation_qkwargs={"quant_min": -127}).activation
    net.qconfig = torch_ext.QConfig(activation, weight)  # type: ignore[assignment]
    net = prepare_qat(net)
    calibrate(net, [torch.randn(2, 32)], progress=False)
    return net


@pytest.mark.parametrize("block", SMALL_FORMATS)
@pytest.mark.parametrize("profile", [None, "onnxruntime", "openvino", "tensorrt", "float"])
def test_formats_that_onnx_lacks_are_refused_by_name(
    block: str, profile: Any, tmp_path: Path
) -> None:
    net, path = small_floats(block), tmp_path / "net.onnx"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        export.onnx(net, torch.zeros(2, 32), path, profile=profile)
    text = str(caught.value)
    assert text.startswith("export.onnx: expected every quantizer to suit the format, got 2 that")
    for layer in "02":
        why = f"its format is {SMALL_FORMATS[block]}; of floats, QuantizeLinear has float8_e4m3"
        assert f"{layer}.parametrizations.weight.0: {why}" in text
    assert not path.exists()


@pytest.mark.parametrize("block", SMALL_FORMATS)
@pytest.mark.parametrize("kind", ["ncnn", "ncnn_of", "tvm", "x86", "xnnpack"])
def test_other_exports_refuse_small_floats_by_name(block: str, kind: Any, tmp_path: Path) -> None:
    net = small_floats(block)
    weight, x = "0.parametrizations.weight.0", torch.zeros(2, 32)
    layer = {"weight": weight, "input": "0.input_quantizers.input"}
    calls: dict[str, Callable[[], Any]] = {
        "ncnn": lambda: export.ncnn_table(net, x, tmp_path / "net.table"),
        "ncnn_of": lambda: export.ncnn_table_of(net, {"fc": layer}, tmp_path / "net.table"),
        "tvm": lambda: export.tvm_scales(net, tmp_path / "net.json"),
    }
    with pytest.raises(ValueError, match=rf"(?s)export\.\w+: .*{weight}: its? "):
        calls.get(kind, lambda: export.pt2e(net, x, kind))()
    assert not list(tmp_path.iterdir())
