"""The calibrator object, called in the order that TensorRT documents for its builder."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import export_models
from nets.tiny_net import TinyNet
from torch_ext import export, named_quantizers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.cache"


def build(calibrator: Any, header: bytes = b"TRT-8601-EntropyCalibration2") -> dict[str, float]:
    """What a builder of that version does: it asks for the algorithm and the batch size, takes a
    cache whose first line is its own, else runs batches until there is none and hands its cache
    over. Gives the scales that it would build with."""
    assert int(calibrator.get_algorithm()) in (2, 3)
    size = calibrator.get_batch_size()
    assert isinstance(size, int)
    assert size > 0
    cache = calibrator.read_calibration_cache()
    if not cache or not bytes(cache).startswith(header + b"\n"):
        batches = 0
        while calibrator.get_batch(["x"]) is not None:
            batches += 1
        assert batches == 0
        cache = header + b"\nx: 3f800000\n"
    calibrator.write_calibration_cache(memoryview(bytes(cache)))
    lines = bytes(cache).decode().splitlines()[1:]
    pairs = (line.rsplit(": ", 1) for line in lines)
    bits = {name: int(digits, 16) for name, digits in pairs}
    return {
        name: float(torch.tensor([value], dtype=torch.int32).view(torch.float32))
        for name, value in bits.items()
    }


def scales(net: TinyNet) -> dict[str, float]:
    own = named_quantizers(net).items()
    return {name: float(q.scale) for name, q in own if not q.transient}


@pytest.mark.parametrize("kept", [False, True])
def test_the_builder_uses_our_scales(kept: bool, path: Path) -> None:
    net = export_models.solved()
    calibrator = export.tensorrt_calibrator(net, path if kept else None, "8.6.1")
    assert build(calibrator) == scales(net)
    assert path.exists() == kept
    if kept:
        assert export.read_tensorrt_cache(path).scales == scales(net)


def test_an_existing_file_with_the_same_scales_stays(path: Path) -> None:
    net = export_models.solved()
    export.tensorrt_cache(net, path, "8.6.1")
    before = path.stat().st_mtime_ns
    calibrator = export.tensorrt_calibrator(net, path, "8.6.1")
    assert path.stat().st_mtime_ns == before
    assert build(calibrator) == scales(net)


def test_an_existing_file_with_other_contents_is_refused(path: Path) -> None:
    net = export_models.solved()
    export.tensorrt_cache(net, path, "8.6.1")
    before = path.read_bytes()
    other = export_models.solved(activation={"quant_min": -127})
    with pytest.raises(
        ValueError, match=r"other scales, first of 'conv1\.input_quantizers\.input'"
    ):
        export.tensorrt_calibrator(other, path, "8.6.1")
    with pytest.raises(ValueError, match=r"a cache of 8\.6\.1 EntropyCalibration2; remove it"):
        export.tensorrt_calibrator(net, path, "10.3.0")
    assert path.read_bytes() == before
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="line 1: expected TRT-"):
        export.tensorrt_calibrator(net, path, "8.6.1")


def test_a_builder_of_another_version_does_not_build_without_scales(path: Path) -> None:
    calibrator = export.tensorrt_calibrator(export_models.solved(), path, "8.6.1")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="to return the cache it read, got other scales"):
        build(calibrator, b"TRT-8503-EntropyCalibration2")
    assert path.read_bytes() == before


def test_an_object_of_tensorrts_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bindings refuse an object whose base was not initialised."""
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = "8.6.1"

    class Base:
        def __init__(self) -> None:
            self.initialised = True

    class IInt8EntropyCalibrator2(Base):
        pass

    module.IInt8EntropyCalibrator2 = IInt8EntropyCalibrator2
    module.CalibrationAlgoType = types.SimpleNamespace(
        ENTROPY_CALIBRATION_2=2, MINMAX_CALIBRATION=3
    )
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    net = export_models.solved()
    calibrator: Any = export.tensorrt_calibrator(net)
    assert isinstance(calibrator, IInt8EntropyCalibrator2)
    assert calibrator.initialised
    assert build(calibrator) == scales(net)
    with pytest.raises(ValueError, match="to have IInt8MinMaxCalibrator, got 8"):
        export.tensorrt_calibrator(net, algorithm="MinMaxCalibration")


def test_the_algorithm() -> None:
    made = export.tensorrt_calibrator(export_models.solved(), None, "8.6.1", "MinMaxCalibration")
    assert int(made.get_algorithm()) == 3
    assert bytes(made.read_calibration_cache()).startswith(b"TRT-8601-MinMaxCalibration\n")


def test_all_is_refused_before_the_builder_calls(path: Path) -> None:
    net = export_models.solved(activation={"dtype": "int16"})
    with pytest.raises(
        ValueError, match=r"conv1\.input_quantizers\.input: its grid is \[-32768, 32767\]"
    ):
        export.tensorrt_calibrator(net, path, "8.6.1")
    with pytest.raises(ValueError, match="to be no ONNX file"):
        export.tensorrt_calibrator(export_models.solved(), path.with_suffix(".onnx"), "8.6.1")
    assert not path.exists()
