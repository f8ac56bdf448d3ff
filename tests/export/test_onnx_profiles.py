"""Profiles of export.onnx: what an engine would compute in float is refused by name."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import export_models
import torch_ext
from nets.tiny_net import images
from onnx_runs import run
from torch_ext import QuantizationWarning, export, get_default_qconfig, prepare_qat, resolve
from torch_ext.export.engines.float_twin import float_twin
from torch_ext.export.engines.integer_layers import onnxruntime_layers
from torch_ext.export.onnx_profiles import quantize_before_pads, quantize_biases

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


def pictures() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(3))


def calibrated(*layers: nn.Module, **keys: Any) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(*layers).eval()
    model.qconfig = get_default_qconfig(**{"backend": "onnxruntime", **keys})  # type: ignore
    made = prepare_qat(model, example_inputs=pictures()[:1])
    torch_ext.calibrate(made, [pictures()], progress=False)
    return made


def whole() -> nn.Module:
    """A net with every layer that the profile takes; the last one has a bias and a float result."""
    return calibrated(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(),
        nn.Flatten(), nn.Linear(72, 5),
    )  # fmt: skip


def test_a_file_that_onnxruntime_does_not_load(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = calibrated(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)).bfloat16()
    with pytest.raises(ValueError, match=r"the result to be a model that onnxruntime") as caught:
        export.onnx(net, pictures().bfloat16(), tmp_path / "net.onnx", profile="onnxruntime")
    text = str(caught.value)
    assert text.startswith("export.onnx: expected the result")
    assert text.endswith("; nothing was written")
    assert "onnxruntime_layers" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", [False, True])
def test_onnxruntime_computes_all_in_integers(stored: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path, net = tmp_path / "net.onnx", whole()
    export.onnx(net, pictures(), path, profile="onnxruntime", quantized_weights=stored)
    layers = {layer.name: layer.op for layer in onnxruntime_layers(path)}
    assert layers == {"0": "QLinearConv", "3": "QLinearConv", "6": "QGemm"}
    assert export.read_onnx_metadata(path)["profile"] == "onnxruntime"
    # The bias is the one difference: each is rounded to half a step of the sums.
    want = net(pictures()).detach()
    (have,) = run(path, pictures())
    weight = net.get_submodule("6.parametrizations.weight.0").get_buffer("scale")
    step = float(net.get_submodule("4.activation_quantizer").get_buffer("scale")) * weight
    off = 0.51 * step + 1e-5 * want.abs().max()
    assert bool(((have - want).abs() <= off).all())


PADS: dict[str, nn.Module] = {
    "zeros": nn.ZeroPad2d((0, 1, 0, 1)),
    "another value": nn.ConstantPad2d(1, 0.7),
    "reflected": nn.ReflectionPad2d(1),
    "two": nn.Sequential(nn.ZeroPad2d(1), nn.ConstantPad2d((1, 0, 0, 1), 0.3)),
}


@pytest.mark.parametrize("pad", PADS)
def test_a_pad_between_a_convolution_and_its_quantizer(pad: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    size = PADS[pad](torch.zeros(1, 8, 10, 10)).shape[-1] - 2
    net = calibrated(
        nn.Conv2d(3, 8, 3), nn.ReLU6(), PADS[pad], nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(),
        nn.Flatten(), nn.Linear(8 * size**2, 5, bias=False),
    )  # fmt: skip
    path, plain = tmp_path / "net.onnx", tmp_path / "plain.onnx"
    export.onnx(net, pictures(), path, profile="onnxruntime")
    export.onnx(net, pictures(), plain)
    layers = {layer.name: layer.op for layer in onnxruntime_layers(path)}
    assert layers["0"] == layers["3"] == "QLinearConv"
    assert all(layer.integer for layer in onnxruntime_layers(path))
    # Without optimisation the operators run as they are written: to pad integers gives the bits of
    # padding before the quantizer.
    assert torch.equal(run(path, pictures())[0], run(plain, pictures())[0])
    # Nor does the model in float that `check` times have anything of integers left.
    twin = onnx.ModelProto.FromString(float_twin("check", onnx, onnx.load(path), path))
    assert not any("Linear" in node.op_type for node in twin.graph.node)
    export.onnx(net, pictures(), plain, profile="float")
    torch.testing.assert_close(run(twin, pictures())[0], run(plain, pictures())[0])
    read = {name for node in onnx.load(path).graph.node for name in node.input}
    noted = export.read_onnx_metadata(path)["quantizers"]
    assert all(set(note["tensors"]) <= read for note in noted.values()), noted


class Joined(nn.Module):
    """Joins chunks and results, some of them again, before convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(2, 4, 1)
        self.third, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(12, 4, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.act(self.first(x)).chunk(2, 1)
        x = torch.cat([left, right, self.act(self.second(right))], 1)
        x = torch.cat([x, self.act(self.third(x))], 1)
        return self.act(self.last(x)).amax((2, 3))


def test_layers_behind_joined_values(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path, plain, net = tmp_path / "net.onnx", tmp_path / "plain.onnx", calibrated(Joined())
    export.onnx(net, pictures(), path, profile="onnxruntime")
    export.onnx(net, pictures(), plain)
    layers = {layer.name: layer.op for layer in onnxruntime_layers(path)}
    assert layers == {f"0.{n}": "QLinearConv" for n in ("first", "second", "third", "last")}
    # As they are written, the values that are quantized once more are on that grid already.
    assert torch.equal(run(path, pictures())[0], run(plain, pictures())[0])
    noted = export.read_onnx_metadata(path)["quantizers"]
    assert noted == export.read_onnx_metadata(plain)["quantizers"]


class LinearTwice(nn.Module):
    """A linear layer that is called on two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(432, 432)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(9 * self.fc(x.flatten(1)))
        return result


def test_a_linear_layer_that_is_called_twice(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path, plain, net = tmp_path / "net.onnx", tmp_path / "plain.onnx", calibrated(LinearTwice())
    export.onnx(net, pictures(), path, profile="onnxruntime")
    export.onnx(net, pictures(), plain)
    assert [layer.op for layer in onnxruntime_layers(path)] == ["QGemm", "QGemm"]
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
    }
    want = net.get_submodule("0.fc").bias.detach().double()  # type: ignore[union-attr, operator]
    scales = []
    for name, levels in constants.items():
        if levels.dtype == "int32":
            scales.append(torch.tensor(constants[name.removesuffix("int32") + "scale"]).double())
            off = torch.tensor(levels) * scales[-1] - want
            assert bool((off.abs() <= 0.5001 * scales[-1]).all())
    assert len(scales) == 2
    assert not torch.equal(*scales)
    have, same = run(path, pictures())[0], run(plain, pictures())[0]
    assert (have - same).abs().max() < 0.01 * same.abs().max()


def with_reader_in_a_body(nodes: list[Any], tensors: dict[str, Any], read: str, rank: int) -> Any:
    """A model of x with the result y, and an If whose branches read a tensor outside."""
    make, info = onnx.helper, onnx.helper.make_tensor_value_info
    branches = {
        f"{way}_branch": make.make_graph(
            [make.make_node(op, [read], [f"{way}_result"])], way, [],
            [info(f"{way}_result", onnx.TensorProto.FLOAT, None)],
        )
        for way, op in (("then", "Neg"), ("else", "Identity"))
    }  # fmt: skip
    graph = make.make_graph(
        [*nodes, make.make_node("If", ["way"], ["z"], **branches)], "net",
        [info("x", onnx.TensorProto.FLOAT, [2, 3])],
        [info(name, onnx.TensorProto.FLOAT, [None] * n) for name, n in (("y", 2), ("z", rank))],
        [
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in {**tensors, "way": np.array(True)}.items()
        ],
    )  # fmt: skip
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=8)


def test_bodies_of_an_if_read_tensors_too() -> None:
    pytest.importorskip("onnxruntime")
    node = onnx.helper.make_node
    x = torch.tensor([[0.5, -1.2, 3.0], [2.2, 0.1, -0.4]])
    grid = {"s": np.float32(0.1), "zero": np.uint8(20)}

    def pair(name: str) -> list[Any]:
        return [
            node("QuantizeLinear", [name, "s", "zero"], [f"{name}/q"]),
            node("DequantizeLinear", [f"{name}/q", "s", "zero"], [f"{name}/d"]),
        ]

    padded = [node("Pad", ["x", "by"], ["p"]), *pair("p"), node("Neg", ["p/d"], ["y"])]
    proto = with_reader_in_a_body(padded, {**grid, "by": np.array([0, 1, 0, 1])}, "p", 2)
    want = run(proto, x)
    assert quantize_before_pads(onnx, proto) == {}
    onnx.checker.check_model(proto)
    assert all(map(torch.equal, run(proto, x), want))

    tensors = {
        **grid, "w": np.array([[3, -5], [7, 1], [-2, 4]], np.int8), "ws": np.float32(0.02),
        "w0": np.int8(0), "fc.bias": np.array([0.25, -1.5], np.float32),
    }  # fmt: skip
    linear = [
        *pair("x"),
        node("DequantizeLinear", ["w", "ws", "w0"], ["w/d"]),
        node("Gemm", ["x/d", "w/d", "fc.bias"], ["y"]),
    ]
    proto = with_reader_in_a_body(linear, tensors, "fc.bias", 1)
    want = run(proto, x)
    quantize_biases(onnx, proto)
    assert any(tensor.data_type == onnx.TensorProto.INT32 for tensor in proto.graph.initializer)
    onnx.checker.check_model(proto)
    have = run(proto, x)
    torch.testing.assert_close(have[0], want[0], rtol=0, atol=0.5001 * 0.002)
    assert torch.equal(have[1], want[1])


def test_a_bias_beyond_32_bits_stays_in_float(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = calibrated(nn.Flatten(), nn.Linear(432, 3))
    layer = net.get_submodule("1")
    with torch.no_grad():
        layer.bias.fill_(1e8)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=r"1 of 1 in float.*\n  1: its bias 1\.bias is in float"):
        export.onnx(net, pictures(), tmp_path / "net.onnx", profile="onnxruntime")


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "int8 behind a ReLU": (
        lambda: calibrated(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(256, 3), backend="tensorrt",
        ),
        r"got 2 of 3 in float; nothing was written \(take the grids of backend=\"onnxruntime\".*\n"
        r"  0: a Relu stands before 1\.activation_quantizer.*\n  2: a Relu stands before 3\.",
    ),
    "a norm that is not folded": (
        lambda: calibrated(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)
        ),
        r"fuse\(model.*\n  0: BatchNormalization .* reads its result, a norm that is not folded",
    ),
    "an activation that no grid implies": (
        lambda: calibrated(  # the same grids, without a thought of onnxruntime
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(400, 3), backend="openvino"
        ),
        r"lets prepare_qat, given example_inputs.*\n  0: a Tanh reads its result in float",
    ),
    "an operator without a kernel": (
        lambda: calibrated(nn.ConvTranspose2d(3, 4, 3)),
        r"leave the layer in float.*\n  0: onnxruntime has no integer kernel for ConvTranspose",
    ),
    "a float result": (
        lambda: calibrated(nn.Conv2d(3, 4, 3)),
        r"output_qconfig.*\n  0: its result is an output of the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_with_the_way_out(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=r"export\.onnx: expected onnxruntime") as caught:
        export.onnx(make(), pictures(), tmp_path / "net.onnx", profile="onnxruntime")
    assert re.search(message, str(caught.value)), caught.value
    assert not list(tmp_path.iterdir())


def test_the_ways_out(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    net = REFUSED["int8 behind a ReLU"][0]()
    resolve(net, backend="onnxruntime")
    export.onnx(net, pictures(), path, profile="onnxruntime")
    net = REFUSED["an operator without a kernel"][0]()
    torch_ext.set_fake_quantize(net, "float", pattern="0.parametrizations.*")
    report = export.onnx(net, pictures(), path, profile="onnxruntime")
    assert list(report.left_out) == ["0.parametrizations.weight.0"]
    net = calibrated(
        nn.Conv2d(3, 4, 3), torch_ext.QuantStub(), nn.Tanh(), nn.Flatten(), nn.Linear(400, 3)
    )
    export.onnx(net, pictures(), path, profile="onnxruntime")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_without_its_engine_nothing_judges_a_file(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    path = tmp_path / "net.onnx"
    with pytest.warns(QuantizationWarning, match=f"{engine} is not installed, so nothing has"):
        export.onnx(whole(), pictures(), path, profile=engine)
    assert path.exists()


def test_openvino_refuses_layers_that_it_computes_in_float(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    grouped = nn.ConvTranspose2d(8, 8, 3, groups=4)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), grouped, nn.Conv2d(8, 2, 1))
    net, path = calibrated(*layers, backend="openvino"), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"openvino to compute every .*, got 1 of 3") as caught:
        export.onnx(net, pictures(), path, profile="openvino")
    assert re.search(r"\n  2: OpenVINO chose f\w+ for it$", str(caught.value))
    assert 'set_fake_quantize(model, "float"' in str(caught.value)
    assert not path.exists()
    torch_ext.set_fake_quantize(net, "float", pattern="2.parametrizations.*")
    export.onnx(net, pictures(), path, profile="openvino")


def test_openvino_takes_8_bits(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export.onnx(calibrated(nn.Conv2d(3, 4, 3)), pictures(), path, profile="openvino")
    path.unlink()
    wide = calibrated(
        nn.Conv2d(3, 4, 3), backend=None, activation_qkwargs={"dtype": "int16"},
        weight_qkwargs={"qscheme": "per_channel_affine"},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r'resolve\(model, backend="openvino"') as caught:
        export.onnx(wide, pictures(), path, profile="openvino")
    assert "input_quantizers.input: its type is int16, not int8 or uint8" in str(caught.value)
    assert "0.parametrizations.weight.0: it quantizes a weight, and its zero" in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize("call", ["onnx", "json"])
def test_absurd_scales_are_warned_of(call: str, tmp_path: Path) -> None:
    net = export_models.captured(export_models.NARROW, export_models.NARROW)
    name, found = next(
        (name, q) for name, q in torch_ext.named_quantizers(net).items() if not q.transient
    )
    found.scale.fill_(3e-33)
    path = tmp_path / f"net.{call}"
    arguments = (images(), path) if call == "onnx" else (path,)
    with pytest.warns(QuantizationWarning, match=rf"scales below 1e-30.*{re.escape(name)} \(3e-33"):
        getattr(export, call)(net, *arguments)
    assert path.exists()
    found.scale.fill_(1e-29)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        getattr(export, call)(net, *arguments)


class WrittenTo(nn.Module):
    """ReLU6 in place on a view of what is read afterwards, then on a result of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 9
        nn.functional.relu6(y.flatten(1), inplace=True)
        return self.conv(y) + nn.functional.relu6(self.conv(x), inplace=True)


def test_activations_in_place(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = calibrated(WrittenTo())
    path = tmp_path / "net.onnx"
    export.onnx(net, pictures(), path)
    (have,) = run(path, pictures())
    torch.testing.assert_close(have, net(pictures()).detach(), rtol=0, atol=1e-4)
