"""resolve: other rules and options on one pass of data."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import torch_ext
from nets.tiny_net import ACTIVATIONS, WEIGHTS, TinyNet, calibrated, images, prepared, tiny_net
from snapshots import same, same_bits, snapshot
from torch_ext import get_default_qconfig, named_quantizers, resolve, set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = torch_ext.observers()
OPTIONS: dict[str, dict[str, Any]] = {
    "percentile": {"percentile": 90.0},
    "clip": {"xmin": -0.25, "xmax": 0.5},
    "clip_std": {"std_scale": 1.5},
    "kl": {"variant": "slides"},
    "fixed_scale": {"scale": 0.125},
}


def config(rule: str, weight_rule: str = "min_max", **keys: Any) -> torch_ext.QConfig:
    return get_default_qconfig(
        activation_observer=rule, weight_observer=weight_rule, activation_qkwargs=keys
    )


def ranges(net: TinyNet, names: list[str]) -> dict[str, torch.Tensor]:
    quantizers = named_quantizers(net)
    return {
        f"{name}.{field}": quantizers[name].get_buffer(field)
        for name in names
        for field in ("range", "scale", "zero_point", "solved")
    }


@pytest.mark.parametrize(("first", "then"), list(itertools.permutations(RULES, 2)))
def test_one_pass_serves_every_rule(first: str, then: str) -> None:
    """Solved again is as if calibrated with that rule from the start, back and forth."""
    net = calibrated(config("percentile"))
    resolve(net, activation_observer=first)
    resolve(net, activation_observer=then, **OPTIONS.get(then, {}))
    want = calibrated(config(then, **OPTIONS.get(then, {})))
    assert same(ranges(net, ACTIVATIONS + WEIGHTS), ranges(want, ACTIVATIONS + WEIGHTS))
    assert same_bits(net(images()).detach(), want(images()).detach())


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_read_again(rule: str) -> None:
    net = calibrated(config("percentile"))
    activations = {k: v.clone() for k, v in ranges(net, ACTIVATIONS).items()}
    resolve(net, weight_observer=rule)
    want = calibrated(config("percentile", rule))
    assert same(ranges(net, WEIGHTS), ranges(want, WEIGHTS))
    assert same(ranges(net, ACTIVATIONS), activations)


def test_options_alone_keep_the_rule_and_what_was_set_before() -> None:
    net = calibrated(config("clip", xmin=-0.25))
    resolve(net, xmax=0.125)
    assert net.conv1.input_quantizers.input.observer.options == {"xmin": -0.25, "xmax": 0.125}
    assert net.conv1.input_quantizers.input.range.tolist() == [[-0.25, 0.125]]
    resolve(net, activation_observer="clip", xmax=0.5)
    assert net.conv1.input_quantizers.input.range.tolist() == [[-0.25, 0.5]]


def test_an_option_goes_to_the_side_that_has_it() -> None:
    net = calibrated(config("percentile", "percentile"))
    resolve(net, activation_observer="clip_std", weight_observer="percentile", percentile=50.0)
    assert net.fc.input_quantizers.input.observer.options == {"std_scale": 3.0}
    assert net.fc.parametrizations.weight[0].observer.options == {"percentile": 50.0}
    resolve(net, "percentile", "percentile", percentile=80.0)
    for name in (ACTIVATIONS[0], WEIGHTS[0]):
        assert named_quantizers(net)[name].observer.options == {"percentile": 80.0}


def test_a_pattern_limits_it() -> None:
    net = calibrated(config("percentile"))
    before = snapshot(net)
    resolve(net, activation_observer="mse", pattern="fc.*")
    after = snapshot(net)
    changed = {key.split(".")[0] for key in after if not same({0: after[key]}, {0: before[key]})}  # type: ignore[dict-item]
    assert changed == {"fc"}


@pytest.mark.parametrize("state", ["calibration", "qat", "float"])
def test_states_and_statistics_stay(state: str) -> None:
    net = calibrated(config("percentile"))
    set_fake_quantize(net, state)
    before = snapshot(net)
    resolve(net, activation_observer="mse")
    after = snapshot(net)
    for key in before:
        if ".observer." in key or key.endswith((".state", ".training")):
            assert same({key: before[key]}, {key: after[key]}), key
    assert after["fc.input_quantizers.input.rule"] == ("mse", {})


def test_calibrating_on_uses_the_new_rule() -> None:
    net = calibrated(config("percentile"))
    resolve(net, activation_observer="mse")
    set_fake_quantize(net, "calibration")
    with torch.no_grad():
        net(images(seed=9))
    set_fake_quantize(net, "validation")
    quantizer = net.fc.input_quantizers.input
    assert same_bits(quantizer.range, quantizer.observer.range())
    assert int(quantizer.observer.tally[0, 0]) == 2 * 24


def test_given_scales_and_quantizers_without_data_stay() -> None:
    net = prepared(
        config("percentile"),
        input_qconfig=config("fixed_scale", scale=0.25),
        mapping={"fc": config("percentile")},
    )
    set_fake_quantize(net, "calibration")
    net.conv1(images())
    set_fake_quantize(net, "validation", allow_unobserved=True)
    before = snapshot(net)
    resolve(net, activation_observer="mse")
    after = snapshot(net)
    for name in ("input_quantizers.x", "fc.input_quantizers.input"):
        assert after[f"{name}.rule"] == before[f"{name}.rule"]
        assert same_bits(after[f"{name}.scale"], before[f"{name}.scale"])
    assert after["conv1.input_quantizers.input.rule"] == ("mse", {})


def test_a_histogram_that_was_not_kept_is_missed_by_name() -> None:
    net = calibrated(config("min_max"))
    before = snapshot(net)
    with pytest.raises(ValueError, match="mse reads a histogram, but none was kept") as caught:
        resolve(net, activation_observer="mse")
    assert all(name in str(caught.value) for name in ACTIVATIONS)
    assert "histogram=True" in str(caught.value)
    assert same(snapshot(net), before)
    resolve(net, activation_observer="clip")

    net = calibrated(config("min_max", histogram=True))
    resolve(net, activation_observer="mse")
    assert same(ranges(net, ACTIVATIONS), ranges(calibrated(config("mse")), ACTIVATIONS))


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"activation_observer": "best"}, ValueError, 'unknown observer "best"; known: min_max'),
        (
            {"activation_observer": "kl", "percentile": 9.0},
            ValueError,
            'unknown option "percentile" of kl; known: variant',
        ),
        ({"std_scale": 2.0}, ValueError, 'unknown option "std_scale" of percentile, min_max'),
        (
            {"activation_observer": "percentile", "percentile": 101.0},
            ValueError,
            "percentile to be between",
        ),
        ({"activation_observer": "clip", "xmin": 3.0}, RuntimeError, "xmin"),
        ({"activation_observer": "mse", "pattern": "x*"}, ValueError, 'matches pattern "x*"'),
        (
            {"weight_observer": "mse", "pattern": "add.*"},
            ValueError,
            "expected quantizers that saw data, found none",
        ),
    ],
)
def test_bad_arguments_change_nothing(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    net = calibrated(config("percentile"))
    before = snapshot(net)
    with pytest.raises(kind) as caught:
        resolve(net, **arguments)
    assert text in str(caught.value)
    assert same(snapshot(net), before)


def test_a_failing_solve_puts_the_rules_back(monkeypatch: pytest.MonkeyPatch) -> None:
    net = calibrated(config("percentile"))
    before = snapshot(net)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("torch_ext.quantizers.solve.solve_observers", fail)
    with pytest.raises(MemoryError):
        resolve(net, activation_observer="mse", weight_observer="kl")
    assert same(snapshot(net), before)


def test_a_grid_that_is_too_wide_is_named() -> None:
    net = prepared(config("percentile"), mapping={"fc": config("percentile", dtype="int16")})
    set_fake_quantize(net, "calibration")
    net(images())
    set_fake_quantize(net, "validation")
    with pytest.raises(RuntimeError, match=r"fc\.input_quantizers\.input: .*8 bits"):
        resolve(net, activation_observer="kl")
    assert net.conv1.input_quantizers.input.observer.name == "percentile"


def test_models_without_data_are_refused() -> None:
    only = get_default_qconfig(weight_fake_quant=None)
    with pytest.raises(ValueError, match="quantizers that saw data, found none; calibrate first"):
        resolve(prepared(only), activation_observer="min_max")
    with pytest.raises(ValueError, match="model to have quantizers, got none"):
        resolve(tiny_net(), activation_observer="min_max")
