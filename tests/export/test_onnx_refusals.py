"""What export.onnx refuses, and that nothing is written and nothing changed when it does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import export_models
from failing_writes import check_failing_writes
from nets.tiny_net import images
from snapshots import same, snapshot
from torch_ext import FakeQuantize, export, get_default_qconfig, prepare_qat, set_fake_quantize
from torch_ext.export.common import onnx_bytes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.onnx"


def test_importing_needs_no_onnx() -> None:
    program = (
        "import sys; import torch_ext, torch; torch_ext.export.onnx\n"
        "assert not {'onnx', 'onnxscript', 'tensorrt', 'ncnn'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(
    package: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript"):
        export.onnx(export_models.solved(), images(), path)


def unsolved() -> nn.Module:
    net = export_models.solved()
    set_fake_quantize(net, "calibration", pattern="fc.*")
    return net


def double() -> nn.Module:
    return export_models.solved().double()


def not_finite() -> nn.Module:
    net = export_models.solved()
    with torch.no_grad():
        net.fc.parametrizations.weight.original[0, 0] = torch.nan
    set_fake_quantize(net, "validation")  # the range of the other values
    return net


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "unsolved": (unsolved, images(), {}, "fc.input_quantizers.input: it is in CALIBRATION"),
    "float": (lambda: nn.Linear(2, 2), images(), {}, "expected model to have quantizers, got none"),
    "no model": (lambda: 3, images(), {}, "expected model to be a torch.nn.Module, got 3"),
    "profile": (
        export_models.solved,
        images(),
        {"profile": "trt"},
        "unknown profile 'trt'; known: ",
    ),
    "stored": (
        export_models.solved,
        images(),
        {"profile": "float", "quantized_weights": True},
        'expected quantized_weights=False with profile="float"',
    ),
    "opset": (
        export_models.solved,
        images(),
        {"opset": 17},
        "expected opset to be between 18, which",
    ),
    "opset type": (
        export_models.solved,
        images(),
        {"opset": "21"},
        "between 18, which the grids need",
    ),
    "opset wide": (
        lambda: export_models.solved(activation={"dtype": "int16"}),
        images(),
        {"opset": 20},
        "expected opset to be between 21, which the grids need",
    ),
    "example": (export_models.solved, 3, {}, "expected example_inputs to be a tensor, a tuple"),
    "arguments": (
        export_models.solved,
        (images(), 1),
        {},
        "to be the arguments of TinyNet.forward",
    ),
    "shape": (
        export_models.solved,
        torch.randn(4, 3, 8, 8),
        {},
        "torch.export cannot trace the model",
    ),
    "double": (double, images().double(), {}, "conv1.input_quantizers.input: it quantizes float64"),
    "nan": (not_finite, images(), {}, "expected fc.weight to be finite"),
    "unsigned": (
        lambda: export_models.solved(activation={"dtype": "uint8"}),
        images(),
        {"profile": "tensorrt"},
        "conv1.input_quantizers.input: its type is uint8, not int8",
    ),
    "affine": (
        lambda: export_models.solved(activation={"qscheme": "per_tensor_affine"}),
        images(),
        {"profile": "tensorrt"},
        "conv2.input_quantizers.input: its zero point is not 0",
    ),
    "int4": (
        lambda: export_models.solved(weight={"dtype": "int4"}),
        images(),
        {"profile": "tensorrt"},
        "conv1.parametrizations.weight.0: its type is int4, not int8",
    ),
}


@pytest.mark.filterwarnings("ignore::torch_ext.QuantizationWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_reason(case: str, path: Path) -> None:
    make, example, keys, text = REFUSED[case]
    net = make()
    before = snapshot(net) if isinstance(net, nn.Module) else {}
    with pytest.raises((ValueError, TypeError)) as caught:
        export.onnx(net, example, path, **keys)
    assert text in str(caught.value)
    assert str(caught.value).startswith("export.onnx: ")
    assert not os.listdir(path.parent)
    if isinstance(net, nn.Module):
        assert same(snapshot(net), before)
        for module in net.modules():
            assert "_quantize" not in vars(module)


class Deciding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FakeQuantize(), FakeQuantize()

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        return self.second(self.first(x)) if both else self.first(x)


def test_models_that_cannot_be_traced(path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), Deciding())
    net.qconfig = get_default_qconfig()
    net = export_models.run(prepare_qat(net), torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"torch\.export cannot trace the model; dynamic_batch"):
        export.onnx(net, torch.randn(2, 2), path)
    unused = export_models.run(Unused(), torch.randn(2, 2), True)
    with pytest.raises(ValueError, match="second: the forward does not call it with these"):
        export.onnx(unused, torch.randn(2, 2), path)
    assert not path.exists()


def test_bad_places(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = export_models.run(FakeQuantize(), torch.randn(2, 2))
    with pytest.raises(ValueError, match=r"expected path to end in \.onnx, got"):
        export.onnx(net, torch.randn(2, 2), path.with_suffix(".pt"))
    check_failing_writes(
        lambda target: export.onnx(net, torch.randn(2, 2), target), path, monkeypatch, ("replace",)
    )


def test_a_model_past_the_limit_of_protobuf(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = export_models.run(FakeQuantize(), torch.randn(2, 2))
    monkeypatch.setattr(onnx_bytes, "LIMIT", 100)
    with pytest.raises(ValueError, match="the result to be a model of at most 100 bytes, got"):
        export.onnx(net, torch.randn(2, 2), path)
    assert not path.exists()


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("valid") / "net.onnx"
    export.onnx(export_models.captured(), images(), path, profile="tensorrt")
    assert export.tensorrt_violations(path) == {}
    return onnx.load(path)


def node(proto: Any, name: str) -> Any:
    return next(one for one in proto.graph.node if one.name == name)


def replace(proto: Any, name: str, value: Any) -> None:
    tensor = next(one for one in proto.graph.initializer if one.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))


def unsigned(proto: Any) -> None:
    replace(proto, "input_quantizers.x/zero_point", torch.tensor(0, dtype=torch.uint8).numpy())


def shifted(proto: Any) -> None:
    replace(proto, "input_quantizers.x/zero_point", torch.tensor(3, dtype=torch.int8).numpy())


def unpaired(proto: Any) -> None:
    node(proto, "node_conv2d").input[0] = "input_quantizers.x/quantized"


def rescaled(proto: Any) -> None:
    pair = node(proto, "input_quantizers.x/dequantized")
    pair.input[1] = "relu1.activation_quantizer/scale"


def channelled(proto: Any) -> None:
    replace(proto, "input_quantizers.x/scale", torch.ones(1).numpy())


def turned(proto: Any) -> None:
    for end in ("quantized", "dequantized"):
        node(proto, f"conv1.parametrizations.weight.0/{end}").attribute[0].i = 1


def vanishing(proto: Any) -> None:
    replace(proto, "input_quantizers.x/scale", torch.tensor(0.0).numpy())


def variable(proto: Any) -> None:
    node(proto, "input_quantizers.x/quantized").input[1] = "x"


def untyped(proto: Any) -> None:
    del node(proto, "input_quantizers.x/quantized").input[2]


def unread(proto: Any) -> None:
    node(proto, "input_quantizers.x/dequantized").input[0] = "x"


def old(proto: Any) -> None:
    proto.opset_import[0].version = 11


X = "input_quantizers.x"
VIOLATIONS: dict[str, tuple[Callable[[Any], None], dict[str, str]]] = {
    "unsigned": (unsigned, {f"{X}/quantized": "its type is uint8, not int8"}),
    "shifted": (shifted, {f"{X}/dequantized": "its zero point is not 0"}),
    "unpaired": (unpaired, {f"{X}/quantized": "it is read by Conv, not by DequantizeLinear"}),
    "rescaled": (rescaled, {f"{X}/quantized": "its DequantizeLinear has another scale"}),
    "channelled": (channelled, {f"{X}/dequantized": "it quantizes an activation per channel"}),
    "turned": (turned, {"conv1.parametrizations.weight.0/quantized": "its axis is 1, not the out"}),
    "vanishing": (vanishing, {f"{X}/quantized": "its scale is not positive and finite"}),
    "variable": (variable, {f"{X}/quantized": "its scale is no constant"}),
    "untyped": (untyped, {f"{X}/quantized": "it has no zero point, so its type is uint8"}),
    "unread": (unread, {f"{X}/dequantized": "it reads neither a QuantizeLinear nor a constant"}),
    "old": (old, {f"{X}/quantized": "the model is of opset 11, below 13"}),
}


@pytest.mark.parametrize("case", VIOLATIONS)
def test_violations_are_named_by_node(case: str, valid: Any, path: Path) -> None:
    change, wanted = VIOLATIONS[case]
    broken = onnx.ModelProto()
    broken.CopyFrom(valid)
    change(broken)
    onnx.save(broken, path)
    found = export.tensorrt_violations(path)
    for name, reason in wanted.items():
        assert found[name].startswith(reason)
    if case != "old":
        own = next(iter(wanted)).rpartition("/")[0]
        assert {name.rpartition("/")[0] for name in found} <= {own}


def test_violations_of_files_that_are_none(path: Path) -> None:
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match=r"net\.onnx: not an ONNX file"):
        export.tensorrt_violations(path)


def test_a_layer_that_computes_its_weight_from_a_quantized_one(path: Path) -> None:
    """Only the graph shows that the batch norm's factor stands between them."""
    from nets.tiny_net import tiny_net

    net = tiny_net().eval()
    net.qconfig = get_default_qconfig()
    net = prepare_qat(net, example_inputs=images(), fold_batch_norms=True)
    export_models.run(net, images())
    with pytest.raises(ValueError, match="read by Div, not by a layer") as caught:
        export.onnx(net, images(), path, profile="tensorrt")
    assert "conv1.parametrizations.weight.1/dequantized" in str(caught.value)
    assert not path.exists()
