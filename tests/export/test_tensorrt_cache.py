"""TensorRT's calibration cache: the format by vectors of public files, its reader, refusals."""

from __future__ import annotations

import struct
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import export_models
import torch_ext
from failing_writes import check_failing_writes
from torch_ext import FakeQuantize, export, named_quantizers

NAMES = {
    "conv1.input_quantizers.input": "(Unnamed Layer* 64) [Shuffle]_output",
    "conv2.input_quantizers.input": ["relu:0", "pool: 0"],
    "add.input_quantizers.a": "conv2",
    "add.input_quantizers.b": "a/b",
    "fc.input_quantizers.input": "input_1:0",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calibration.cache"


# The largest magnitude of a tensor and the digits of its scale, amax / 127, in public caches.
VECTORS = {1.0: "3c010204", 127.0: "3f800000", 6.0: "3d418306", 2.5: "3ca14285"}


@pytest.mark.parametrize(("largest", "digits"), VECTORS.items())
def test_digits_are_those_of_public_caches(largest: float, digits: str, path: Path) -> None:
    quantizer = FakeQuantize(quant_min=-127)
    export_models.run(quantizer, torch.tensor([0.5, -largest]))
    export.tensorrt_cache(quantizer, path, "7.0.0", names={"": "x"})
    assert path.read_text() == f"TRT-7000-EntropyCalibration2\nx: {digits}\n"


def test_the_whole_file(path: Path) -> None:
    net = export_models.solved(activation_observer="percentile")
    report = export.tensorrt_cache(net, path, "8.6.1", "MinMaxCalibration", NAMES)
    own = named_quantizers(net)

    def line(name: str, tensor: str) -> str:
        return f"{tensor}: {struct.pack('>f', float(own[name].scale)).hex()}\n"

    want = "TRT-8601-MinMaxCalibration\n"
    for name, tensors in NAMES.items():
        for tensor in [tensors] if isinstance(tensors, str) else tensors:
            want += line(name, tensor)
    assert path.read_bytes() == want.encode()
    assert report.quantizers == tuple(NAMES)
    weights = [name for name in own if "parametrizations" in name]
    assert list(report.left_out) == weights
    assert "per channel, by max|w|" in report.left_out[weights[0]]

    read = export.read_tensorrt_cache(path)
    assert (read.version, read.algorithm) == ("8.6.1", "MinMaxCalibration")
    assert read.scales["pool: 0"] == read.scales["relu:0"] == float(own[list(NAMES)[1]].scale)
    assert len(read.scales) == 6


def test_the_scale_is_what_validation_multiplies_by(path: Path) -> None:
    """TensorRT: clip(round(x / scale), -128, 127) * scale, here in numpy's float32."""
    net = export_models.solved()
    export.tensorrt_cache(net, path, "8.6.1")
    x = torch.randn(10_000) * 3
    for name, value in export.read_tensorrt_cache(path).scales.items():
        scale = torch.tensor(value)
        want = (x / scale).round().clamp(-128, 127) * scale
        assert torch.equal(net.get_submodule(name)(x), want)


@pytest.mark.parametrize(
    ("version", "code"),
    [
        ("5.1.5", 5105),
        ("8.6.1", 8601),
        ("8.4.1.5", 8401),
        ("9.0.0", 9000),
        ("10.3.0", 100300),
        ("10.14.1", 101401),
    ],
)
def test_versions(version: str, code: int, path: Path) -> None:
    export.tensorrt_cache(export_models.solved(), path, version)
    assert path.read_text().startswith(f"TRT-{code}-EntropyCalibration2\n")
    assert export.read_tensorrt_cache(path).version == ".".join(version.split(".")[:3])


def test_version_of_the_installed_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.13.0.35"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    export.tensorrt_cache(export_models.solved(), path)
    assert path.read_text().startswith("TRT-101300-")
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as if it were not there
    with pytest.raises(ValueError, match="tensorrt is not installed"):
        export.tensorrt_cache(export_models.solved(), path)


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("11.0.0", "at most 10, got 11.0.0, which has no calibrators"),
        ("8.6", "such as"),
        ("8.16.0", "such as"),
        ("x", "such as"),
        (8601, "such as"),
    ],
)
def test_bad_versions(version: Any, text: str, path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        export.tensorrt_cache(export_models.solved(), path, version)
    assert not path.exists()


def test_bad_algorithm(path: Path) -> None:
    with pytest.raises(
        ValueError, match="unknown algorithm 'Entropy2'; known: EntropyCalibration2"
    ):
        export.tensorrt_cache(export_models.solved(), path, "8.6.1", "Entropy2")


def test_caches_that_tensorrt_wrote(path: Path) -> None:
    """Unpadded zeros, colons in names, CR LF, an algorithm of its own, capital digits."""
    path.write_bytes(
        b"TRT-8401-LegacyCalibration\r\nimages: 3c010a14\r\ninput_1:0: 3D0B7086\r\n"
        b"(Unnamed Layer* 64) [Shuffle]_output: 0\r\nlast: 3d23ac36"
    )
    read = export.read_tensorrt_cache(path)
    assert (read.version, read.algorithm) == ("8.4.1", "LegacyCalibration")
    assert list(read.scales) == [
        "images", "input_1:0", "(Unnamed Layer* 64) [Shuffle]_output", "last"
    ]  # fmt: skip
    assert read.scales["(Unnamed Layer* 64) [Shuffle]_output"] == 0
    assert read.scales["last"] == pytest.approx(0.0399591550, rel=1e-9)
    assert read.scales["images"] * 127 == pytest.approx(2048.5 / 2048, rel=1e-6)


HEADER = b"TRT-8601-EntropyCalibration2\n"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "line 1: expected TRT-<version>-<algorithm>, got an empty file"),
    "no header": (b"x: 3c010a14\n", "line 1: expected TRT-<version>-<algorithm>, got 'x: 3c0"),
    "binary": (b"\xff\xfe\0", "expected text in UTF-8"),
    "no colon": (HEADER + b"x 3c010a14\n", "line 2: expected a name, ': ' and 1 to 8 digits"),
    "no digits": (HEADER + b"x: \n", "line 2: expected a name"),
    "no hexadecimal": (HEADER + b"x: 3c010a1g\n", "line 2: expected a name"),
    "decimal": (HEADER + b"x: 0.0078\n", "line 2: expected a name"),
    "sign": (HEADER + b"x: -3c010a1\n", "line 2: expected a name"),
    "nine digits": (HEADER + b"x: 03c010a14\n", "line 2: expected a name"),
    "negative": (HEADER + b"x: bc010a14\n", "line 2: expected a scale of 0 or more, got -0.00"),
    "minus zero": (HEADER + b"x: 80000000\n", "line 2: expected a scale of 0 or more, got -0.0"),
    "infinite": (HEADER + b"x: 7f800000\n", "line 2: expected a scale of 0 or more, got inf"),
    "nan": (HEADER + b"x: 7fc00000\n", "line 2: expected a scale of 0 or more, got nan"),
    "no name": (HEADER + b": 3c010a14\n", "line 2: expected a name to be of 1 to 1024 bytes"),
    "bell": (HEADER + b"x\a: 3c010a14\n", "line 2: expected a name to be printable"),
    "twice": (HEADER + b"x: 0\ny: 0\nx: 0\n", "line 4: 'x' stands there twice"),
    "blank": (HEADER + b"\nx: 0\n", "line 2: expected a name"),
    "long line": (HEADER + b"x" * 10**6, "line 2: expected a name"),
    "version": (b"TRT-1-X\n", "line 1: expected"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_line(case: str, path: Path) -> None:
    data, text = HOSTILE[case]
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        export.read_tensorrt_cache(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"dtype": "uint8"}, "its grid is [0, 255]"),
        ({"dtype": "int4"}, "its grid is [-8, 7]"),
        ({"dtype": "int16"}, "its grid is [-32768, 32767]"),
        ({"quant_max": 100}, "its grid is [-128, 100]"),
        ({"qscheme": "per_tensor_affine"}, "its zero point is"),
    ],
)
def test_grids_that_tensorrt_does_not_have(keys: Any, reason: str, path: Path) -> None:
    net = export_models.solved(activation=keys)
    with pytest.raises(ValueError, match="nothing was written") as caught:
        export.tensorrt_cache(net, path, "8.6.1")
    assert f"  conv1.input_quantizers.input: {reason}" in str(caught.value)
    assert "  conv2.input_quantizers.input: " in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({**NAMES, "fc.input_quantizers.input": "conv2"}, "its name 'conv2' is that of add.input"),
        ({**NAMES, "fc.input_quantizers.input": ["o", "o"]}, "'o' is that of fc.input_quan"),
        ({**NAMES, "fc.input_quantizers.input": []}, "fc.input_quantizers.input: names has none"),
        ({**NAMES, "fc.input_quantizers.input": "a\nb"}, "to be printable, got 'a\\nb'"),
        ({**NAMES, "fc.input_quantizers.input": ""}, "to be of 1 to 1024 bytes, got ''"),
        ({**NAMES, "fc.input_quantizers.input": [3]}, "expected its name to be text, got '3'"),
        ({**NAMES, "evil": "x"}, "names: unknown evil; known: conv1.input_quantizers.input"),
        (
            {k: v for k, v in NAMES.items() if "b" not in k},
            "add.input_quantizers.b: names has none",
        ),
    ],
)
def test_bad_names(names: Any, text: str, path: Path) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        export.tensorrt_cache(export_models.solved(), path, "8.6.1", names=names)
    assert text in str(caught.value)
    assert not path.exists()


def test_a_model_that_is_not_solved(path: Path) -> None:
    net = export_models.solved()
    torch_ext.set_fake_quantize(net, "qat", pattern="fc.*")
    for write in (
        lambda: export.tensorrt_cache(net, path, "8.6.1"),
        lambda: export.json(net, path),
    ):
        with pytest.raises(ValueError, match=r"export\.|to end in"):
            write()
    with pytest.raises(ValueError, match="got 2 that do not") as caught:
        export.tensorrt_cache(net, path, "8.6.1")
    assert "  fc.input_quantizers.input: it is in QAT" in str(caught.value)
    torch_ext.set_fake_quantize(net, "float")
    with pytest.raises(ValueError, match=r"fc\.input_quantizers\.input: it is in FLOAT"):
        export.tensorrt_cache(net, path, "8.6.1")
    with pytest.raises(ValueError, match="to have quantizers, got none"):
        export.tensorrt_cache(torch.nn.Linear(2, 2), path, "8.6.1")
    torch_ext.set_fake_quantize(net, "validation", pattern="fc.parametrizations*")
    with pytest.raises(ValueError, match="to have activation quantizers, got none"):
        export.tensorrt_cache(net, path, "8.6.1")
    assert not path.exists()


def test_numbers_that_nothing_can_be_quantized_with(path: Path) -> None:
    net = export_models.solved()
    net.fc.input_quantizers.input.scale.fill_(0)
    with pytest.raises(
        ValueError, match=r"fc\.input_quantizers\.input: scale: expected values to be"
    ):
        export.tensorrt_cache(net, path, "8.6.1")
    assert not path.exists()


def test_wrong_suffixes(path: Path) -> None:
    net = export_models.solved()
    for suffix, kind in ((".onnx", "ONNX"), (".json", "JSON"), (".table", "ncnn")):
        with pytest.raises(ValueError, match=f"to be no {kind} file"):
            export.tensorrt_cache(net, path.with_suffix(suffix), "8.6.1")
    with pytest.raises(ValueError, match=r"expected path to end in \.json, got"):
        export.json(net, path)
    with pytest.raises(TypeError, match="expected path to be a file's path, got 3"):
        export.json(net, 3)  # type: ignore[arg-type]


def test_failing_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = export_models.solved()
    check_failing_writes(
        lambda target: export.tensorrt_cache(net, target, "8.6.1"), path, monkeypatch
    )
