"""resolve(backend=...): one calibration, the grids of every engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import torch_ext
from nets.tiny_net import TinyNet, calibrated, images, prepared
from snapshots import same, same_bits, snapshot
from torch_ext import get_default_qconfig, named_quantizers, resolve
from torch_ext.utils.backends import Backend

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = list(itertools.permutations(get_args(Backend), 2))


def net_for(backend: Backend, rule: str = "percentile", **keys: Any) -> TinyNet:
    return calibrated(get_default_qconfig(activation_observer=rule, backend=backend, **keys))


def solved(net: torch.nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, q in named_quantizers(net).items():
        found |= dict(
            zip((f"{name}.scale", f"{name}.zero_point"), q.calculate_qparams(), strict=True)
        )
        found[f"{name}.grid"] = torch.tensor([q.observer.quant_min, q.observer.quant_max])
    return found


@pytest.mark.parametrize(("first", "then"), PAIRS)
def test_as_if_calibrated_for_it(first: Backend, then: Backend) -> None:
    net, want = net_for(first), net_for(then)
    resolve(net, backend=then)
    assert same(solved(net), solved(want))
    assert same_bits(net(images()).detach(), want(images()).detach())


@pytest.mark.parametrize("rule", ["min_max", "kl", "mse", "mix", "aciq", "clip_std"])
def test_with_a_rule_of_its_own(rule: Any) -> None:
    net = net_for("onnxruntime")
    resolve(net, rule, "mse", backend="tensorrt")
    assert same(solved(net), solved(net_for("tensorrt", rule, weight_observer="mse")))


def test_seven_bits_and_one_side_alone() -> None:
    net = net_for("onnxruntime")
    resolve(net, backend="onnxruntime", reduce_range=True)
    assert same(solved(net), solved(net_for("onnxruntime", reduce_range=True)))
    before = solved(net)
    resolve(net, activation_observer="percentile", backend="ncnn")
    after = solved(net)
    weights = [name for name in before if ".weight" in name or "parametrizations" in name]
    assert weights
    assert same({n: after[n] for n in weights}, {n: before[n] for n in weights})
    assert after["conv1.input_quantizers.input.grid"].tolist() == [-127, 127]


def test_states_and_statistics_stay() -> None:
    net = net_for("onnxruntime")
    statistics = {
        f"{name}.{field}": q.observer.get_buffer(field).clone()
        for name, q in named_quantizers(net).items()
        for field in ("extrema", "tally", "counts")
    }
    resolve(net, backend="horizon")
    for name, q in named_quantizers(net).items():
        assert q.state.value == "validation"
        for field in ("extrema", "tally", "counts"):
            assert same_bits(q.observer.get_buffer(field), statistics[f"{name}.{field}"])
    resolve(net, backend="onnxruntime")
    assert same(solved(net), solved(net_for("onnxruntime")))


def learned() -> TinyNet:
    net = prepared(get_default_qconfig("lsq", backend="onnxruntime"))
    torch_ext.calibrate(net, [images()], progress=False)
    return net


def given() -> TinyNet:
    return calibrated(
        get_default_qconfig(
            activation_observer="fixed_scale", activation_qkwargs={"scale": 0.1}, backend="x86"
        )
    )


def by_channel() -> torch.nn.Module:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1))
    net.qconfig = get_default_qconfig(  # type: ignore[assignment]
        activation_qkwargs={"qscheme": "per_channel_affine", "ch_axis": 1, "channel_len": 3}
    )
    made = torch_ext.prepare_qat(net, example_inputs=torch.ones(1, 3, 2, 2))
    torch_ext.calibrate(made, [torch.rand(1, 3, 2, 2)], progress=False)
    return made


def without_statistic() -> TinyNet:
    net = net_for("x86")
    torch_ext.reset_statistics(net)
    return net


def kept() -> TinyNet:
    return calibrated(get_default_qconfig(backend="x86", weight_qkwargs={"averaging_constant": 0}))


BAD: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any], str]] = {
    "learned": (learned, {}, r"conv1\.input_quantizers\.input: it learns its range \(lsq\)"),
    "not calibrated": (
        lambda: prepared(get_default_qconfig("lsq", backend="onnxruntime")), {},
        r"conv1\.input_quantizers\.input: it learns its range \(lsq\), on another grid than int8",
    ),
    "given": (given, {}, r"conv1\.input_quantizers\.input: its scale is given \(fixed_scale\)"),
    "per channel": (
        by_channel, {}, r"  \S+: its statistic is per channel \(axis 1\)"
    ),
    "no statistic": (
        without_statistic, {}, r"conv1\.input_quantizers\.input: it has a range but no statistic"
    ),
    "kept": (kept, {}, r"weight.*: it keeps its range \(averaging_constant=0\)"),
    "unknown": (lambda: net_for("x86"), {"backend": "fbgemm"}, "resolve: unknown backend 'fbgemm'"),
    "seven bits of nothing": (
        lambda: net_for("x86"), {"backend": None, "reduce_range": True}, "expected a backend"
    ),
    "an option that no rule has": (lambda: net_for("x86"), {"xmin": 1.0}, 'unknown option "xmin"'),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_and_nothing_changed(case: str) -> None:
    make, keys, message = BAD[case]
    net = make()
    before, grids = snapshot(net), solved(net)
    with pytest.raises(ValueError, match=message):
        resolve(net, **{"backend": "tensorrt", **keys})
    assert same(snapshot(net), before)
    assert same(solved(net), grids)


def test_quantizers_left_out_by_pattern() -> None:
    net = given()
    resolve(net, backend="tensorrt", pattern="*weight*")
    assert same_bits(solved(net)["conv1.parametrizations.weight.0.grid"], torch.tensor([-127, 127]))


def test_quantizers_of_a_file_are_without_weights(tmp_path: Path) -> None:
    net = net_for("onnxruntime")
    torch_ext.save_observer_params(net, tmp_path / "net.safetensors")
    read = torch_ext.read_quantizers(tmp_path / "net.safetensors")
    message = "a weight is solved from the model that has it: .* activation_observer alone"
    with pytest.raises(RuntimeError, match=message):
        resolve(read, backend="tensorrt")
    resolve(read, "percentile", backend="tensorrt")
