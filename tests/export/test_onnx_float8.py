"""Float formats in ONNX files: onnxruntime computes the bits of VALIDATION."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import export_models
import onnx_runs
import torch_ext
from nets.tiny_net import images, tiny_net
from snapshots import same_bits
from torch_ext import FakeQuantize, QConfig, export, get_default_qconfig, ops, prepare_qat

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

KINDS = {"float8_e4m3": "FLOAT8E4M3FN", "float8_e5m2": "FLOAT8E5M2"}
DTYPES = {"float8_e4m3": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


def model_of(kind: str, ops_: tuple[str, ...], shape: list[int], scale: Tensor, axis: int) -> Any:
    """A graph of QuantizeLinear and DequantizeLinear, or of the latter alone."""
    helper, proto = onnx.helper, onnx.TensorProto
    code, sizes = getattr(proto, kind), [] if axis < 0 else [scale.numel()]
    zeros = helper.make_tensor("z", code, sizes, bytes(scale.numel()), raw=True)
    initial = [helper.make_tensor("s", proto.FLOAT, sizes, scale.tolist()), zeros]
    keys = {} if axis < 0 else {"axis": axis}
    chain = ["x", *(f"t{i}" for i in range(len(ops_) - 1)), "y"]
    nodes = [
        helper.make_node(
            op,
            [chain[i], "s", "z"],
            [chain[i + 1]],
            **keys,
            **({"saturate": 1} if op == "QuantizeLinear" else {}),
        )
        for i, op in enumerate(ops_)
    ]
    first = proto.FLOAT if ops_[0] == "QuantizeLinear" else proto.UINT8
    ends = [
        helper.make_tensor_value_info("x", first, shape),
        helper.make_tensor_value_info("y", proto.FLOAT, shape),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initial)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    made.ir_version = 10
    return made


PAIR = ("QuantizeLinear", "DequantizeLinear")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("axis", [-1, 1])
def test_millions_of_values(name: str, axis: int) -> None:
    torch.manual_seed(5)
    count = 1_500_000
    for scale in ([1.0], [0.0123], [3e-5]) if axis < 0 else ([0.1, 0.7, 13.0],):
        scales = torch.tensor(scale)
        spread = torch.exp2(torch.randint(-20, 18, (count,)).float())
        x = torch.randn(count) * spread * scales[0]
        codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).float() * scales[0]
        ties = (codes[1:] + codes[:-1]) / 2
        odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 3e38])
        x = torch.cat([x, codes, ties, torch.nextafter(ties, ties * 2), odd])
        x = x[: len(x) // 3 * 3].view(-1, 3)
        proto = model_of(KINDS[name], PAIR, list(x.shape), scales, axis)
        (want,) = onnx_runs.run(proto, x)
        zeros = torch.zeros(len(scales), dtype=torch.int32)
        have = ops.fake_quant(x, scales, zeros, ch_axis=axis, grid=name)
        nan = have.isnan()
        assert torch.equal(nan, want.isnan())
        assert torch.equal(have[~nan].view(torch.int32), want[~nan].view(torch.int32))


@pytest.mark.parametrize("name", KINDS)
def test_all_codes(name: str) -> None:
    """What DequantizeLinear makes of each code stays what it is, and becomes the same code."""
    scale = torch.tensor([0.037])
    helper, proto = onnx.helper, onnx.TensorProto
    code = getattr(proto, KINDS[name])
    made = model_of(KINDS[name], ("DequantizeLinear",), [256], scale, -1)
    del made.graph.input[:]
    made.graph.initializer.append(helper.make_tensor("x", code, [256], bytes(range(256)), raw=True))
    (values,) = onnx_runs.run(made)
    zeros = torch.zeros(1, dtype=torch.int32)
    again = ops.fake_quant(values, scale, zeros, grid=name)
    finite = values.isfinite()
    assert int(finite.sum()) == {"float8_e4m3": 254, "float8_e5m2": 248}[name]
    assert torch.equal(again[finite].view(torch.int32), values[finite].view(torch.int32))
    largest = 448 if name == "float8_e4m3" else 57344
    infinite = values.isinf()
    assert torch.equal(again[infinite].abs(), scale.expand(int(infinite.sum())) * largest)
    assert bool(again[values.isnan()].isnan().all())


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=4)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu())
        return self.fc(self.up(x).mean((2, 3)))


def config(name: str) -> QConfig:
    keys = {"dtype": name}
    return get_default_qconfig(activation_qkwargs=keys, weight_qkwargs=keys)


def conv_net(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(6)
    net, x = ConvNet().eval(), torch.randn(4, 3, 8, 8)
    net.qconfig = config(name)  # type: ignore[assignment]
    return export_models.run(prepare_qat(net), x), x


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("quantized", [False, True])
def test_conv2d(name: str, quantized: bool, tmp_path: Path) -> None:
    net, x = conv_net(name)
    path = tmp_path / "net.onnx"
    export.onnx(net, x, path, quantized_weights=quantized)
    proto = onnx.load(path)
    assert [one.version for one in proto.opset_import] == [19]
    pairs = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) == (4 if quantized else 8)
    for node in pairs:
        assert {one.name: one.i for one in node.attribute}["saturate"] == 1
    code = getattr(onnx.TensorProto, KINDS[name])
    types = {one.name: one.data_type for one in proto.graph.initializer}
    points = [key for key in types if key.endswith("/zero_point")]
    assert len(points) == 8
    assert {types[key] for key in points} == {code}
    assert onnx_runs.check_pairs(net, path, x) == 8
    (have,) = onnx_runs.run(path, x)
    with torch.no_grad():
        torch.testing.assert_close(have, net(x), rtol=1e-5, atol=1e-5)
    noted = export.read_onnx_metadata(path)["quantizers"]
    assert {note["type"] for note in noted.values()} == {KINDS[name].lower()}
    if quantized:
        stored = [
            one for one in proto.graph.initializer if one.name.endswith(f"/{KINDS[name].lower()}")
        ]
        assert len(stored) == 4
        sizes = [int(np.prod(one.dims)) for one in stored]
        assert [len(one.raw_data) for one in stored] == sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(dtype: torch.dtype, tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.on = FakeQuantize(dtype="float8_e4m3")

        def forward(self, x: Tensor) -> Tensor:
            return self.on(x.to(dtype)).float()

    net, x = Half(), torch.randn(64, 3)
    export_models.run(net, x)
    export.onnx(net, x, tmp_path / "net.onnx")
    (have,) = onnx_runs.run(tmp_path / "net.onnx", x)
    assert same_bits(have, net(x))


def test_beside_integers(tmp_path: Path) -> None:
    """int4 weights need opset 21, which has float8 too."""
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig(
        activation_qkwargs={"dtype": "float8_e4m3"}, weight_qkwargs={"dtype": "int4"}
    )
    net = export_models.run(prepare_qat(net), images())
    export.onnx(net, images(), tmp_path / "net.onnx")
    assert [one.version for one in onnx.load(tmp_path / "net.onnx").opset_import] == [21]
    assert onnx_runs.check_pairs(net, tmp_path / "net.onnx", images()) == 8


# ---- refusals


@pytest.mark.parametrize("profile", ["onnxruntime", "openvino", "tensorrt"])
def test_profiles_of_integers_refuse_by_name(profile: Any, tmp_path: Path) -> None:
    net, x = conv_net("float8_e4m3")
    with pytest.raises(ValueError, match=r"conv1.input_quantizers.input.*float8e4m3fn"):
        export.onnx(net, x, tmp_path / "net.onnx", profile)
    assert list(tmp_path.iterdir()) == []


def test_refuses_an_opset_without_the_type(tmp_path: Path) -> None:
    net, x = conv_net("float8_e4m3")
    with pytest.raises(ValueError, match="expected opset to be between 19, which the grids need"):
        export.onnx(net, x, tmp_path / "net.onnx", opset=18)


def test_checks_of_files_name_the_type(tmp_path: Path) -> None:
    net, x = conv_net("float8_e4m3")
    path = tmp_path / "net.onnx"
    export.onnx(net, x, path)
    layers = export.onnxruntime_layers(path)
    assert layers
    assert not any(layer.integer for layer in layers)
    assert torch_ext.export.tensorrt_violations(path)
    comparison = export.compare_with_engine(net, path, [x])
    assert comparison is not None
