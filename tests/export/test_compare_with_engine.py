"""compare_with_engine: nothing differs where sums are exact, and what was changed is found."""

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
from nets.tiny_net import images
from snapshots import same, snapshot
from torch_ext import FileError, calibrate, export, get_default_qconfig, prepare_qat

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

AFFINE = {"dtype": "uint8", "qscheme": "per_tensor_affine"}


class Net(nn.Module):
    """Convolutions, pools that keep and that change the shape, a sum, a module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.shrink = nn.MaxPool2d(2)
        self.fc = nn.Linear(64, 5)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.first(x)))
        x = self.shrink(self.act(self.second(x) + x))
        return self.fc(x.flatten(1))


def batch(count: int = 4, seed: int = 0) -> Tensor:
    """Small multiples of a power of two."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (count, 3, 8, 8), generator=made).float() / 4


def exact(activation: Any = None, weight: Any = None) -> Any:
    """In VALIDATION, with scales that are powers of two: every sum is exact in float32."""
    net = Net().eval()
    made = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=made) / 8)
    net.qconfig = get_default_qconfig(  # type: ignore[assignment]
        activation_qkwargs={"power_of_two": True, **(activation or {})},
        weight_qkwargs={"power_of_two": True, **(weight or {})},
    )
    model = prepare_qat(net, example_inputs=batch())
    calibrate(model, [batch(16, 1)], progress=False)
    return model


GRIDS: dict[str, Any] = {
    "int8": ({}, {}, {}),
    "uint8": (AFFINE, {}, {}),
    "weights stored as int8": (AFFINE, {}, {"quantized_weights": True}),
    "narrow": (AFFINE | {"quant_max": 200}, {"quant_min": -63, "quant_max": 63}, {}),
    "16 and 4 bits": ({"dtype": "int16"}, {"dtype": "int4"}, {}),
}


@pytest.mark.parametrize("case", GRIDS)
def test_nothing_differs_where_sums_are_exact(case: str, tmp_path: Path) -> None:
    activation, weight, keys = GRIDS[case]
    model, path = exact(activation, weight), tmp_path / "net.onnx"
    report = export.onnx(model, batch(), path, **keys)
    before = snapshot(model)
    found = export.compare_with_engine(model, path, batch(3, 5))
    assert same(snapshot(model), before)
    assert found.ways == ("as written", "optimised")
    assert sorted(row.name for row in found.rows) == sorted(report.quantizers)
    for row in found.rows:
        assert row.steps["as written"] == row.share["as written"] == 0, row
        assert not row.steps.get("optimised"), row
        assert not row.note
    there = {row.name for row in found.rows if "optimised" in row.steps}
    assert {name for name in report.quantizers if "parametrizations" not in name} <= there
    assert found.first() is found.first("optimised") is None
    for output in found.outputs:
        assert output.largest["as written"] == 0
        assert output.relative["optimised"] < 1e-6
        assert output.same_class == {"as written": 1, "optimised": 1}
    assert "as written: 7 of 7 tensors equal" in str(found)


def test_in_order_of_execution(tmp_path: Path) -> None:
    model, path = exact(AFFINE), tmp_path / "net.onnx"
    export.onnx(model, batch(), path)
    called: list[str] = []
    quantizers = torch_ext.named_quantizers(model)
    hooks = [
        quantizer.register_forward_hook(lambda *a, name=name: called.append(name))
        for name, quantizer in quantizers.items()
    ]
    with torch.no_grad():
        model(batch())
    for hook in hooks:
        hook.remove()
    found = export.compare_with_engine(model, path, batch())
    assert [row.name for row in found.rows] == called
    noted = export.read_onnx_metadata(path)["quantizers"]
    assert all(row.tensor in noted[row.name]["tensors"] for row in found.rows)


def test_a_wrong_scale_is_the_first_difference(tmp_path: Path) -> None:
    model, path = exact(AFFINE), tmp_path / "net.onnx"
    export.onnx(model, batch(), path)
    order = [row.name for row in export.compare_with_engine(model, path, batch()).rows]
    activations = [name for name in order if "parametrizations" not in name]
    wrong = activations[len(activations) // 2]
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == f"{wrong}/scale":
            scale = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scale * np.float32(1.25), tensor.name))
    onnx.save(proto, path)
    found = export.compare_with_engine(model, path, batch())
    for way in found.ways:
        first = found.first(way)
        assert first is not None
        assert first.name == wrong
        assert "scale is" in first.note
    # Independently: what the pair of nodes gives of the same input, by numpy.
    row = found.first()
    assert row is not None
    x = onnx_runs.watch(path, [row.tensor], batch())[row.tensor].double().numpy()
    quantizer = torch_ext.named_quantizers(model)[wrong]
    right, zero = float(quantizer.scale), int(quantizer.zero_point)
    values = [(np.clip(np.rint(x / s) + zero, 0, 255) - zero) * s for s in (right, right * 1.25)]
    steps = np.abs(values[1] - values[0]) / right
    assert row.steps["as written"] == pytest.approx(steps.max(), abs=1e-5)
    assert row.share["as written"] == pytest.approx((steps > 0.01).mean(), abs=1e-12)
    assert found.first(steps=1e9) is None
    text = str(found)
    assert f"first different {wrong}" in text
    assert "in the model" in text


def test_a_wrong_weight_is_found(tmp_path: Path) -> None:
    model, path = exact(AFFINE), tmp_path / "net.onnx"
    export.onnx(model, batch(), path, quantized_weights=True)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "second.weight/int8":
            levels = onnx.numpy_helper.to_array(tensor).copy()
            levels.flat[5] += 3
            tensor.CopyFrom(onnx.numpy_helper.from_array(levels, tensor.name))
    onnx.save(proto, path)
    row = export.compare_with_engine(model, path, batch()).first()
    assert row is not None
    assert row.of == "weight"
    assert row.name.startswith("second.")
    assert (row.steps["as written"], row.share["as written"]) == (3, 1 / 36)


def test_openvino_where_sums_are_exact(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, path = exact(AFFINE), tmp_path / "net.onnx"
    export.onnx(model, batch(), path)
    found = export.compare_with_engine(model, path, batch(), engine="openvino")
    assert found.ways == ("openvino",)
    assert len([row for row in found.rows if "openvino" in row.steps]) == 4
    assert found.first(steps=1) is None
    assert found.outputs[0].same_class == {"openvino": 1}


class Several(nn.Module):
    """Two inputs, a dict of outputs, and one quantizer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.stub = torch_ext.QuantStub()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        a, b = self.stub(x), self.stub(y * 2)
        return {"sum": self.fc(a) + b, "y": b}


def test_several_inputs_outputs_and_calls(tmp_path: Path) -> None:
    net = Several().eval()
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    given = (torch.randn(6, 4), torch.randn(6, 4))
    model, path = export_models.run(prepare_qat(net), *given), tmp_path / "net.onnx"
    export.onnx(model, given, path)
    found = export.compare_with_engine(model, path, {"x": given[0], "y": given[1]})
    names = [row.name for row in found.rows]
    assert len(names) == len(set(names)) + 1, names
    assert found.first() is None
    assert len(found.outputs) == 2
    assert all(output.relative["as written"] < 1e-5 for output in found.outputs)


@pytest.mark.parametrize("methods", [("lsq", "lsq"), ("pact", "lsq")])
def test_learned_ranges(methods: tuple[str, str], tmp_path: Path) -> None:
    model, path = export_models.solved(*methods), tmp_path / "net.onnx"
    export.onnx(model, images(), path)
    found = export.compare_with_engine(model, path, images(5, 3))
    first = found.rows[0]
    assert first.steps["as written"] == 0
    assert all(row.steps["as written"] <= 1 for row in found.rows)


def test_a_model_in_half_precision(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    x = torch.randn(16, 4)
    model = export_models.run(prepare_qat(net), x).half()
    path = tmp_path / "net.onnx"
    export.onnx(model, x.half(), path)
    found = export.compare_with_engine(model, path, x.half())
    assert all(row.steps["as written"] == 0 for row in found.rows), found


def refused(model: Any, path: Path, given: Any, message: str, **keys: Any) -> None:
    before = sorted(path.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        export.compare_with_engine(model, path, given, **keys)
    assert sorted(path.parent.iterdir()) == before


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = exact(AFFINE), tmp_path / "net.onnx"
    export.onnx(model, batch(), path)
    refused(model, path, batch(), r"unknown engine 'tvm'; known: \('onnx", engine="tvm")
    refused(
        model, path, torch.randn(2, 3, 8, 9),
        r"batch's x to have the shape \['batch', 3, 8, 8\] .* got \[2, 3, 8, 9\]",
    )  # fmt: skip
    refused(model, path, batch().double(), r"batch's x to be tensor\(float\) .* got double")
    with pytest.raises(TypeError, match=r"expected batch to be the arguments of QuantizedNet"):
        export.compare_with_engine(model, path, (batch(), batch()))
    with pytest.raises(TypeError, match=r"expected batch to be a tensor, .*, got None"):
        export.compare_with_engine(model, path, None)
    with pytest.raises(ValueError, match="expected way to be one of"):
        export.compare_with_engine(model, path, batch()).first("fast")

    torch_ext.set_fake_quantize(model, "float", pattern="second*")
    refused(model, path, batch(), r"exported from this model in this state.* only in the file: sec")
    torch_ext.set_fake_quantize(model, "calibration")
    refused(model, path, batch(), r"it is in CALIBRATION")
    refused(export_models.captured(), path, images(), "only in the file: .* only in the model: ")
    with pytest.raises(ValueError, match="to have quantizers, got none; call prepare_qat first"):
        export.compare_with_engine(Net(), path, batch())

    model = exact(AFFINE)
    plain = tmp_path / "float.onnx"
    export.onnx(model, batch(), plain, profile="float")
    refused(model, plain, batch(), 'a file with quantizers, got profile="float"')
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(FileError, match="not an ONNX file"):
        export.compare_with_engine(model, path, batch())
    with pytest.raises(FileNotFoundError):
        export.compare_with_engine(model, tmp_path / "none.onnx", batch())
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    export.onnx(model, batch(), path)
    with pytest.raises(ImportError, match="needs the package openvino: pip install openvino"):
        export.compare_with_engine(model, path, batch(), engine="openvino")


def test_a_file_whose_nodes_are_missing(tmp_path: Path) -> None:
    model, path = exact(AFFINE), tmp_path / "net.onnx"
    export.onnx(model, batch(), path)
    proto = onnx.load(path)
    name = next(n.name for n in proto.graph.node if n.name.startswith("second.param"))
    for node in proto.graph.node:
        if node.name.startswith(name.rpartition("/")[0]):
            node.name = f"other/{node.name}"
    onnx.save(proto, path)
    with pytest.raises(FileError, match=r"second\.parametrizations.* DequantizeLinear are missing"):
        export.compare_with_engine(model, path, batch())
