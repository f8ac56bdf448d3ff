"""QConfig and the default configurations by name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch

import torch_ext
from torch_ext import FakeQuantize, QConfig, get_default_calib_qconfig, get_default_qconfig

RULES = torch_ext.observers()


def test_defaults() -> None:
    config = get_default_qconfig()
    assert config.activation is not None
    assert config.weight is not None
    activation, weight = config.activation(), config.weight()
    assert activation.observer.name == weight.observer.name == "min_max"
    assert activation.observer.dtype == weight.observer.dtype == torch.int8
    assert activation.observer.qscheme == torch.per_tensor_symmetric
    assert weight.observer.qscheme == torch.per_channel_symmetric
    assert (activation.observer.ch_axis, weight.observer.ch_axis) == (-1, 0)
    assert (activation.averaging_constant, weight.averaging_constant) == (0.01, 1.0)
    assert (activation.transient, weight.transient) == (False, True)


def test_a_factory_makes_a_new_quantizer_each_time() -> None:
    config = get_default_qconfig()
    assert config.activation is not None
    assert config.activation() is not config.activation()


def test_calibration_default_keeps_a_histogram() -> None:
    config = get_default_calib_qconfig()
    assert config.activation is not None
    observer = config.activation().observer
    assert (observer.name, observer.options) == ("percentile", {"percentile": 99.99})
    assert observer.has_histogram


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_both_sides(rule: str) -> None:
    config = get_default_qconfig(activation_observer=rule, weight_observer=rule)
    assert config.activation is not None
    assert config.weight is not None
    assert config.activation().observer.name == config.weight().observer.name == rule


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("percentile", {"percentile": 99.9, "averaging_constant": 0.5}),
        ("clip_std", {"std_scale": 2.5}),
        ("clip", {"xmin": -2.0, "xmax": 3.0}),
        ("fixed_scale", {"scale": 0.5, "zero_point": 0}),
        ("min_max", {"dtype": "quint4", "qscheme": torch.per_tensor_affine}),
        ("min_max", {"quant_min": -127, "quant_max": 127, "ch_axis": -1, "channel_len": 1}),
        ("mse", {"qscheme": torch.per_channel_symmetric, "ch_axis": 1, "channel_len": 7}),
    ],
)
def test_keys_of_one_flat_mapping(rule: str, keys: dict[str, Any]) -> None:
    given = dict(keys)
    config = get_default_qconfig(activation_observer=rule, activation_qkwargs=given)
    assert given == keys
    assert config.activation is not None
    made = config.activation()
    plain = FakeQuantize("fake_quant", rule, **keys)
    assert repr(made) == repr(plain)
    assert made.averaging_constant == keys.get("averaging_constant", 0.01)


def test_the_argument_is_read_only() -> None:
    empty: dict[str, Any] = {}
    get_default_qconfig(weight_qkwargs=empty, activation_qkwargs=empty)
    assert empty == {}


def test_weights_per_tensor_have_no_axis() -> None:
    for scheme in (torch.per_tensor_symmetric, "per_tensor_affine"):
        config = get_default_qconfig(weight_qkwargs={"qscheme": scheme})
        assert config.weight is not None
        assert config.weight().observer.ch_axis == -1


def test_none_leaves_a_side_float() -> None:
    config = get_default_qconfig(activation_fake_quant=None, activation_observer=None)
    assert config.activation is None
    assert config.weight is not None
    assert get_default_qconfig(weight_fake_quant=None).weight is None


@pytest.mark.parametrize("key", ["bins", "stride", "update_interval"])
def test_keys_without_meaning_here_are_ignored_aloud(key: str) -> None:
    with pytest.warns(UserWarning, match=f"activation_qkwargs: {key} is ignored, as") as caught:
        get_default_calib_qconfig(activation_qkwargs={key: 2048})
    assert caught[0].filename == __file__


def test_no_warnings_otherwise() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_default_qconfig()
        get_default_calib_qconfig(activation_qkwargs={"percentile": 99.0})


WHO = "get_default_qconfig: "


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"activation_observer": "entropy"}, ValueError, f'{WHO}unknown observer "entropy"; known'),
        ({"weight_fake_quant": "dorefa"}, ValueError, f'{WHO}unknown fake-quant "dorefa"; known'),
        (
            {"activation_qkwargs": {"bin": 1}},
            ValueError,
            f'{WHO}activation_qkwargs: unknown key "bin"',
        ),
        (
            {"weight_qkwargs": {"std_scale": 1}},
            ValueError,
            f'{WHO}weight_qkwargs: unknown key "std_sc',
        ),
        ({"activation_qkwargs": {"dtype": "f8"}}, ValueError, "unknown dtype 'f8'"),
        (
            {"activation_qkwargs": [1]},
            TypeError,
            f"{WHO}expected activation_qkwargs to be a mapping, got [1]",
        ),
        (
            {"activation_observer": None},
            ValueError,
            f"{WHO}expected activation_observer to be a name",
        ),
        (
            {"weight_fake_quant": None, "weight_qkwargs": {"dtype": "int4"}},
            ValueError,
            f"{WHO}expected weight_qkwargs to be empty with weight_fake_quant=None, got dtype",
        ),
        (
            {"activation_observer": "kl", "activation_qkwargs": {"dtype": "int16"}},
            RuntimeError,
            "8 bits",
        ),
        (
            {"activation_qkwargs": {"quant_min": 1}},
            ValueError,
            "quant_min <= 0 <= quant_max, got 1 and 127",
        ),
    ],
)
def test_wrong_names_and_values_fail_at_once(
    arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        get_default_qconfig(**arguments)
    assert text in str(caught.value)


def test_an_instance_is_no_factory() -> None:
    for bad in (FakeQuantize(), torch_ext.Observer("min_max")):
        with pytest.raises(ValueError, match=f"activation to be a factory.*{type(bad).__name__}"):
            QConfig(activation=bad, weight=None)
    with pytest.raises(TypeError, match="weight to be a factory or None, got 'min_max'"):
        QConfig(activation=None, weight="min_max")  # type: ignore[arg-type]


def test_own_factories_and_classes_are_welcome() -> None:
    config = QConfig(activation=FakeQuantize, weight=functools.partial(FakeQuantize, observer="kl"))
    assert config.activation is not None
    assert config.activation(observer="mse").observer.name == "mse"


def test_a_config_is_a_value() -> None:
    config = get_default_qconfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight = None  # type: ignore[misc]
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert repr(other.weight()) == repr(config.weight())  # type: ignore[misc]
