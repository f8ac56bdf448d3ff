"""TVM's scales: its thresholds by hand, its simulated quantization, the reader, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import export_models
from failing_writes import check_failing_writes
from nets.tiny_net import TinyNet
from torch_ext import FakeQuantize, export, named_quantizers, set_fake_quantize

TVM: dict[str, Any] = {
    "qscheme": "per_tensor_symmetric",
    "quant_min": -127,
    "scale_rule": "tvm",
}
POWER = {**TVM, "power_of_two": True}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.json"


def solved(**keys: Any) -> TinyNet:
    return export_models.solved(**{"activation": TVM, "weight": POWER, **keys})


# max|w| -> TVM's threshold, 2^ceil(log2(max|w|)).
@pytest.mark.parametrize(
    ("largest", "threshold"), [(0.3, 0.5), (0.5, 0.5), (1.0, 1), (1.0000001, 2), (3.0, 4)]
)
def test_thresholds_of_weights(largest: float, threshold: float, path: Path) -> None:
    quantizer = export_models.run(FakeQuantize(**POWER), torch.tensor([0.1, -largest]))
    export.tvm_scales(quantizer, path)
    scale = export.read_tvm_scales(path).quantizers[""]
    assert (scale.threshold, scale.dom_scale) == (threshold, threshold / 128)
    assert (scale.clip_min, scale.clip_max) == (-127, 127)


def test_tvms_simulation_gives_the_bits_of_validation(path: Path) -> None:
    net = solved()
    report = export.tvm_scales(net, path)
    read = export.read_tvm_scales(path)
    assert tuple(read.quantizers) == report.quantizers == tuple(named_quantizers(net))
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * 4
    for name, scale in read.quantizers.items():
        step = np.float32(scale.dom_scale)
        want = np.clip(np.rint(x.numpy() / step), scale.clip_min, scale.clip_max) * step
        with torch.no_grad():
            have = named_quantizers(net)[name](x)
        assert np.array_equal(have.numpy(), want), name
    weights = [scale for scale in read.quantizers.values() if scale.of == "weight"]
    assert len(weights) == 3
    assert all(np.log2(scale.threshold) % 1 == 0 for scale in weights)


def test_the_global_scale(path: Path) -> None:
    given = {**TVM, "scale": 8 / 128}
    net = solved(activation=given, activation_observer="fixed_scale")
    export.tvm_scales(net, path, global_scale=8.0)
    read = export.read_tvm_scales(path)
    assert read.global_scale == 8
    activations = [scale for scale in read.quantizers.values() if scale.of != "weight"]
    assert {(scale.threshold, scale.dom_scale) for scale in activations} == {(8.0, 0.0625)}
    with pytest.raises(ValueError, match="its threshold is 8, not the global_scale 4"):
        export.tvm_scales(net, path, global_scale=4.0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "channels": (
        lambda: solved(weight=export_models.NARROW),
        {},
        "conv1.parametrizations.weight.0: it is per channel (axis 0)",
    ),
    "wide": (
        lambda: solved(activation={}),
        {},
        "conv1.input_quantizers.input: its grid is [-128, 127], not [-127, 127]",
    ),
    "affine": (
        lambda: solved(activation={"qscheme": "per_tensor_affine", "quant_min": -127}),
        {},
        "conv1.input_quantizers.input: its zero point is not 0",
    ),
    "power": (
        lambda: solved(weight=TVM),
        {},
        "is no power of two",
    ),
    "kind": (solved, {"weight_scale": "power3"}, "unknown weight_scale 'power3'; known: power2"),
    "global": (solved, {"global_scale": -1}, "expected global_scale to be above 0, got -1"),
    "global text": (solved, {"global_scale": "8"}, "expected global_scale to be above 0, got '8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_reason(case: str, path: Path) -> None:
    make, keys, text = REFUSED[case]
    with pytest.raises(ValueError, match=r"^export\.tvm_scales: ") as caught:
        export.tvm_scales(make(), path, **keys)
    assert text in str(caught.value)
    assert not path.exists()


def test_weights_of_any_threshold_and_four_bits(path: Path) -> None:
    four = {**TVM, "dtype": "int4", "quant_min": -7}
    export.tvm_scales(solved(weight=four), path, weight_scale="max")
    scale = export.read_tvm_scales(path).quantizers["fc.parametrizations.weight.0"]
    assert (scale.clip_min, scale.clip_max) == (-7, 7)
    assert scale.threshold == scale.dom_scale * 8


def put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document["quantizers"]["fc.input_quantizers.input"].update({key: value})


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda d: d.update(format="x"), "format, version: expected 'torch_ext.tvm' 1"),
    "version": (lambda d: d.update(version=2), "format, version: expected"),
    "weights": (lambda d: d.update(weight_scale=1), "weight_scale: expected power2 or max, got 1"),
    "global": (lambda d: d.update(global_scale=0), "global_scale: expected null or above 0, got 0"),
    "none": (lambda d: d.update(quantizers={}), "quantizers: expected an object"),
    "list": (lambda d: d["quantizers"].update(a=[1]), "a: expected clip_max, "),
    "name": (lambda d: d["quantizers"].update({"a\n": 1}), "expected names to be printable"),
    "extra": (put("more", 1), "fc.input_quantizers.input: expected clip_max, "),
    "of": (put("of", "bias"), "fc.input_quantizers.input: expected clip_max, "),
    "scale": (put("dom_scale", 0), "fc.input_quantizers.input: expected clip_min"),
    "threshold": (put("threshold", 1e9), "fc.input_quantizers.input: expected clip_min"),
    "text": (put("threshold", "1"), "fc.input_quantizers.input: expected clip_min"),
    "clip": (put("clip_min", -128), "fc.input_quantizers.input: expected clip_min"),
    "clip float": (put("clip_max", 127.0), "fc.input_quantizers.input: expected clip_min"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_field(case: str, path: Path) -> None:
    export.tvm_scales(solved(), path)
    document = json.loads(path.read_text())
    change, text = HOSTILE[case]
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        export.read_tvm_scales(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)


def test_states_and_places(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = solved()
    check_failing_writes(lambda target: export.tvm_scales(net, target), path, monkeypatch)
    set_fake_quantize(net, "calibration")
    with pytest.raises(ValueError, match="it is in CALIBRATION"):
        export.tvm_scales(net, path)
    with pytest.raises(ValueError, match=r"to end in \.json"):
        export.tvm_scales(net, path.with_suffix(".txt"))
