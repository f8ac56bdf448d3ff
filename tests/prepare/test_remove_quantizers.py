"""remove_quantizers: the float model again, to the last bit, key and class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from nets.tiny_net import TinyNet, calibrated, images, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    describe,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    remove_quantizers,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS: dict[str, dict[str, Any]] = {
    "modules": {},
    "captured": {"example_inputs": images(2)},
    "folded": {"example_inputs": images(2), "fold_batch_norms": True},
}


def ready(way: str, method: str = "fake_quant") -> tuple[TinyNet, TinyNet]:
    """A float net, and the same prepared and trained for a step with a rate of 0."""
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig(method, method)  # type: ignore[assignment]
    prepared = prepare_qat(net, **WAYS[way])
    set_fake_quantize(prepared, "qat")
    prepared(images()).sum().backward()
    set_fake_quantize(prepared, "validation")
    return net, prepared


def assert_is_float(net: nn.Module, want: nn.Module) -> None:
    assert not named_quantizers(net)
    assert list(net.state_dict()) == list(want.state_dict())
    assert same(snapshot(net), snapshot(want))
    assert [(n, type(m)) for n, m in net.named_modules()] == [
        (n, type(m)) for n, m in want.named_modules()
    ]
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in want.named_parameters()]
    assert not any(m._forward_hooks for m in net.modules())
    assert same_bits(net(images()), want(images()))


@pytest.mark.parametrize("method", ["fake_quant", "lsq", "pact"])
@pytest.mark.parametrize("way", WAYS)
def test_the_float_model_comes_back(way: str, method: str) -> None:
    net, prepared = ready(way, method)
    before, out = snapshot(prepared), prepared(images())
    assert_is_float(remove_quantizers(prepared), net)
    # The prepared model is as it was, and can be prepared from scratch again.
    assert same(snapshot(prepared), before)
    assert same_bits(prepared(images()), out)
    assert list(named_quantizers(prepare_qat(remove_quantizers(prepared), **WAYS[way]))) == list(
        named_quantizers(prepared)
    )


@pytest.mark.parametrize("way", WAYS)
def test_in_place(way: str) -> None:
    net, prepared = ready(way)
    twin, out = copy.deepcopy(prepared), prepared(images())
    weight = prepared.fc.parametrizations.weight.original
    assert remove_quantizers(prepared, inplace=True) is prepared
    assert prepared.fc.weight is weight
    assert_is_float(prepared, net)
    # A copy shares classes that torch made; it goes on quantizing.
    assert same_bits(twin(images()), out)


def test_trained_weights_stay() -> None:
    _, prepared = ready("modules")
    with torch.no_grad():
        prepared.fc.parametrizations.weight.original.mul_(2)
    want = 2 * tiny_net().fc.weight
    assert same_bits(remove_quantizers(prepared).fc.weight, want)


def test_torch_aos_float_functional() -> None:
    functional = pytest.importorskip("torch.ao.nn.quantized")

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sum = functional.FloatFunctional()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.sum.add(x, x)
            return out

    net = Sum()
    net.qconfig = get_default_qconfig()
    prepared = prepare_qat(net)
    assert isinstance(prepared.sum.activation_post_process, FakeQuantize)
    assert type(remove_quantizers(prepared).sum.activation_post_process) is nn.Identity


class TestForeignParametrizations:
    def net(self) -> nn.Module:
        net = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))
        net.qconfig = get_default_qconfig()  # type: ignore[assignment]
        return net

    def test_those_of_before_stay(self) -> None:
        net, x = self.net(), torch.randn(5, 4)
        removed = remove_quantizers(prepare_qat(net))
        assert list(removed.state_dict()) == list(net.state_dict())
        assert same_bits(removed(x), net(x))
        assert not named_quantizers(removed)

    def test_one_of_after_is_named_and_nothing_changes(self) -> None:
        layer = nn.Linear(4, 3)
        layer.qconfig = get_default_qconfig()  # type: ignore[assignment]
        prepared = prepare_qat(layer)
        parametrize.register_parametrization(prepared, "bias", nn.Identity())
        before = snapshot(prepared)
        with pytest.raises(ValueError, match="parametrization from after prepare_qat"):
            remove_quantizers(prepared, inplace=True)
        assert same(snapshot(prepared), before)


class TestRefusals:
    def test_a_float_model(self) -> None:
        with pytest.raises(ValueError, match="remove_quantizers: expected model to have"):
            remove_quantizers(tiny_net())

    def test_what_is_no_model(self) -> None:
        with pytest.raises(TypeError, match=r"remove_quantizers: expected model to be a torch\.nn"):
            remove_quantizers(3)  # type: ignore[type-var]

    def test_a_flag_that_is_none(self) -> None:
        net = calibrated()
        before = describe(net)
        with pytest.raises(TypeError, match="expected inplace to be True or False, got 'yes'"):
            remove_quantizers(net, inplace="yes")  # type: ignore[arg-type]
        assert describe(net) == before

    def test_a_wrapped_model(self) -> None:
        with pytest.raises(ValueError, match="expected a plain model, got a DataParallel"):
            remove_quantizers(nn.DataParallel(calibrated()))
