"""export.check: integer layers of graphs made by hand, the float twin, and bad input."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_runs
from cli_runs import runner
from onnx_graphs import conv_file, product_file
from torch_ext import FileError, export
from torch_ext.export.common import onnx_bytes
from torch_ext.export.engines.float_twin import float_twin

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
message = pytest.importorskip("google.protobuf.message")

X = np.random.default_rng(1).standard_normal((2, 4, 6, 6)).astype(np.float32)


def layers(path: Path, engine: str, **keys: Any) -> dict[str, tuple[bool, str]]:
    found = export.check(path, engines=engine, **{"seconds": 0, **keys})
    return {layer.node: (layer.integer, layer.reason) for layer in found.engines[0].layers}


def test_layers_in_integers_and_in_float(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    assert layers(path, "onnxruntime") == {"first": (True, ""), "second": (True, "")}
    assert export.check(path, engines="onnxruntime", seconds=0).all_integer
    conv_file(path, second=False)
    found = export.check(path, engines="onnxruntime", seconds=0)
    assert [layer.integer for layer in found.engines[0].layers] == [True, False]
    assert (
        "its input is not quantized: it is the result of Sin sine"
        in found.engines[0].floating[0].reason
    )
    assert not found.all_integer
    assert "1 of 2 layers in integers" in str(found)
    assert "its input is not quantized: it is the result of Sin sine" in str(found)


def test_openvino_has_layers_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "net.onnx"
    conv_file(path)
    assert layers(path, "openvino") == {"first": (True, ""), "second": (True, "")}
    conv_file(path, second=False)
    found = layers(path, "openvino")
    assert found["first"] == (True, "")
    assert found["second"][0] is False
    assert "its input is not quantized: it is the result of Sin sine" in found["second"][1]


def test_openvino_may_make_a_layer_part_of_another_operation(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "net.onnx"
    product_file(path, ("first", "second"))
    found = export.check(path, engines="openvino", seconds=0)
    assert {layer.node for layer in found.engines[0].layers} == {"first", "second"}
    assert not found.all_integer
    assert any(layer.name == "b" for layer in found.engines[0].floating)


@pytest.mark.parametrize("names", [("", ""), ("same", "same"), ("", "other")])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_nodes_without_names_of_their_own(
    names: tuple[str, str], engine: str, tmp_path: Path
) -> None:
    """ONNX lets names be empty and repeated; what is found is that of the file with names."""
    pytest.importorskip(engine)
    named, other = tmp_path / "named.onnx", tmp_path / "other.onnx"
    product_file(named, ("first", "second"))
    product_file(other, names)
    before = other.read_bytes()
    want, have = (
        export.check(path, engines=engine, seconds=0).engines[0].layers for path in (named, other)
    )
    assert [(one.name, one.op, one.integer, one.reason, one.quantized) for one in have] == [
        (one.name, one.op, one.integer, one.reason, one.quantized) for one in want
    ]
    assert {one.name: one.quantized for one in have} == {"a": True, "b": False}
    assert {one.node for one in have} <= {"a.y", "y", "other"}
    assert other.read_bytes() == before


def test_times_of_int8_and_float(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    (engine,) = export.check(path, engines=["onnxruntime"], batch=3, seconds=0.05).engines
    assert engine.int8_ms is not None
    assert engine.float_ms is not None
    assert engine.int8_ms > 0
    assert engine.speedup == engine.float_ms / engine.int8_ms
    (engine,) = export.check(path, engines="onnxruntime", seconds=0).engines
    assert engine.int8_ms is engine.float_ms is engine.speedup is None


def test_the_float_twin_is_the_float_model(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    first, second = conv_file(path)
    proto = onnx.load(path)
    before = proto.SerializeToString()
    twin = onnx.ModelProto.FromString(float_twin("check", onnx, proto, path))
    assert proto.SerializeToString() == before
    assert [node.op_type for node in twin.graph.node] == ["Conv", "Conv", "Identity"]
    onnx.checker.check_model(twin)
    want = np.einsum("oi,nihw->nohw", second[:, :, 0, 0] @ first[:, :, 0, 0], X.astype(np.float64))
    have = onnx_runs.session(twin).run(None, {"x": X})[0]
    assert np.allclose(have, want, atol=1e-4)


BLOCKS = {
    "per tensor": ((), {}, lambda s: s),
    "per channel": ((6,), {"axis": 0}, lambda s: s[:, None]),
    "axis 1 by default": ((8,), {}, lambda s: s[None]),
    "negative axis": ((8,), {"axis": -1}, lambda s: s[None]),
    "blocks": ((6, 2), {"axis": 1, "block_size": 4}, lambda s: np.repeat(s, 4, 1)),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_constants_of_the_twin(case: str, tmp_path: Path) -> None:
    """Integers with a grid of any granularity become what onnxruntime makes of them."""
    shape, keys, wide = BLOCKS[case]
    random = np.random.default_rng(2)
    levels = random.integers(-8, 8, (6, 8)).astype(np.int8)
    scale = random.uniform(0.1, 1, shape).astype(np.float32)
    zero = random.integers(-4, 4, shape).astype(np.int8)
    helper = onnx.helper
    tensors = [
        onnx.numpy_helper.from_array(np.asarray(value), name)
        for name, value in (("w", levels), ("s", scale), ("z", zero))
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], "d", **keys),
        helper.make_node("Add", ["d", "x"], ["y"], "add"),
    ]
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [6, 8]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    twin = onnx.ModelProto.FromString(float_twin("check", onnx, model, "net"))
    assert [node.op_type for node in twin.graph.node] == ["Add"]
    zeros = np.zeros((6, 8), np.float32)
    have = onnx_runs.session(twin).run(None, {"x": zeros})[0]
    want = (levels - wide(zero).astype(np.float64)) * wide(scale)
    assert np.array_equal(have, want.astype(np.float32))
    assert np.array_equal(have, onnx_runs.session(model).run(None, {"x": zeros})[0])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runner(capsys)
    path = tmp_path / "net.onnx"
    conv_file(path)
    options = ("--engine", "onnxruntime", "--seconds", "0")
    code, out, _ = run("check", str(path), *options)
    assert code == 0
    assert "2 of 2 layers in integers" in out
    conv_file(path, second=False)
    code, out, _ = run("check", str(path), *options)
    assert code == 1
    assert "its input is not quantized: it is the result of Sin sine" in out
    code, out, _ = run("check", str(path), "--json", "--shape", "x=3,4,6,6", *options[:2])
    content = json.loads(out)
    assert code == 1
    assert content["all_integer"] is False
    assert [layer["integer"] for layer in content["engines"][0]["layers"]] == [True, False]
    assert content["engines"][0]["speedup"] > 0
    for bad in ("x", "x=", "=1", "x=1,0", "x=a"):
        code, _, error = run("check", str(path), "--shape", bad)
        assert code == 2
        assert "expected NAME=SIZES" in error
    code, _, error = run("check", str(tmp_path / "none.onnx"))
    assert code == 2
    assert "none.onnx" in error


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "engine": ({"engines": "tvm"}, r"unknown engine 'tvm'; known: \('onnxruntime', 'openvino'\)"),
    "no engine": ({"engines": []}, "expected engines to name an engine, got none"),
    "batch": ({"batch": 0}, "expected batch to be between 1 and"),
    "threads": ({"threads": 0}, "expected threads to be between 1 and"),
    "seconds": ({"seconds": -1}, "expected seconds to be between 0 and 86400, got -1"),
    "too many seconds": ({"seconds": 1e7}, "seconds to be between 0 and 86400, got 10000000.0"),
    "not a number": ({"seconds": float("nan")}, "seconds to be between 0 and 86400, got nan"),
    "shape of a number": ({"shapes": {"x": 3}}, r"shape of x to be \[batch, 4, 6, 6\], got 3"),
    "shape of text": ({"shapes": {"x": "1466"}}, r"to be \[batch, 4, 6, 6\], got '1466'"),
    "shape of flags": ({"shapes": {"x": [True, 4, 6, 6]}}, r"got \[True, 4, 6, 6\]"),
    "input": ({"shapes": {"z": [1]}}, "shapes names 'z', the file has x"),
    "rank": ({"shapes": {"x": [1, 4]}}, r"shape of x to be \[batch, 4, 6, 6\], got \[1, 4\]"),
    "size": ({"shapes": {"x": [1, 3, 6, 6]}}, r"to be \[batch, 4, 6, 6\], got \[1, 3, 6, 6\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    keys, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        export.check(path, **{"engines": "onnxruntime", **keys})


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "engines": ({"engines": 3}, "expected engines to be a name or a list of names, got 3"),
    "threads": ({"threads": True}, "expected threads to be an integer, got True"),
    "batch": ({"batch": 1.0}, r"expected batch to be an integer, got 1\.0"),
    "seconds": ({"seconds": "1"}, "expected seconds to be a number, got '1'"),
    "shapes": ({"shapes": [1]}, r"expected shapes to be a mapping from .*, got \[1\]"),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_arguments_of_wrong_types(case: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    keys, message = WRONG_TYPES[case]
    with pytest.raises(TypeError, match=f"^export.check: {message}"):
        export.check(path, **{"engines": "onnxruntime", **keys})


def test_an_engine_twice_runs_once_and_sizes_may_be_numpys(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    for shape in (np.array([2, 4, 6, 6]), [np.int64(2), 4, 6, 6]):
        (engine,) = export.check(
            path, engines=["onnxruntime", "onnxruntime"], shapes={"x": shape}, seconds=0.01
        ).engines
        assert engine.speedup is not None


def test_an_open_axis_needs_a_size(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    proto = onnx.load(path)
    proto.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    onnx.save(proto, path)
    with pytest.raises(ValueError, match=r"shapes to give x, whose axis 3 \(width\) is open"):
        export.check(path, engines="onnxruntime")
    (engine,) = export.check(
        path, engines="onnxruntime", shapes={"x": [1, 4, 6, 5]}, seconds=0.01
    ).engines
    assert engine.speedup is not None


def test_files_without_layers_or_quantizers(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:]
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    for seconds in (0, 0.01):
        found = export.check(path, engines="onnxruntime", seconds=seconds)
        assert found.notes == (
            "the file has no quantizers, and no operator of integers: it is float",
        )
        assert "no layers: nothing in the file multiplies and adds up" in str(found)
        assert "0 of 0" not in str(found)
    conv_file(path)
    assert export.check(path, engines="onnxruntime", seconds=0).notes == ()


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\xff" * 50)
    with pytest.raises(FileError, match="not an ONNX file"):
        export.check(path)
    with pytest.raises(ValueError, match=r"expected path to end in \.onnx, got '.*net\.txt'"):
        export.check(tmp_path / "net.txt")
    with pytest.raises(FileNotFoundError):
        export.check(tmp_path / "none.onnx")
    with pytest.raises(TypeError, match="expected path to be a file's path, got 3"):
        export.check(3)  # type: ignore[arg-type]


def test_a_graph_that_the_engine_refuses(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    proto = onnx.load(path)
    proto.graph.node[-1].domain = "nobody"
    proto.opset_import.add(domain="nobody", version=1)
    onnx.save(proto, path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"a model that onnxruntime [\d.]+ loads, got its error:"):
        export.check(path, engines="onnxruntime")
    assert sorted(tmp_path.iterdir()) == before


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    found: Callable[..., Any] = importlib.util.find_spec
    gone = {"openvino"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else found(name, *a)
    )
    notes = export.check(path, seconds=0).notes
    assert notes == ("openvino is not installed: pip install openvino",)
    with pytest.raises(ImportError, match="needs the package openvino: pip install openvino"):
        export.check(path, engines="openvino")
    gone.add("onnxruntime")
    with pytest.raises(ImportError, match="needs onnxruntime or openvino: pip install"):
        export.check(path)


def test_scales_that_are_next_to_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    conv_file(path)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "first.out.scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e-32), tensor.name))
    onnx.save(proto, path)
    notes = export.check(path, engines="onnxruntime", seconds=0).notes
    assert len(notes) == 1
    assert "first.out.scale (1e-32)" in notes[0]


class Huge:
    """A ModelProto past 2 GiB: protobuf raises as soon as it is asked for its size."""

    def SerializeToString(self) -> bytes:
        raise message.EncodeError("Failed to serialize proto")

    ByteSize = SerializeToString


def test_models_that_protobuf_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (onnx_bytes.model_bytes, onnx_bytes.model_copy):
        with pytest.raises(ValueError, match=r"who: expected net to be a model of .* \(Failed to"):
            made("who", Huge(), "net", "make it smaller")
    path = tmp_path / "net.onnx"
    product_file(path, ("", ""))
    # The integers fit, the floats of the same model do not.
    monkeypatch.setattr(onnx_bytes, "LIMIT", path.stat().st_size + 1000)
    found = export.check(path, engines="onnxruntime", seconds=0.01)
    assert found.engines[0].speedup is None
    assert len(found.engines[0].layers) == 2
    assert re.search(r"in float to be a model of at most \d+ bytes, got", found.notes[0])


def test_a_package_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu installs the module onnxruntime."""
    path = tmp_path / "net.onnx"
    conv_file(path)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    (engine,) = export.check(path, engines="onnxruntime", seconds=0).engines
    assert engine.version == pytest.importorskip("onnxruntime").__version__


def input_file(path: Path, kind: str) -> None:
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    made = {
        "sequence": ("SequenceLength", helper.make_sequence_type_proto),
        "optional": ("OptionalHasElement", helper.make_optional_type_proto),
    }
    y = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, None)
    if kind == "text":
        node = helper.make_node("Identity", ["x"], ["y"])
        x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.STRING, [1]) for n in "xy")
    else:
        op, wrap = made[kind]
        node = helper.make_node(op, ["x"], ["y"])
        x = helper.make_value_info("x", wrap(helper.make_tensor_type_proto(number, [1])))
        if kind == "optional":
            y = helper.make_tensor_value_info("y", onnx.TensorProto.BOOL, None)
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)


@pytest.mark.parametrize("kind", ["sequence", "optional", "text"])
def test_inputs_that_are_no_tensors_of_numbers(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    input_file(path, kind)
    message = f"got x, which is .*{kind}; seconds=0 only lists layers"
    with pytest.raises(ValueError, match=message):
        export.check(path, engines="onnxruntime")
    code, _, error = runner(capsys)("check", str(path), "--engine", "onnxruntime")
    assert code == 2
    assert re.search(message, error)


def test_constants_that_are_inputs_too(tmp_path: Path) -> None:
    """As files up to IR 3 have them: they have a value, in float too."""
    path = tmp_path / "net.onnx"
    conv_file(path)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        proto.graph.input.add().CopyFrom(
            onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        )
    onnx.save(proto, path)
    (engine,) = export.check(path, engines="onnxruntime", seconds=0.01).engines
    assert engine.speedup is not None
