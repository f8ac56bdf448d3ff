"""ONNX QDQ files run by onnxruntime: every pair of nodes gives the bits of VALIDATION."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import export_models
import onnx_runs
import torch_ext
from nets.tiny_net import images, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    export,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


AFFINE = "per_tensor_affine"
PER_CHANNEL = {"qscheme": "per_channel_symmetric", "ch_axis": 1, "channel_len": 3}
AFFINE_CHANNELS = {"qscheme": "per_channel_affine", "ch_axis": 1, "channel_len": 3}

BYTES: dict[str, dict[str, Any]] = {
    "int8": {},
    "narrow": {"quant_min": -127},
    "seven": {"quant_min": -63, "quant_max": 63},
    "six": {"dtype": "int6"},
    "uint8": {"dtype": "uint8"},
    "affine": {"dtype": "uint8", "qscheme": AFFINE},
    "part": {"dtype": "uint8", "qscheme": AFFINE, "quant_max": 200},
    "channels": PER_CHANNEL,
    "narrow_channels": {**PER_CHANNEL, "quant_min": -127},
    "affine_channels": {**AFFINE_CHANNELS, "dtype": "uint8", "quant_max": 100},
}
WIDE: dict[str, dict[str, Any]] = {
    "int16": {"dtype": "int16"},
    "uint16": {"dtype": "uint16", "qscheme": AFFINE},
    "narrow16": {"dtype": "int16", "quant_min": -32767},
    "int4": {"dtype": "int4"},
    "uint4": {"dtype": "uint4", "qscheme": AFFINE},
    "narrow4": {"dtype": "int4", "quant_min": -7},
    "channels16": {**PER_CHANNEL, "dtype": "int16"},
    "channels4": {**AFFINE_CHANNELS, "dtype": "uint4"},
    "int3": {"dtype": "int3"},
}


class Bank(nn.Module):
    """Quantizes one input, cast to a dtype, on many grids."""

    def __init__(self, grids: dict[str, dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__()
        self.on = nn.ModuleDict({name: FakeQuantize(**keys) for name, keys in grids.items()})
        self.dtype = dtype

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(self.dtype)
        return tuple(quantizer(x).float() for quantizer in self.on.values())


def inputs(bank: nn.Module) -> Tensor:
    """[N,3] values around every border of levels, past the ends, tiny, huge and infinite."""
    parts = [torch.randn(3000) * 3, torch.tensor([0.0, -0.0, 1e-40, 3e38, -3e38])]
    parts.append(torch.tensor([torch.inf, -torch.inf]))
    for quantizer in named_quantizers(bank).values():
        scale, zero_point = quantizer.calculate_qparams()
        low, high = quantizer.observer.quant_min - 2, quantizer.observer.quant_max + 3
        levels = torch.arange(low, high, max(1, (high - low) // 200)).double()
        border = ((levels[None] + 0.5 - zero_point[:, None]) * scale[:, None]).float().flatten()
        parts += [border, torch.nextafter(border, border.new_tensor(torch.inf))]
        parts += [torch.nextafter(border, border.new_tensor(-torch.inf))]
    x = torch.cat(parts)
    return x[: len(x) // 3 * 3].view(-1, 3)


HALF = {name: BYTES[name] for name in ("int8", "narrow", "channels")}
BANKS = {
    "bytes": (BYTES, 18, torch.float32),
    "wide": (WIDE, 21, torch.float32),
    "fp16": (HALF, 18, torch.float16),
    "bf16": (HALF, 18, torch.bfloat16),
}


@pytest.mark.filterwarnings("ignore::torch_ext.QuantizationWarning")
@pytest.mark.parametrize("case", BANKS)
def test_every_grid(case: str, tmp_path: Path) -> None:
    grids, opset, dtype = BANKS[case]
    bank = export_models.run(
        Bank(grids, dtype), torch.randn(100, 3) * torch.tensor([1.0, 2.0, 0.1])
    )
    path = tmp_path / "bank.onnx"
    x = inputs(bank)
    report = export.onnx(bank, x[:4], path)
    assert report.quantizers == tuple(f"on.{name}" for name in grids)
    proto = onnx.load(path)
    assert [(one.domain, one.version) for one in proto.opset_import] == [("", opset)]
    with torch.no_grad():
        want = bank(x)
    for name, y, ours in zip(grids, onnx_runs.run(path, x), want, strict=True):
        # onnxruntime's 4 bits per channel: what overflows x / scale becomes the least level.
        whole = (x.abs() < 1e4) | torch.tensor(name != "channels4")
        assert same_bits(y[whole], ours[whole]), name
    if dtype is torch.float32:
        assert onnx_runs.check_pairs(bank, path, x.clamp(-1e4, 1e4)) == len(grids)


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
METHODS = {
    "stored in float": (("fake_quant", "fake_quant"), False),
    "stored as int8": (("lsq", "lsq"), True),
    "learned": (("pact", "lsq"), False),
}


@pytest.mark.parametrize("case", METHODS)
def test_a_net(case: str, tmp_path: Path) -> None:
    """Every pair bit for bit; the rest computes what torch does, up to the order of sums."""
    methods, quantized_weights = METHODS[case]
    weight = {"quant_min": -100, "quant_max": 90}  # narrower than the data: something clips
    net = export_models.solved(*methods, weight=weight)
    if "lsq" in methods:
        with torch.no_grad():
            for parameter in torch_ext.quantization_parameters(net):
                parameter.mul_(-0.7)  # as training may leave it
    path = tmp_path / "net.onnx"
    before = snapshot(net)
    report = export.onnx(net, images(), path, quantized_weights=quantized_weights)
    assert same(snapshot(net), before)
    assert onnx_runs.check_pairs(net, path, images(9, 5)) == len(report.quantizers) == 8
    with torch.no_grad():
        want = net(images(9, 5))
    # A sum that is rounded in another order may move what fc reads to the next level.
    step = float(net.fc.input_quantizers.input.calculate_qparams()[0])
    step *= float(net.fc.weight.abs().sum(1).max())
    for optimized in (False, True):
        (have,) = onnx_runs.run(path, images(9, 5), optimized=optimized)
        assert float((have - want).abs().max()) <= step * 1.001
        assert torch.equal(have.argmax(1), want.argmax(1))
    kinds = {one.name: one.data_type for one in onnx.load(path).graph.initializer}
    want_kind = onnx.TensorProto.INT8 if quantized_weights else onnx.TensorProto.FLOAT
    assert kinds["conv1.weight/int8" if quantized_weights else "conv1.weight"] == want_kind
    assert ("conv1.weight" in kinds) != quantized_weights


def test_quantized_weights_of_every_size(tmp_path: Path) -> None:
    """An odd number of values too, where two share a byte."""
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 2)).eval()
    keys = [
        {"dtype": "int4"},
        {"dtype": "uint8", "qscheme": "per_channel_affine"},
        {"dtype": "int16"},
    ]
    mapping = {str(i): get_default_qconfig(weight_qkwargs=one) for i, one in enumerate(keys)}
    net = export_models.run(prepare_qat(net, mapping={"": get_default_qconfig(), **mapping}), X)
    path = tmp_path / "net.onnx"
    export.onnx(net, X[:2], path, quantized_weights=True)
    assert onnx_runs.check_pairs(net, path, X) == 6
    names = {one.name for one in onnx.load(path).graph.initializer}
    assert {"0.weight/int4", "1.weight/uint8", "2.weight/int16"} <= names


def test_quantized_weights_take_a_quarter(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(512, 512)).eval()
    net.qconfig = get_default_qconfig()
    net = export_models.run(prepare_qat(net), torch.randn(2, 512))
    sizes = []
    for quantized in (False, True):
        path = tmp_path / f"{quantized}.onnx"
        export.onnx(net, torch.randn(2, 512), path, quantized_weights=quantized)
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.27 * sizes[0]
    left, right = (
        onnx_runs.run(tmp_path / f"{quantized}.onnx", torch.ones(1, 512))[0]
        for quantized in (False, True)
    )
    assert same_bits(left, right)


def test_metadata_names_every_quantizer(tmp_path: Path) -> None:
    net = export_models.captured(activation={"quant_min": -127})
    set_fake_quantize(net, "float", pattern="mean_quantizer")
    path = tmp_path / "net.onnx"
    report = export.onnx(net, images(), path)
    content = export.read_onnx_metadata(path)
    (text,) = (one.value for one in onnx.load(path).metadata_props if one.key == "torch_ext")
    assert json.loads(text) == content
    assert set(content["quantizers"]) | {"mean_quantizer"} == set(named_quantizers(net))
    assert content["left_out"] == report.left_out == {"mean_quantizer": "it is in FLOAT"}
    assert content["quantizers"]["conv1.parametrizations.weight.0"] == {
        "tensors": ["conv1.weight"], "type": "int8", "quant_min": -128, "quant_max": 127,
        "axis": 0, "weight": True,
    }  # fmt: skip
    assert content["quantizers"]["input_quantizers.x"]["tensors"] == ["x"]
    names = {node.name for node in onnx.load(path).graph.node}
    for name in content["quantizers"]:
        assert {f"{name}/quantized", f"{name}/dequantized"} <= names
    assert "input_quantizers.x/clipped" in names
    assert "mean_quantizer/quantized" not in names


def test_batch_norms_that_are_folded_for_the_quantizer_alone(tmp_path: Path) -> None:
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig()
    net = prepare_qat(net, example_inputs=images(), fold_batch_norms=True)
    export_models.run(net, images())
    path = tmp_path / "net.onnx"
    export.onnx(net, images(), path, quantized_weights=True)
    assert onnx_runs.check_pairs(net, path, images(9, 5)) == 7
    with torch.no_grad():
        want = net(images(9, 5))
    (have,) = onnx_runs.run(path, images(9, 5))
    assert torch.allclose(have, want, atol=0.01)


def test_the_batch(tmp_path: Path) -> None:
    net = export_models.captured().train()  # exported as it evaluates, and left in train mode
    free, fixed = tmp_path / "free.onnx", tmp_path / "fixed.onnx"
    export.onnx(net, (images(),), free)
    export.onnx(net, {"x": images(1)}, fixed, dynamic_batch=False)
    assert net.training
    assert net.dropout.training
    shapes = [onnx_runs.session(path).get_inputs()[0].shape for path in (free, fixed)]
    assert shapes == [["batch", 1, 8, 8], [1, 1, 8, 8]]
    net.eval()
    for count in (1, 2, 7):
        with torch.no_grad():
            want = net(images(count, 4))
        assert torch.allclose(onnx_runs.run(free, images(count, 4))[0], want, atol=1e-5)
    with pytest.raises(ValueError, match="a batch of 2 or more on axis 0, got 1; or pass dynamic"):
        export.onnx(net, images(1), tmp_path / "one.onnx")


class Shared(nn.Module):
    """One quantizer at two places, an integer input, two outputs, one of them quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 4)

    def forward(self, tokens: Tensor, x: Tensor) -> dict[str, Tensor]:
        y = self.relu(self.embed(tokens) + x)
        return {"hidden": y, "out": self.relu(self.fc(y))}


def test_shared_quantizers_and_several_inputs_and_outputs(tmp_path: Path) -> None:
    net = Shared().eval()
    net.qconfig = get_default_qconfig()
    given = (torch.arange(6).view(3, 2), torch.randn(3, 2, 4))
    with pytest.warns(torch_ext.QuantizationWarning, match=r"input_quantizers\.tokens"):
        net = export_models.run(prepare_qat(net, input_qconfig=net.qconfig), *given)
    path = tmp_path / "net.onnx"
    report = export.onnx(net, given, path)
    assert report.left_out == {"input_quantizers.tokens": "it saw no data and passes through"}
    assert onnx_runs.check_pairs(net, path, *given) == 4
    with torch.no_grad():
        want = net(*given)
    have = onnx_runs.run(path, *given)
    assert torch.allclose(have[0], want["hidden"], atol=1e-5)
    assert torch.allclose(have[1], want["out"], atol=1e-5)


def test_the_float_profile_is_the_float_model_and_names_what_a_cache_is_for(
    tmp_path: Path,
) -> None:
    net = export_models.captured()
    path, cache = tmp_path / "net.onnx", tmp_path / "net.cache"
    export.onnx(net, images(), path, profile="float")
    set_fake_quantize(net, "float")
    with torch.no_grad():
        want = net(images(9, 5))
    set_fake_quantize(net, "validation")
    assert torch.allclose(onnx_runs.run(path, images(9, 5))[0], want, atol=1e-5)
    proto = onnx.load(path)
    assert not any("Linear" in node.op_type for node in proto.graph.node)

    export.tensorrt_cache(net, cache, "8.6.1", names=path)
    scales = export.read_tensorrt_cache(cache).scales
    tensors = {"x"} | {name for node in proto.graph.node for name in node.output}
    assert scales.keys() <= tensors
    assert scales["x"] == float(net.input_quantizers.x.scale)
    seen = onnx_runs.watch(path, list(scales), images())  # what was calibrated on
    for tensor, scale in scales.items():
        largest = float(seen[tensor].abs().max())
        assert scale == pytest.approx(largest / 127.5, rel=1e-5)


def test_a_file_of_another_profile_has_names_for_other_tensors(tmp_path: Path) -> None:
    """They are names all the same; a file of another program has none."""
    path = tmp_path / "other.onnx"
    export.onnx(export_models.captured(), images(), path, profile="float")
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    with pytest.raises(ValueError, match="its metadata is missing"):
        export.tensorrt_cache(export_models.captured(), tmp_path / "c", "8.6.1", names=path)
    for text, problem in (
        ("{", "metadata: Expecting"),
        ("[]", "metadata is missing"),
        ('{"quantizers": {}, "version": 2}', "reads version 1, got 2"),
        ('{"quantizers": {"a": 3}, "version": 1}', "metadata: a: expected names of tensors"),
        ('{"quantizers": {"a": {"tensors": [3]}}, "version": 1}', "a: expected names of tensors"),
    ):
        del proto.metadata_props[:]
        proto.metadata_props.add(key="torch_ext", value=text)
        onnx.save(proto, path)
        with pytest.raises(ValueError, match=problem):
            export.tensorrt_cache(export_models.captured(), tmp_path / "c", "8.6.1", names=path)
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(ValueError, match=r"other\.onnx: not an ONNX file"):
        export.read_onnx_metadata(path)
    with pytest.raises(FileNotFoundError):
        export.read_onnx_metadata(tmp_path / "none.onnx")
