"""A file of before layers' reads were quantized: what means the same loads, the rest is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nets.tiny_net import images, tiny_net
from snapshots import same, snapshot
from torch_ext import (
    calibrate,
    get_default_qconfig,
    load_observer_params,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)

# The quantizers of the outputs of layers, and of the model's input, as they were called; the
# operand of `add` and the inputs of the convolutions have the same names and meaning today.
OUTPUTS = ("conv1", "relu1", "conv2", "add", "fc")
WEIGHTS = {"conv1": 4, "conv2": 4, "fc": 3}


def spec(weight: bool, channels: int = 1) -> dict[str, Any]:
    return {
        "method": "fake_quant",
        "averaging_constant": 1.0 if weight else 0.01,
        "observer": "min_max",
        "options": {},
        "dtype": "int8",
        "qscheme": "per_channel_symmetric" if weight else "per_tensor_symmetric",
        "ch_axis": 0 if weight else -1,
        "channel_len": channels,
        "quant_min": -128,
        "quant_max": 127,
        "scale_rule": "grid",
        "power_of_two": False,
        "mantissa_bits": 7 if weight else 10,
        "octaves": 12 if weight else 16,
        "histogram": False,
        "transient": weight,
        "synced": False,
    }


def tensors(name: str, channels: int, top: float) -> dict[str, torch.Tensor]:
    ends = torch.tensor([[-top, top]]).expand(channels, 2).contiguous()
    tally = torch.zeros(channels, 5, dtype=torch.int64)
    tally[:, 0] = 2
    return {
        f"{name}.range": ends,
        f"{name}.scale": torch.full((channels,), top * 2 / 255),
        f"{name}.zero_point": torch.zeros(channels, dtype=torch.int32),
        f"{name}.solved": torch.ones(1, dtype=torch.uint8),
        f"{name}.observer.extrema": ends.clone(),
        f"{name}.observer.tally": tally,
        f"{name}.observer.counts": torch.zeros(channels, 2, 0, 0, dtype=torch.int64),
    }


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """Written by hand, as version 1 of the format is."""
    specs = {"input_quantizers.x": spec(False)}
    values = tensors("input_quantizers.x", 1, 3.0)
    for name in OUTPUTS:
        specs[f"{name}.activation_quantizer"] = spec(False)
        values |= tensors(f"{name}.activation_quantizer", 1, 2.0)
    for name, channels in WEIGHTS.items():
        specs[f"{name}.parametrizations.weight.0"] = spec(True, channels)
        values |= tensors(f"{name}.parametrizations.weight.0", channels, 1.0)
    content = {"kind": "observer_params", "version": 1, "content": {"quantizers": specs}}
    path = tmp_path / "older.safetensors"
    save_file(values, path, metadata=metadata(content))
    return path


def metadata(content: dict[str, Any]) -> dict[str, str]:
    return {"torch_ext": json.dumps(content)}


@pytest.mark.parametrize("example", [None, images()], ids=["plain", "example"])
def test_what_means_the_same_loads_and_the_rest_is_named(older: Path, example: Any) -> None:
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig()  # type: ignore[assignment]
    net = prepare_qat(net, example_inputs=example)
    before = snapshot(net)
    with pytest.raises(ValueError, match="expected the same quantizers on both sides") as caught:
        load_observer_params(older, net, verbose=False)
    assert same(snapshot(net), before)
    old = {"input_quantizers.x", *(f"{name}.activation_quantizer" for name in OUTPUTS)}
    old |= {f"{name}.parametrizations.weight.0" for name in WEIGHTS}
    new = set(named_quantizers(net))
    assert old & new
    assert old - new
    text = str(caught.value)
    for name in old - new:
        assert f"unexpected: {name}" in text
    for name in new - old:
        assert f"missing: {name}" in text
    # The way out: load the others, and calibrate for those that are new.
    report = load_observer_params(older, net, strict=False, verbose=False)
    assert set(report.loaded) == old & new
    assert set(report.unexpected) == old - new
    assert set(report.missing) == new - old
    if new - old:
        with pytest.raises(RuntimeError, match="calibrate, train or load_observer_params first"):
            set_fake_quantize(net, "validation")
    calibrate(net, [images()])
