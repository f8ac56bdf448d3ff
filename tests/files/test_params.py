"""load_observer_params and its files: every pair of observers, reports, hostile files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import torch_ext
from nets.tiny_net import ACTIVATIONS, WEIGHTS, TinyNet, images, prepared
from params_of_rules import PARAMETERS, RULES, STATISTIC, config, solved_net
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    load_observer_params,
    named_quantizers,
    ops,
    save_observer_params,
    set_fake_quantize,
)
from torch_ext.files.quantizer_params import FIELDS, params_from, quantizer_of, spec_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sources() -> dict[str, TinyNet]:
    torch.set_num_threads(1)
    return {rule: solved_net(rule) for rule in RULES}


@pytest.mark.parametrize("through_file", [False, True], ids=["model", "file"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(RULES, repeat=2)))
def test_every_pair_of_observers(
    source: str,
    target: str,
    through_file: bool,
    sources: dict[str, TinyNet],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from_model, to_model = sources[source], prepared(config(target))
    given: Any = from_model
    if through_file:
        given = tmp_path / "params.safetensors"
        save_observer_params(from_model, given)
    before = snapshot(from_model)
    own = snapshot(to_model)
    report = load_observer_params(given, to_model)
    assert str(report) + "\n" == capsys.readouterr().out
    assert same(snapshot(from_model), before)
    assert report.complete
    everything = {*ACTIVATIONS, *WEIGHTS}
    if target == "fixed_scale":
        assert (set(report.kept), report.loaded) == (everything, [])
    else:
        assert (report.kept, set(report.loaded)) == ([], everything)
    after = snapshot(to_model)
    for name in everything:
        for field in PARAMETERS:
            key = f"{name}.{field}"
            want = own[key] if target == "fixed_scale" else before[key]
            assert same_bits(after[key], want), key
        counts = before[f"{name}.observer.counts"].numel()
        fits = counts > 0 or own[f"{name}.observer.counts"].numel() == 0
        assert (name in report.statistics_skipped) == (not fits)
        if fits and own[f"{name}.observer.counts"].numel():
            for field in STATISTIC:
                assert same_bits(after[f"{name}.{field}"], before[f"{name}.{field}"])
    set_fake_quantize(to_model, "validation")
    end = snapshot(to_model)
    for name, field in itertools.product(everything, PARAMETERS):
        key = f"{name}.{field}"
        # The weights are the same in all models, so by this rule they have this range.
        want = snapshot(sources[target])[key] if name in WEIGHTS else after[key]
        assert same_bits(end[key], want), key
    if source == target:
        assert same_bits(to_model(images()).detach(), from_model(images()).detach())


def test_training_goes_on_from_the_loaded_range() -> None:
    source, target = solved_net("mse"), prepared(config("min_max"))
    load_observer_params(source, target)
    set_fake_quantize(target, "qat")
    x = images(seed=8) * 2
    with torch.no_grad():
        target(x)
    old, batch = (
        source.conv1.input_quantizers.input.range,
        torch.stack(torch.aminmax(x)).reshape(1, 2),
    )
    want = (old.double() + 0.01 * (batch.double() - old.double())).float()
    assert torch.allclose(target.conv1.input_quantizers.input.range, want, rtol=1e-6)


def test_a_frozen_model_after_loading_computes_what_validation_did() -> None:
    source = solved_net("percentile")
    frozen = config("min_max", activation_qkwargs={"averaging_constant": 0.0},
                    weight_qkwargs={"averaging_constant": 0.0})  # fmt: skip
    target = prepared(frozen)
    load_observer_params(source, target)
    set_fake_quantize(target, "qat")
    assert same_bits(target(images()).detach(), source(images()).detach())


@pytest.mark.parametrize(
    "keys",
    [
        {"activation_qkwargs": {"dtype": "int4"}, "weight_qkwargs": {"dtype": "int4"}},
        {"activation_qkwargs": {"dtype": "uint8", "qscheme": torch.per_tensor_affine}},
        {"activation_qkwargs": {"scale_rule": "tvm"}, "weight_qkwargs": {"power_of_two": True}},
    ],
)
def test_another_grid_gets_its_own_scale_from_the_range(keys: dict[str, Any]) -> None:
    source, target = solved_net("percentile"), prepared(config("min_max", **keys))
    report = load_observer_params(source, target)
    assert report.converted
    quantizers = named_quantizers(target)
    for name, quantizer in named_quantizers(source).items():
        observer = quantizers[name].observer
        scale, zero_point = ops.qparams(
            quantizer.range, observer.quant_min, observer.quant_max, observer.symmetric,
            observer.scale_rule, observer.power_of_two,
        )  # fmt: skip
        assert same_bits(quantizers[name].range, quantizer.range)
        assert same_bits(quantizers[name].scale, scale)
        assert same_bits(quantizers[name].zero_point, zero_point)


def test_per_channel_and_per_tensor() -> None:
    channels = solved_net("min_max")
    whole = prepared(config("min_max", weight_qkwargs={"qscheme": torch.per_tensor_symmetric}))
    report = load_observer_params(channels, whole)
    assert set(report.converted) == set(WEIGHTS)
    ranges = channels.conv1.parametrizations.weight[0].range
    joined = whole.conv1.parametrizations.weight[0]
    assert joined.range.tolist() == [[float(ranges[:, 0].min()), float(ranges[:, 1].max())]]
    assert same_bits(joined.scale, ops.qparams(joined.range, -128, 127, True)[0])
    assert set(report.statistics_skipped) == set(WEIGHTS)

    back = prepared(config("min_max"))
    load_observer_params(whole, back)
    spread = back.conv1.parametrizations.weight[0]
    assert spread.range.tolist() == joined.range.tolist() * 4
    assert spread.scale.tolist() == joined.scale.tolist() * 4


def test_a_statistic_without_histogram_has_nothing_tiny() -> None:
    source = prepared(config("percentile"))
    set_fake_quantize(source, "calibration")
    x = images()
    x[0, 0, 0, 0] = 1e-30
    with torch.no_grad():
        source(x)
    set_fake_quantize(source, "validation")
    assert int(source.conv1.input_quantizers.input.observer.tally[0, 2]) == 1
    target = prepared(config("min_max"))
    load_observer_params(source, target)
    tally = target.conv1.input_quantizers.input.observer.tally
    assert tally.tolist() == [[x.numel(), 0, 0, 0, 0]]


def test_missing_unexpected_and_mismatched_are_refused_then_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = solved_net("min_max")
    smaller = torch_ext.prepare_qat(_float(source), mapping={"": config("min_max"), "fc": None})
    wider = TinyNet()
    wider.conv1 = nn.Conv2d(1, 4, 3, padding=1)
    wider.fc = nn.Linear(4, 5)
    wider = torch_ext.prepare_qat(wider, mapping={"": config("min_max")})
    cases = [(source, smaller, "unexpected"), (smaller, source, "missing"),
             (source, wider, "mismatched")]  # fmt: skip
    set_fake_quantize(smaller, "qat")
    smaller(images())
    for one, other, label in cases:
        before = snapshot(other)
        with pytest.raises(ValueError, match="check the qconfigs") as caught:
            load_observer_params(one, other)
        assert f"{label}: fc.parametrizations.weight.0" in str(caught.value)
        assert same(snapshot(other), before)
        assert capsys.readouterr().out == ""
        report = load_observer_params(one, other, strict=False)
        assert "fc.parametrizations.weight.0" in getattr(report, label)
        assert not report.complete
        assert "conv1.input_quantizers.input" in report.loaded
        assert f"{label}: fc.parametrizations.weight.0" in capsys.readouterr().out
        assert not same(snapshot(other), before) or label == "missing"


def _float(model: TinyNet) -> TinyNet:
    plain = TinyNet()
    plain.load_state_dict(torch_ext.float_state_dict(model))
    return plain


def test_weights_come_along_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    with torch.no_grad():
        source.fc.parametrizations.weight.original.add_(1)
        source.bn1.running_mean.add_(1)
    before = target.fc.parametrizations.weight.original.clone()
    load_observer_params(source, target)
    assert torch.equal(target.fc.parametrizations.weight.original, before)
    report = load_observer_params(source, target, weights=True)
    assert capsys.readouterr().out.endswith(f"{report}\n")
    assert "float tensors: fc.weight" in report.text(loaded=True)
    assert "float tensors: fc.weight" not in str(report)
    assert load_observer_params(source, target, verbose=False).loaded == report.loaded
    assert capsys.readouterr().out == ""
    assert "bn1.running_mean" in report.weights
    set_fake_quantize(target, "validation")
    assert same_bits(target(images()).detach(), source(images()).detach())


def test_nothing_to_load_is_an_error() -> None:
    source, target = prepared(config("min_max")), prepared(config("min_max"))
    set_fake_quantize(source, "calibration")
    source(images())
    with pytest.raises(ValueError, match="expected from_model to have ranges, got none in"):
        load_observer_params(source, target)
    with pytest.raises(ValueError, match="model to have quantizers, got none"):
        load_observer_params(TinyNet(), target)
    with pytest.raises(TypeError, match="from_model to be a model or a file, got 3"):
        load_observer_params(3, target)  # type: ignore[arg-type]


def test_quantizers_without_a_range_are_reported() -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    source.fc.input_quantizers.input.reset_parameters()
    report = load_observer_params(source, target)
    assert report.unsolved == ["fc.input_quantizers.input"]
    assert not bool(target.fc.input_quantizers.input.solved)


def test_loading_into_validation_ends_passing_through() -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    set_fake_quantize(target, "validation", allow_unobserved=True)
    load_observer_params(source, target)
    assert not any(q.passes_through for q in named_quantizers(target).values())
    assert same_bits(target(images()).detach(), source(images()).detach())


def test_compiled_and_parallel_wrappers_have_the_same_names() -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    wrapped = nn.DataParallel(torch.compile(source, backend="eager"))  # type: ignore[arg-type]
    assert load_observer_params(wrapped, target).complete


@pytest.mark.parametrize("rule", ["floor", "even"])
def test_files_with_two_roundings_to_powers_of_two_are_read(rule: Literal["floor", "even"]) -> None:
    """Quantizers refuse both together; of earlier files the rule holds, as it did in them."""
    quantizer = FakeQuantize(dtype="float8_e4m3", scale_rule=rule)
    quantizer.state = "calibration"  # type: ignore[assignment]
    quantizer(images())
    quantizer.state = "validation"  # type: ignore[assignment]
    spec = spec_of(quantizer) | {"power_of_two": True}
    params = params_from({field: quantizer.get_buffer(field) for field in FIELDS}, spec)
    assert (params.scale_rule, params.power_of_two) == (rule, False)
    assert spec_of(quantizer_of(params)) == spec_of(quantizer)
