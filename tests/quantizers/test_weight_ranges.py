"""In VALIDATION, exports and files a weight's range is that of the weight that is there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize

import torch_ext
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    calibrate,
    get_default_qconfig,
    load_float_state_dict,
    load_observer_params,
    prepare_qat,
    read_quantizers,
    save_observer_params,
    set_fake_quantize,
)
from torch_ext.quantizers.find import PreparedModel

NAME = "0.parametrizations.weight.0"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def data(seed: int = 1) -> Tensor:
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(seed))


def made(method: Any = "fake_quant", state: Any = "validation", **keys: Any) -> nn.Sequential:
    """The net, calibrated, in ``state``; ``keys`` are of the weights."""
    model = net()
    observer = keys.pop("observer", "min_max")
    model.qconfig = get_default_qconfig("fake_quant", method, "min_max", observer, None, keys)
    prepared = prepare_qat(model)
    calibrate(prepared, [data()], state=state)
    return prepared


def original(model: nn.Module) -> nn.Parameter:
    """The first layer's weight, not quantized."""
    weight: nn.Parameter = model.get_submodule("0.parametrizations.weight").original
    return weight


def quantizer(model: nn.Module) -> FakeQuantize:
    found = model.get_submodule(NAME)
    assert isinstance(found, FakeQuantize)
    return found


def scale_of(weight: Tensor) -> Tensor:
    """Of int8, symmetric, per output channel: the largest magnitude divided by 127.5."""
    return (weight.detach().double().abs().amax(1) * 2 / 255).float()


def check(model: nn.Module, weight: Tensor | None = None) -> None:
    """The first layer's scale is that of its weight, and so is what its forward uses."""
    layer = model.get_submodule("0")
    weight = original(model) if weight is None else weight
    scale = scale_of(weight)
    assert same_bits(quantizer(model).scale, scale)
    error = (layer.weight - weight).abs().amax(1)
    assert bool((error <= scale * 0.5001).all())


def train(model: nn.Module, steps: int = 20) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(data()) - 3).square().mean().backward()
        optimizer.step()


def after_training(model: nn.Module) -> nn.Module:
    set_fake_quantize(model, "qat")
    train(model)
    return model


def averaged(model: nn.Module) -> nn.Module:
    set_fake_quantize(model, "qat")
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        train(model, 5)
        average.update_parameters(model)
    return average.module


def float_loaded(model: nn.Module) -> nn.Module:
    state = {key: value * 10 for key, value in net().state_dict().items()}
    load_float_state_dict(model, state)
    return model


def state_loaded(model: nn.Module) -> nn.Module:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["0.parametrizations.weight.original"] *= 7
    model.load_state_dict(state)
    return model


def masked(model: nn.Module) -> nn.Module:
    weight = original(model)
    weight.data[weight.abs() > weight.abs().median()] = 0
    return model


def merged(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        original(model).add_(torch.randn(8, 2) @ torch.randn(2, 16))
    return model


CHANGES = [after_training, averaged, float_loaded, state_loaded, masked, merged]


@pytest.mark.parametrize("start", ["validation", "qat", "float", "calibration"])
@pytest.mark.parametrize("change", CHANGES)
def test_entering_validation_solves_the_present_weight(
    change: Callable[[nn.Module], nn.Module], start: str
) -> None:
    model = made()
    old = quantizer(model).scale.clone()
    set_fake_quantize(model, start)
    model = change(model)
    set_fake_quantize(model, "validation")
    assert not torch.equal(quantizer(model).scale, old)
    check(model)


@pytest.mark.parametrize("constant", [0.01, 0.5])
def test_a_moving_average_of_weights_is_not_what_validation_uses(constant: float) -> None:
    model = made(averaging_constant=constant, state="qat")
    train(model, 3)
    lagging = quantizer(model).scale.clone()
    set_fake_quantize(model, "validation")
    assert not torch.equal(quantizer(model).scale, lagging)
    check(model)


def test_the_range_is_solved_by_the_quantizers_own_rule() -> None:
    model = made(observer="mse", dtype="int4")
    merged(model)
    set_fake_quantize(model, "validation")
    fresh = made(observer="mse", dtype="int4", state="calibration")
    with torch.no_grad():
        original(fresh).copy_(original(model))
    set_fake_quantize(fresh, "validation")
    assert same_bits(quantizer(model).range, quantizer(fresh).range)
    assert not torch.equal(quantizer(model).scale, scale_of(original(model)))


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("lsq", {}),
        ("pact", {"qscheme": torch.per_tensor_symmetric}),
        ("fake_quant", {"observer": "fixed_scale", "scale": 0.25}),
        ("fake_quant", {"averaging_constant": 0.0}),
    ],
    ids=["lsq", "pact", "fixed_scale", "frozen"],
)
@pytest.mark.parametrize("change", [after_training, float_loaded])
def test_learned_given_and_frozen_ranges_stay(
    method: str, keys: dict[str, Any], change: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = change(made(method, **keys))
    learned = quantizer(model).scale.clone()
    set_fake_quantize(model, "validation")
    save_observer_params(model, tmp_path / "params.safetensors")
    torch_ext.export.json(model, tmp_path / "params.json")
    assert same_bits(quantizer(model).scale, learned)


@pytest.mark.parametrize("method", ["fake_quant", "lsq", "frozen"])
def test_weights_alone_enter_validation_without_a_calibration(method: str) -> None:
    keys = {"averaging_constant": 0.0} if method == "frozen" else {}
    qconfig = get_default_qconfig(
        "fake_quant", "lsq" if method == "lsq" else "fake_quant", weight_qkwargs=keys
    )
    model = net()
    model.qconfig = torch_ext.QConfig(activation=None, weight=qconfig.weight)
    prepared = prepare_qat(model)
    set_fake_quantize(prepared, "validation")
    check(prepared)


def test_a_weight_without_a_finite_value_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = made()
    with torch.no_grad():
        original(model).fill_(float("nan"))
        model[2].parametrizations.weight.original.mul_(2)
    set_fake_quantize(model, "float", "2.*")
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=rf"{NAME} \(the weight has no finite value\)"):
        set_fake_quantize(model, "validation")
    assert same(snapshot(model), before)
    assert not model[2].parametrizations.weight[0].quantizes
    path = tmp_path / "params.json"
    with pytest.raises(ValueError, match=f"{NAME}: the weight has no finite value"):
        torch_ext.export.json(model, path)
    with pytest.raises(ValueError, match=f"{NAME}: the weight has no finite value"):
        save_observer_params(model, tmp_path / "params.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_pruned_channel_is_reported() -> None:
    model = made()
    with torch.no_grad():
        original(model)[3] = 0
    with pytest.warns(torch_ext.QuantizationWarning, match=r"nothing to scale in \[3\] of 8"):
        set_fake_quantize(model, "validation")


class Mask(nn.Module):
    """Prunes by parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(8, 16))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_parametrizations_before_the_quantizer_count() -> None:
    model = net()
    model.qconfig = get_default_qconfig()
    parametrize.register_parametrization(model[0], "weight", Mask())
    prepared = prepare_qat(model)
    calibrate(prepared, [data()])
    chain = prepared.get_submodule("0.parametrizations.weight")
    assert isinstance(chain[0], Mask)
    weight = original(prepared)
    chain[0].mask[weight.abs() > weight.abs().median()] = 0
    set_fake_quantize(prepared, "validation")
    pruned = weight * chain[0].mask
    assert same_bits(chain[1].scale, scale_of(pruned))
    assert torch.equal(prepared[0].weight == 0, pruned.abs() < scale_of(pruned)[:, None] / 2)


def test_reading_a_weight_leaves_its_parametrizations_as_they_are(tmp_path: Path) -> None:
    model = net()
    model.qconfig = get_default_qconfig()
    torch_parametrizations.spectral_norm(model[0])
    prepared = prepare_qat(model).train()
    calibrate(prepared, [data()])
    before = snapshot(prepared)
    set_fake_quantize(prepared, "validation")
    save_observer_params(prepared, tmp_path / "params.safetensors")
    assert same(snapshot(prepared), before)
    assert all(module.training for module in prepared.modules())


def test_a_forward_in_validation_changes_nothing_and_the_next_export_is_not_old(
    tmp_path: Path,
) -> None:
    model = made()
    old = quantizer(model).scale.clone()
    train(model, 5)  # gradients flow in VALIDATION too
    before = snapshot(model)
    model(data())
    assert same(snapshot(model), before)
    assert same_bits(quantizer(model).scale, old)
    torch_ext.export.json(model, tmp_path / "params.json")
    record = torch_ext.export.read_json(tmp_path / "params.json").quantizers[NAME]
    assert same_bits(record.scale, scale_of(original(model)))
    check(model)  # VALIDATION computes what was exported


@pytest.mark.parametrize("quantized_weights", [False, True])
def test_onnx_of_a_changed_weight_computes_what_validation_does(
    quantized_weights: bool, tmp_path: Path
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = merged(made().eval())
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch_ext.export.onnx(model, data(), path, quantized_weights=quantized_weights)
    check(model)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: data().numpy()})
    with torch.no_grad():
        want = model(data())
    step = float(want.abs().max()) / 127
    assert float((torch.from_numpy(out) - want).abs().max()) < step * 1e-3


@pytest.mark.parametrize("state", ["qat", "validation", "float"])
def test_a_file_has_the_ranges_of_the_present_weights(state: Any, tmp_path: Path) -> None:
    model = merged(made(state=state))
    path = tmp_path / "params.safetensors"
    save_observer_params(model, path)
    saved = torch_ext.named_quantizers(read_quantizers(path))[NAME]
    assert same_bits(saved.scale, scale_of(original(model)))
    assert same_bits(saved.observer.extrema, torch.stack(original(model).aminmax(dim=1), 1))


def test_saving_does_not_solve_what_has_no_range(tmp_path: Path) -> None:
    model = net()
    model.qconfig = get_default_qconfig()
    prepared = prepare_qat(model)
    set_fake_quantize(prepared, "calibration")
    prepared(data())
    save_observer_params(prepared, tmp_path / "params.safetensors")
    assert not bool(quantizer(prepared).solved)


def test_float_weights_loaded_in_validation_have_their_own_range_at_once() -> None:
    model = float_loaded(made())
    check(model)
    qat = made(state="qat")
    old = quantizer(qat).scale.clone()
    assert same_bits(quantizer(float_loaded(qat)).scale, old)


def test_a_loaded_calibration_of_another_weight_is_replaced() -> None:
    source, target = made(), made(state="float")
    with torch.no_grad():
        original(target).mul_(5)
    load_observer_params(source, target, verbose=False)
    assert same_bits(quantizer(target).scale, quantizer(source).scale)
    set_fake_quantize(target, "validation")
    check(target)
    load_observer_params(source, target, verbose=False)  # in VALIDATION
    check(target)
    learning = made("lsq")
    load_observer_params(source, learning, verbose=False)
    assert same_bits(quantizer(learning).scale.detach(), quantizer(source).scale)


def test_a_model_gives_the_ranges_of_its_present_weights() -> None:
    source, target = merged(made()), made("lsq", state="qat")
    load_observer_params(source, target, verbose=False)
    assert same_bits(quantizer(target).scale.detach(), scale_of(original(source)))


def test_the_report_is_about_the_present_weights(tmp_path: Path) -> None:
    model = merged(made(state="qat"))
    fresh = copy.deepcopy(model)
    set_fake_quantize(fresh, "validation")
    set_fake_quantize(fresh, "qat")
    before = snapshot(model)
    pages = []
    for reported in (model, fresh):
        path = tmp_path / "report.html"
        torch_ext.report(reported, path, progress=False)
        pages.append(path.read_text())
    assert pages[0] == pages[1]
    assert same(snapshot(model), before)


def test_a_folded_norm_that_trained_on_changes_the_range() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.qconfig = get_default_qconfig()
    x = torch.randn(8, 3, 6, 6)
    prepared = prepare_qat(model.eval(), example_inputs=x, fold_batch_norms=True)
    calibrate(prepared, [x])
    set_fake_quantize(prepared, "qat")
    prepared.train()
    for _ in range(5):
        prepared(x * 4)
    set_fake_quantize(prepared, "validation")
    norm, chain = prepared[1], prepared[0].parametrizations.weight
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    folded = chain.original * factor.view(-1, 1, 1, 1)
    found = next(step for step in chain if isinstance(step, FakeQuantize))
    assert torch.allclose(found.scale, folded.detach().abs().flatten(1).amax(1) / 127.5)


def test_refreshing_weights_asks_once_which_have_a_range(monkeypatch: pytest.MonkeyPatch):
    """A device answers a question for all quantizers at once."""
    model = made()
    questions: list[Tensor] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda x: (questions.append(x), tolist(x))[1])
    PreparedModel("test", model).refresh_weights()
    assert [tuple(x.shape) for x in questions] == [(2,)]  # the two weights, not the activations
