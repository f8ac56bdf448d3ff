"""ncnn's table of layers named by hand, as from a file: the table that the model gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import export_models
from nets import ncnn_net
from torch_ext import export, read_quantizers, save_observer_params
from torch_ext.cli.main import main

WEIGHT = "{}.parametrizations.weight.0"
INPUTS = {
    "conv": "input_quantizers.x",
    "depthwise": "relu_quantizer",
    "pointwise": "relu_quantizer_1",
    "fc": "pointwise.activation_quantizer",
}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "net.table"


def layers(**more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: {"weight": WEIGHT.format(name), "input": source} for name, source in INPUTS.items()
    }
    found["depthwise"]["groups"] = 16
    return found | more


def test_the_bytes_are_those_of_the_model(path: Path) -> None:
    net = ncnn_net.net()
    whole = export.ncnn_table(net, ncnn_net.images(), path)
    want = path.read_bytes()
    save_observer_params(net, "net.safetensors")
    report = export.ncnn_table_of(read_quantizers("net.safetensors"), layers(), path)
    assert path.read_bytes() == want
    assert set(report.quantizers) == set(whole.quantizers)
    Path("layers.json").write_text(json.dumps(layers()))
    command = ["convert", "net.safetensors", "--to", "ncnn", "--layers", "layers.json"]
    assert main([*command, "-o", "new.table"]) == 0
    assert Path("new.table").read_bytes() == want


def test_per_tensor_weights_repeat_their_scale(path: Path) -> None:
    net = ncnn_net.net(weight={**export_models.NARROW, "qscheme": "per_tensor_symmetric"})
    export.ncnn_table(net, ncnn_net.images(), path)
    want = path.read_bytes()
    given = layers()
    for name, channels in {"conv": 16, "depthwise": 16, "pointwise": 24, "fc": 5}.items():
        given[name]["channels"] = channels
    export.ncnn_table_of(net, given, path)
    assert path.read_bytes() == want
    del given["fc"]["channels"]
    with pytest.raises(ValueError, match="fc: expected channels, as its weight has one scale"):
        export.ncnn_table_of(net, given, path)


def test_quantizers_that_no_layer_reads_are_left_out(path: Path) -> None:
    net = ncnn_net.net()
    given = layers()
    given["fc"]["input"] = "relu_quantizer"
    report = export.ncnn_table_of(net, given, path)
    assert list(report.left_out) == ["pointwise.activation_quantizer"]


CONV = {"weight": WEIGHT.format("conv"), "input": "input_quantizers.x"}
REFUSED: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "expected layers to be a mapping of layers, got {}"),
    "a list": ([1], "expected layers to be a mapping of layers, got [1]"),
    "text": (layers(conv="x"), "conv: expected a mapping of weight and input"),
    "no input": (layers(conv={"weight": "x"}), "conv: expected a mapping of weight and input"),
    "more": (layers(conv={**CONV, "x": 1}), "conv: expected a mapping of weight and input"),
    "weight": (layers(conv={**CONV, "weight": "x"}), "conv: unknown weight 'x'; known: conv.para"),
    "no weight": (
        layers(conv={**CONV, "weight": "relu_quantizer"}),
        "conv: unknown weight 'relu_quantizer'; known: ",
    ),
    "input": (layers(conv={**CONV, "input": [1]}), "conv: unknown input [1]; known: "),
    "groups": (
        layers(conv={**CONV, "groups": 0}),
        "conv: expected groups to be an integer of 1 or",
    ),
    "groups of 3": (
        layers(conv={**CONV, "groups": 3}),
        "output channels and a multiple of groups, got 16 with 3 groups and 16 scales",
    ),
    "channels": (
        layers(conv={**CONV, "channels": 8}),
        "output channels and a multiple of groups, got 8 with 1 groups and 16 scales",
    ),
    "yes": (
        layers(conv={**CONV, "groups": True}),
        "conv: expected groups to be an integer of 1 or",
    ),
    "left out": (
        {"conv": CONV},
        "depthwise.parametrizations.weight.0: it is of a layer that has no row",
    ),
    "blank": (layers(**{"a b": CONV}), "without ' ' and _param_, got 'a b'"),
    "several scales": (
        layers(conv={**CONV, "groups": 2}),
        "conv.parametrizations.weight.0: its 2 groups have several scales each",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_reason(case: str, path: Path) -> None:
    given, text = REFUSED[case]
    with pytest.raises(ValueError, match=r"^export\.ncnn_table_of: ") as caught:
        export.ncnn_table_of(ncnn_net.net(), given, path)
    assert text in str(caught.value)
    assert not path.exists()


def test_grids_and_suffixes(path: Path) -> None:
    with pytest.raises(ValueError, match=r"input_quantizers.x: its grid is \[-128, 127\], not"):
        export.ncnn_table_of(ncnn_net.net(None), layers(), path)
    with pytest.raises(ValueError, match=r"to end in \.table"):
        export.ncnn_table_of(ncnn_net.net(), layers(), path.with_suffix(".txt"))


def test_the_command_needs_layers(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_observer_params(ncnn_net.net(), "net.safetensors")
    assert main(["convert", "net.safetensors", "--to", "ncnn", "-o", "net.table"]) == 2
    assert "torch-ext convert: expected --layers, as" in capsys.readouterr().err
    assert not path.exists()
