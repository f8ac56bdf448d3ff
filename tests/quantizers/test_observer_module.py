"""The Observer module: its buffers, rules, keys, and what moves and copies do to it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import torch_ext
from snapshots import same, same_bits, snapshot
from torch_ext import Observer, ops

RULES = torch_ext.observers()


pytestmark = pytest.mark.usefixtures("one_thread")


def data(count: int = 1000) -> torch.Tensor:
    return torch.randn(count)


@pytest.mark.parametrize("rule", RULES)
def test_forward_returns_its_input_and_range_is_the_ops(rule: str) -> None:
    observer = Observer(rule)
    x = data()
    assert observer(x) is x
    want = ops.solve(rule, observer.extrema, observer.tally, observer.counts, -128, 127, True)
    assert same_bits(observer.range(), want)
    scale, zero_point = observer.calculate_qparams()
    if rule == "fixed_scale":
        assert scale.tolist() == [1.0]
    else:
        assert same_bits(scale, ops.qparams(want, -128, 127, True)[0])
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ch_axis", [-1, 1])
def test_parts_in_any_order_merge_to_the_whole(rule: str, ch_axis: int) -> None:
    keys: dict[str, Any] = {}
    if ch_axis >= 0:
        keys = {"qscheme": torch.per_channel_symmetric, "ch_axis": 1, "channel_len": 3}
    x = torch.randn(40, 3) * torch.tensor([1.0, 50.0, 1e-3])
    whole, left, right = (Observer(rule, **keys) for _ in range(3))
    whole(x)
    right(x[25:])
    right(x[:7])
    left(x[7:25])
    assert left.merge_(right) is left
    assert same(snapshot(left), snapshot(whole))
    assert same_bits(left.range(), whole.range())


def test_reset_forgets() -> None:
    observer = Observer("kl")
    fresh = snapshot(observer)
    observer(data())
    assert not same(snapshot(observer), fresh)
    assert same(snapshot(observer.reset_()), fresh)


def test_nothing_observed_is_scale_one_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"Observer\(percentile\): no finite value was observed"):
        scale, zero_point = Observer("percentile").calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({"name": "percentile"}, (1, 2, 16, 1024)),
        ({"name": "min_max"}, (1, 2, 0, 0)),
        ({"name": "min_max", "histogram": True}, (1, 2, 16, 1024)),
        ({"name": "percentile", "transient": True}, (1, 2, 0, 0)),
        ({"name": "mse", "mantissa_bits": 6, "octaves": 20}, (1, 2, 20, 64)),
        (
            {
                "name": "mse",
                "qscheme": "per_channel_affine",
                "ch_axis": 0,
                "channel_len": 5,
            },
            (5, 2, 12, 128),
        ),
    ],
)
def test_buffers_have_their_shape_from_the_start(
    keys: dict[str, Any], shape: tuple[int, ...]
) -> None:
    observer = Observer(**keys)
    assert observer.counts.shape == shape
    assert observer.counts.dtype == observer.tally.dtype == torch.int64
    assert observer.extrema.shape == (shape[0], 2)
    assert observer.tally.shape == (shape[0], 5)


@pytest.mark.parametrize("move", ["half", "double", "bfloat16"])
def test_a_change_of_dtype_leaves_statistics_alone(move: str) -> None:
    observer = Observer("kl")
    observer(data())
    before = snapshot(observer)
    assert same(snapshot(getattr(observer, move)()), before)


def test_a_change_of_device_moves_statistics() -> None:
    observer = Observer("kl").half().to("meta")
    assert {b.device.type for b in observer.buffers()} == {"meta"}
    assert observer.extrema.dtype == torch.float32


def test_deferred_initialisation_starts_empty() -> None:
    with torch.device("meta"):
        observer = Observer("kl")
    observer.to_empty(device="cpu")
    observer.reset_parameters()
    assert same(snapshot(observer), snapshot(Observer("kl")))


def test_copies_and_saved_states_are_equal() -> None:
    observer = Observer("percentile", percentile=90.0)
    observer(data())
    loaded = Observer("percentile", percentile=90.0)
    loaded.load_state_dict(observer.state_dict())
    for other in (copy.deepcopy(observer), pickle.loads(pickle.dumps(observer)), loaded):
        assert same(snapshot(other), snapshot(observer))
        assert same_bits(other.range(), observer.range())
        other(data(5) + 100)
        assert int(observer.tally[0, 0]) == 1000


def test_another_rule_on_the_same_statistic() -> None:
    x = data()
    observer, plain = Observer("min_max", histogram=True), Observer("percentile", percentile=50.0)
    for one in (observer, plain):
        one(x)
    wide = observer.range()
    observer.set_rule("percentile", percentile=50.0)
    assert observer.options == {"percentile": 50.0}
    assert same_bits(observer.range(), plain.range())
    assert float(observer.range().abs().max()) < float(wide.abs().max()) / 2


def test_a_refused_rule_changes_nothing() -> None:
    observer = Observer("percentile", percentile=90.0)
    for rule, options in [("kl", {"variant": "best"}), ("clip", {"xmin": 2.0}), ("none", {})]:
        with pytest.raises((ValueError, RuntimeError)):
            observer.set_rule(rule, **options)
        assert (observer.name, observer.options) == ("percentile", {"percentile": 90.0})
        assert observer.encoded_options == (90.0,)


def test_transient_has_no_range_of_its_own() -> None:
    observer = Observer("kl", transient=True)
    observer(data())
    with pytest.raises(RuntimeError, match="expected a histogram, got none"):
        observer.range()


@pytest.mark.parametrize(
    ("dtype", "name", "low", "high"),
    [
        (torch.int8, torch.int8, -128, 127),
        ("qint8", torch.int8, -128, 127),
        (torch.qint8, torch.int8, -128, 127),
        ("torch.int8", torch.int8, -128, 127),
        ("quint8", torch.uint8, 0, 255),
        ("int4", "int4", -8, 7),
        ("quint4", "uint4", 0, 15),
        ("qint16", torch.int16, -32768, 32767),
        (torch.uint16, torch.uint16, 0, 65535),
        ("int2", "int2", -2, 1),
    ],
)
def test_dtypes(dtype: Any, name: Any, low: int, high: int) -> None:
    observer = Observer("min_max", dtype)
    assert (observer.dtype, observer.quant_min, observer.quant_max) == (name, low, high)


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"name": "histogram"}, ValueError, 'unknown observer "histogram"; known: min_max'),
        ({"name": None}, ValueError, "unknown observer None; known: min_max"),
        ({"dtype": "int17"}, ValueError, "unknown dtype 'int17'; known: int4"),
        ({"dtype": torch.float32}, ValueError, "unknown dtype torch.float32"),
        ({"dtype": "int32"}, ValueError, "unknown dtype 'int32'"),
        ({"dtype": "int1"}, ValueError, "unknown dtype 'int1'"),
        ({"qscheme": "per_row"}, ValueError, "unknown qscheme 'per_row'; known: per_tensor"),
        ({"qscheme": torch.per_channel_affine}, ValueError, "ch_axis to be 0 or more"),
        ({"ch_axis": 0}, ValueError, "ch_axis to be -1 with per_tensor_symmetric, got 0"),
        ({"ch_axis": -2}, ValueError, "ch_axis to be between -1 and 63, got -2"),
        ({"ch_axis": 0.5}, TypeError, "ch_axis to be an integer, got 0.5"),
        ({"channel_len": 3}, ValueError, "channel_len to be 1 with per_tensor_symmetric"),
        ({"channel_len": 0}, ValueError, "channel_len to be between 1 and"),
        ({"quant_min": -129}, ValueError, "quant_min to be between -128 and 127, got -129"),
        ({"quant_max": 128}, ValueError, "quant_max to be between -128 and 127, got 128"),
        ({"quant_min": 1}, ValueError, "quant_min <= 0 <= quant_max, got 1 and 127"),
        ({"quant_min": 0, "quant_max": 0}, ValueError, "quant_min < quant_max"),
        ({"quant_max": True}, TypeError, "quant_max to be an integer, got True"),
        ({"scale_rule": "max"}, ValueError, "unknown scale_rule 'max'; known: grid, tvm"),
        (
            {"scale_rule": "floor", "power_of_two": True},
            ValueError,
            "expected power_of_two to be False with scale_rule=floor, got True",
        ),
        (
            {"scale_rule": "even", "power_of_two": True, "dtype": "float8_e4m3"},
            ValueError,
            "expected power_of_two to be False with scale_rule=even, got True",
        ),
        ({"power_of_two": 1}, TypeError, "power_of_two to be True or False, got 1"),
        ({"mantissa_bits": 11}, ValueError, "mantissa_bits to be between 5 and 10, got 11"),
        ({"octaves": 3}, ValueError, "octaves to be between 4 and 32, got 3"),
        ({"transient": True, "histogram": True}, ValueError, "histogram to be False"),
        ({"percentil": 99.0}, ValueError, 'unknown key "percentil"; known: dtype, qscheme'),
        ({"percentile": 0}, ValueError, "percentile to be between 1e-07 and 100, got 0"),
        ({"percentile": float("nan")}, ValueError, "percentile to be between"),
        ({"percentile": "high"}, TypeError, "percentile to be a number, got 'high'"),
        ({"percentile": True}, TypeError, "percentile to be a number, got True"),
        (
            {"name": "kl", "variant": "best"},
            ValueError,
            'unknown variant "best"; known: log_linear',
        ),
        ({"name": "kl", "variant": 1}, TypeError, "variant to be one of log_linear"),
        ({"name": "kl", "dtype": "int16"}, RuntimeError, "8 bits"),
        ({"name": "clip", "xmin": 2.0, "xmax": 1.0}, RuntimeError, "xmin"),
        ({"name": "fixed_scale", "scale": 0.0}, ValueError, "scale to be between"),
        ({"name": "fixed_scale", "zero_point": 3}, RuntimeError, "zero_point"),
    ],
)
def test_bad_keys_are_refused_by_name(
    keys: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        Observer(**({"name": "percentile"} | keys))
    assert text in str(caught.value)


def test_merge_refuses_what_does_not_fit() -> None:
    observer = Observer("kl")
    observer(data())
    before = snapshot(observer)
    channels = {"qscheme": "per_channel_symmetric", "channel_len": 2}
    with pytest.raises(TypeError, match="other to be an Observer, got Tensor"):
        observer.merge_(data())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"other.counts to be \(1, 2, 16, 1024\), got"):
        observer.merge_(Observer("min_max"))
    with pytest.raises(ValueError, match=r"other\.extrema"):
        observer.merge_(Observer("kl", ch_axis=0, **channels))
    with pytest.raises(ValueError, match=r"other\.ch_axis to be 0, got 1"):
        Observer("kl", ch_axis=0, **channels).merge_(Observer("kl", ch_axis=1, **channels))
    assert same(snapshot(observer), before)


def test_options_cannot_be_changed_from_outside() -> None:
    observer = Observer("percentile")
    observer.options["percentile"] = 1.0
    assert observer.options == {"percentile": 99.99}


def test_repr_says_what_it_is() -> None:
    text = repr(Observer("percentile", "uint4", percentile=99.0))
    assert text == "Observer(percentile, uint4, per_tensor_symmetric, [0, 15], percentile=99.0)"


def test_grid_text_follows_its_parts() -> None:
    """It is made when a part of the grid changes, however it changes, not at each forward."""
    observer = Observer("min_max")
    assert observer.grid_text == "[-128,127] symmetric"
    assert observer.grid_text is observer.grid_text
    observer.quant_min = -127
    assert observer.grid_text == "[-127,127] symmetric"
    observer.qscheme = torch.per_tensor_affine
    observer.power_of_two = True
    assert observer.grid_text == "[-127,127] affine power_of_two"
    restore = observer.kept_settings()
    observer.set_grid(Observer("min_max", dtype="float8_e4m3").grid, "even")
    assert observer.grid_text == "float8_e4m3 symmetric scale_rule=even"
    assert copy.deepcopy(observer).grid_text == observer.grid_text
    restore()
    assert observer.grid_text == "[-127,127] affine power_of_two"
