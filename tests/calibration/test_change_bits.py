"""Other widths from the same statistic: as if the model had been calibrated for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torch_ext
from nets.tiny_net import TinyNet, calibrated, images
from snapshots import same, same_bits, snapshot
from torch_ext import get_default_qconfig, named_quantizers
from torch_ext.calibration.change_bits import check_bits, set_widths, width_of
from torch_ext.calibration.restore import restored
from torch_ext.quantizers.find import PreparedModel

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, dict[str, Any]] = {
    "whole": {"dtype": "int8", "qscheme": "per_tensor_symmetric"},
    "narrow": {"dtype": "int8", "qscheme": "per_tensor_symmetric", "quant_min": -127},
    "unsigned": {"dtype": "uint8", "qscheme": "per_tensor_affine"},
    "power of two": {"dtype": "int8", "qscheme": "per_tensor_symmetric", "power_of_two": True},
    "tvm": {"dtype": "int8", "qscheme": "per_tensor_symmetric", "scale_rule": "tvm"},
}
ENDS = {"narrow": {4: (-7, 7), 16: (-32767, 32767)}, "unsigned": {4: (0, 15), 16: (0, 65535)}}


def net_of(kind: str, bits: int, rule: str) -> TinyNet:
    keys = dict(KINDS[kind])
    keys["dtype"] = keys["dtype"].replace("8", str(bits))
    if "quant_min" in keys:
        keys["quant_min"] = 1 - 2 ** (bits - 1)
    weight = {**keys, "ch_axis": 0, "qscheme": keys["qscheme"].replace("tensor", "channel")}
    return calibrated(
        get_default_qconfig(
            activation_observer=rule,
            weight_observer="min_max",
            activation_qkwargs={**keys, "histogram": True},
            weight_qkwargs=weight,
        )
    )


def change(net: TinyNet, bits: int) -> None:
    prepared = PreparedModel("test", net)
    set_widths(prepared, {n: width_of(q, bits) for n, q in prepared.quantizers.items()})


def solved(net: TinyNet) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, q in named_quantizers(net).items():
        found |= {f"{name}.scale": q.scale, f"{name}.zero_point": q.zero_point}
        found[f"{name}.range"] = q.range
        found[f"{name}.grid"] = (q.observer.grid, q.observer.name)
    return found


@pytest.mark.parametrize("rule", ["percentile", "min_max"])
@pytest.mark.parametrize("bits", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_as_if_calibrated_with_so_many(kind: str, bits: int, rule: str) -> None:
    net, want = net_of(kind, 8, rule), net_of(kind, bits, rule)
    change(net, bits)
    assert same(solved(net), solved(want))
    assert same_bits(net(images()).detach(), want(images()).detach())
    ends = ENDS.get(kind, {}).get(bits)
    for q in named_quantizers(net).values():
        assert ends in (None, (q.observer.quant_min, q.observer.quant_max))


def test_there_and_back() -> None:
    net = net_of("narrow", 8, "percentile")
    before = snapshot(net)
    for bits in (4, 16, 8):
        change(net, bits)
    assert same(snapshot(net), before)


def test_its_own_width_is_its_own_grid() -> None:
    net = calibrated(get_default_qconfig(backend="onnxruntime", reduce_range=True))
    before = snapshot(net)
    change(net, 8)
    assert same(snapshot(net), before)


@pytest.mark.parametrize("rule", ["mse", "kl", "aciq", "mix"])
def test_many_bits_by_min_max_where_the_rule_takes_fewer(rule: str) -> None:
    net = net_of("whole", 8, rule)
    change(net, 16)
    assert same(solved(net), solved(net_of("whole", 16, "min_max")))
    assert {q.observer.name for q in named_quantizers(net).values()} == {"min_max"}


def test_a_restored_quantizer_has_its_grid_and_rule_again() -> None:
    net = net_of("unsigned", 8, "mse")
    before = snapshot(net)
    with restored(named_quantizers(net)):
        change(net, 16)
        assert not same(snapshot(net), before)
    assert same(snapshot(net), before)


def test_what_a_rule_does_not_take_is_found_before() -> None:
    keys = {"mantissa_bits": 5, "variant": "slides", "dtype": "int6"}  # 64 bins: for 6 bits at most
    net = calibrated(get_default_qconfig(activation_observer="kl", activation_qkwargs=keys))
    name = "conv1.input_quantizers.input"
    q = named_quantizers(net)[name]
    before = snapshot(net)
    check_bits("test", {name: q}, [4])
    with pytest.raises(ValueError, match=r"test: expected every .*\n  conv1\.input_quantizers"):
        check_bits("test", {name: q}, [4, 7])
    assert same(snapshot(net), before)


def test_per_channel_activations_keep_their_channels() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    net.qconfig = get_default_qconfig(  # type: ignore[assignment]
        activation_qkwargs={"qscheme": "per_channel_affine", "ch_axis": 1, "channel_len": 3}
    )
    made = torch_ext.prepare_qat(net, example_inputs=torch.ones(1, 3, 2, 2))
    torch_ext.calibrate(made, [torch.rand(1, 3, 2, 2)], progress=False)
    chosen = named_quantizers(made)
    check_bits("test", chosen, [4])
    change(made, 4)  # type: ignore[arg-type]
    q = next(q for q in chosen.values() if not q.transient)
    assert (q.observer.grid.ch_axis, q.scale.numel(), q.observer.quant_max) == (1, 3, 7)
