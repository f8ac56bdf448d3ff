"""After reconstruct the quantizers hold their ranges, wherever the model goes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import torch_ext
from onnx_runs import check_pairs, run
from rounded_net import INT4, data, made, net, weights
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    calibrate,
    get_default_qconfig,
    load_float_state_dict,
    load_observer_params,
    named_quantizers,
    prepare_qat,
    read_quantizers,
    reconstruct,
    resolve,
    save_observer_params,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def through_states(model: nn.Module, _: Path) -> nn.Module:
    for state in ("float", "qat", "calibration"):
        set_fake_quantize(model, state)
        if state != "float":
            model.train()
            for x in data():
                model(x)
        set_fake_quantize(model, "validation")
    return model.eval()


def fresh() -> nn.Module:
    model = net()
    model.qconfig = get_default_qconfig(weight_qkwargs=INT4)
    return prepare_qat(model, example_inputs=data()[0], fold_batch_norms=True)


def by_file(model: nn.Module, folder: Path) -> nn.Module:
    save_observer_params(model, folder / "file")
    other = fresh()
    load_observer_params(folder / "file", other, verbose=False)
    load_float_state_dict(other, torch_ext.float_state_dict(model))
    set_fake_quantize(other, "validation")
    return other


def by_saved_quantizers(model: nn.Module, folder: Path) -> nn.Module:
    save_observer_params(model, folder / "file")
    quantizers = read_quantizers(folder / "file")
    save_observer_params(quantizers, folder / "again")
    assert (folder / "file").read_bytes() == (folder / "again").read_bytes()
    return by_file(model, folder)


def by_model(model: nn.Module, _: Path) -> nn.Module:
    other = fresh()
    load_observer_params(model, other, weights=True, verbose=False)
    set_fake_quantize(other, "validation")
    return other


def by_state_dict(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model.state_dict(), folder / "state.pt")
    other = fresh()
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    set_fake_quantize(other, "validation")
    return other


def by_copy(model: nn.Module, _: Path) -> nn.Module:
    other = copy.deepcopy(model)
    set_fake_quantize(other, "qat")
    set_fake_quantize(other, "validation")
    return other


WAYS: list[Callable[[nn.Module, Path], nn.Module]] = [
    through_states,
    by_file,
    by_saved_quantizers,
    by_model,
    by_state_dict,
    by_copy,
]


@pytest.mark.parametrize("way", WAYS)
def test_the_values_stay_bit_for_bit(way: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = made(fold_batch_norms=True)
    reconstruct(model, data(), progress=False)
    want, scales = weights(model), {n: q.scale.clone() for n, q in named_quantizers(model).items()}
    norms = {n: t.clone() for n, t in model.state_dict().items() if "running" in n}
    other = way(model, tmp_path)
    for name, tensor in norms.items():  # which training moves, and with them what is folded in
        other.state_dict()[name].copy_(tensor)
    have = weights(other)
    assert want.keys() == have.keys()
    for name in want:
        assert same_bits(want[name], have[name]), name
    for name, quantizer in named_quantizers(other).items():
        if quantizer.transient:
            assert same_bits(quantizer.scale, scales[name]), name
            assert quantizer.holds_range


def test_another_rule_for_weights_ends_it_and_one_for_activations_does_not() -> None:
    model = made()
    reconstruct(model, data(), progress=False)
    want = weights(model)
    for call in (
        lambda: resolve(model, activation_observer="min_max"),
        lambda: resolve(model),
    ):
        call()
        assert all(same_bits(want[name], tensor) for name, tensor in weights(model).items())
    resolve(model, weight_observer="mse")
    assert not any(quantizer.holds_range for quantizer in named_quantizers(model).values())


def test_other_weights_on_other_grids_do_not_take_the_hold(tmp_path: Path) -> None:
    model = made()
    reconstruct(model, data(), progress=False)
    other = net()
    other.qconfig = get_default_qconfig(weight_qkwargs={"dtype": "int8"})
    other = prepare_qat(other, example_inputs=data()[0])
    load_observer_params(model, other, verbose=False)
    assert not any(quantizer.holds_range for quantizer in named_quantizers(other).values())


def learning(model: nn.Module, folder: Path) -> nn.Module:
    """The rounded model's ranges and weights, in a model that learns the weights' scales."""
    save_observer_params(model, folder / "file")
    other = net()
    other.qconfig = get_default_qconfig("fake_quant", "lsq", weight_qkwargs=INT4)
    other = prepare_qat(other, example_inputs=data()[0])
    load_observer_params(folder / "file", other, verbose=False)
    load_float_state_dict(other, torch_ext.float_state_dict(model))
    return other


def test_training_of_scales_starts_from_held_ranges(tmp_path: Path) -> None:
    model = made()
    with torch.no_grad():  # a channel of zeros waits for its first value
        model.get_parameter("first.parametrizations.weight.original")[2] = 0
    calibrate(model, data(), progress=False)
    reconstruct(model, data(), progress=False)
    other = learning(model, tmp_path)
    set_fake_quantize(other, "qat")
    other.train()
    other(data()[0])
    save_observer_params(other, tmp_path / "learned")
    for quantizer in named_quantizers(other).values():
        assert quantizer.solved.tolist() == [1]
        assert not quantizer.holds_range
    load_observer_params(tmp_path / "learned", made(), verbose=False)


def test_scales_that_are_learned_can_be_calibrated_again(tmp_path: Path) -> None:
    model = made()
    reconstruct(model, data(), progress=False)
    other = learning(model, tmp_path)
    with torch.no_grad():
        weight = other.get_parameter("first.parametrizations.weight.original")
        weight *= 3
    calibrate(other, data(), progress=False)
    quantizer = named_quantizers(other)["first.parametrizations.weight.0"]
    want = 2 * weight.detach().abs().flatten(1).amax(1) / 15
    torch.testing.assert_close(quantizer.scale.detach(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantized", [False, True])
def test_onnxruntime_computes_with_the_same_values(tmp_path: Path, quantized: bool) -> None:
    model = made({"dtype": "int8", "quant_min": -7, "quant_max": 7}, fold_batch_norms=True)
    reconstruct(model, data(), progress=False)
    path = tmp_path / "net.onnx"
    torch_ext.export.onnx(model, data()[0], path, quantized_weights=quantized)
    assert check_pairs(model, path, data()[0]) > 6
    have = run(path, data()[0])[0]
    with torch.no_grad():
        assert torch.allclose(have, model(data()[0]), atol=1e-4)


def test_held_quantizers_say_so() -> None:
    model = made()
    reconstruct(model, data(), progress=False)
    quantizer = model.get_submodule("first.parametrizations.weight.0")
    assert isinstance(quantizer, FakeQuantize)
    assert "holds its range" in repr(quantizer)
    quantizer.reset_parameters()
    assert not quantizer.holds_range


def test_correct_bias_leaves_what_was_reconstructed() -> None:
    """The float model has the rounded weights, so there is nothing to compare with."""
    model = made()
    reconstruct(model, data(), progress=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for given in (data(), None):
        with pytest.raises(ValueError, match=r"correct_bias: expected .*reconstruct rounded its"):
            torch_ext.correct_bias(model, given)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
