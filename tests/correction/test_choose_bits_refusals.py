"""What choose_bits refuses, before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bit_nets import DATA, learned, net_of
from nets.tiny_net import TinyNet, images, prepared, tiny_net
from snapshots import same, snapshot
from torch_ext import choose_bits, get_default_qconfig

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen() -> TinyNet:
    return net_of(weight_qkwargs={"averaging_constant": 0})


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too small": ({"budget": 0.4}, ValueError, "expected budget to be at least 0.5, which is the"),
    "no number": ({"budget": "half"}, TypeError, "budget to be a number, got 'half'"),
    "not finite": ({"budget": math.nan}, ValueError, "finite and above 0, got nan"),
    "a flag": ({"budget": True}, TypeError, "budget to be a number, got True"),
    "of what": ({"of": "time"}, ValueError, "unknown budget of 'time'; known: size, operations"),
    "no bits": ({"bits": []}, ValueError, "expected bits to be integers"),
    "17 bits": ({"bits": (4, 17)}, ValueError, "expected bits to be between 2 and 16, got 17"),
    "half a bit": ({"bits": 4.5}, TypeError, 'expected bits to be integers or "float", got 4.5'),
    "other text": ({"bits": ("double",)}, TypeError, "bits to be an integer, got 'double'"),
    "backend": ({"backend": "fbgemm"}, ValueError, "unknown backend 'fbgemm'"),
    "backend's bits": (
        {"backend": "tensorrt", "bits": (4, 8)}, ValueError,
        'expected bits to be of 8, float with backend="tensorrt", which',
    ),
    "pairs": ({"pairs": "yes"}, TypeError, "pairs to be True or False, got 'yes'"),
    "absolute": ({"absolute": 1}, TypeError, "absolute to be True or False, got 1"),
    "pattern": ({"pattern": "x*"}, ValueError, 'no quantizer matches pattern "x*"'),
    "no weight": ({"pattern": "*input*"}, ValueError, "expected pattern to choose weights, got"),
    "no factor": (
        {"pattern": "add.*", "of": "operations"}, ValueError,
        "expected pattern to choose quantizers whose values are multiplied, got none",
    ),
    "no data": ({"data": []}, ValueError, "to be finite and not all zero, got 0 tensors"),
    "no batch": (
        {"data": [], "of": "operations"}, ValueError, "expected data to give batches, got none"
    ),
    "a tensor": ({"data": images()}, TypeError, "expected data to be batches, got a tensor"),
    "an iterator": ({"data": iter(DATA)}, TypeError, "that can be run over again"),
    "an iterator to count on": (
        {"data": iter(DATA), "pairs": True}, TypeError, "that can be run over again"
    ),
    "not finite data": (
        {"data": [torch.full((1, 1, 8, 8), math.nan)]}, ValueError, "squares sum to nan"
    ),
    "metric": ({"metric": 3}, TypeError, "metric to be a function or None, got 3"),
    "not a metric": ({"metric": lambda *_: "good"}, TypeError, "float model to be a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_and_nothing_changed(case: str) -> None:
    keys, kind, message = BAD[case]
    net = net_of()
    before = snapshot(net)
    arguments = {"data": DATA, "budget": 0.75, **keys}
    with pytest.raises(kind) as caught:
        choose_bits(net, **arguments)
    assert message in str(caught.value)
    assert "choose_bits: " in str(caught.value)
    assert same(snapshot(net), before)


MODELS: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "not prepared": (tiny_net, ValueError, "expected model to have quantizers"),
    "not calibrated": (
        lambda: prepared(get_default_qconfig()), RuntimeError, "expected every quantizer to have a"
    ),
    "frozen": (frozen, ValueError, r"conv1\.param.*: it keeps its range \(averaging_constant=0\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_that_are_refused(case: str) -> None:
    make, kind, message = MODELS[case]
    net = make()
    before = snapshot(net)
    with pytest.raises(kind, match=message):
        choose_bits(net, DATA, 0.75)
    assert same(snapshot(net), before)


def test_learned_ranges_are_refused_where_they_are_chosen_for() -> None:
    net = learned()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"\n  conv1\.input\S+: it learns its range \(lsq\)"):
        choose_bits(net, DATA, 0.75, of="operations")
    assert same(snapshot(net), before)
    found = choose_bits(net, DATA, 0.75, of="operations", pattern="*weight*")
    assert {row.of for row in found.rows} == {"weight"}
