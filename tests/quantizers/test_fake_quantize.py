"""The quantizer module: what it does in each state, its moving average, and its buffers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_ext
from snapshots import same, same_bits, snapshot
from torch_ext import FakeQuantize, FakeQuantState, ops

RULES = [rule for rule in torch_ext.observers() if rule != "fixed_scale"]


pytestmark = pytest.mark.usefixtures("one_thread")


def in_state(state: FakeQuantState, **keys: Any) -> FakeQuantize:
    quantizer = FakeQuantize(**keys)
    quantizer.enter(state)
    return quantizer


def test_a_new_quantizer_passes_through() -> None:
    quantizer = FakeQuantize()
    before = snapshot(quantizer)
    x = torch.randn(5)
    assert quantizer(x) is x
    assert quantizer.state is FakeQuantState.FLOAT
    assert same(snapshot(quantizer), before)
    assert (quantizer.scale.tolist(), quantizer.zero_point.tolist()) == ([1.0], [0])
    assert (quantizer.range.tolist(), quantizer.solved.tolist()) == ([[0.0, 0.0]], [0])


def test_calibration_adds_to_the_statistic_and_to_nothing_else() -> None:
    quantizer = in_state(FakeQuantState.CALIBRATION, observer="kl")
    before = snapshot(quantizer)
    x = torch.randn(50)
    assert quantizer(x) is x
    after = snapshot(quantizer)
    changed = {key for key in after if not same({key: after[key]}, {key: before[key]})}
    assert changed == {"observer.extrema", "observer.tally", "observer.counts"}
    assert int(quantizer.observer.tally[0, 0]) == 50


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scheme", ["per_tensor_symmetric", "per_channel_affine"])
def test_qat_follows_then_quantizes(rule: str, scheme: str) -> None:
    keys: dict[str, Any] = {"observer": rule, "averaging_constant": 0.25}
    if scheme == "per_channel_affine":
        keys |= {"qscheme": scheme, "ch_axis": 1, "channel_len": 3}
    quantizer = in_state(FakeQuantState.QAT, **keys)
    observer = quantizer.observer
    channels = observer.channel_len
    range_, scale = torch.zeros(channels, 2), torch.ones(channels)
    zero_point = torch.zeros(channels, dtype=torch.int32)
    solved = torch.zeros(1, dtype=torch.uint8)
    for _ in range(3):
        x = torch.randn(20, 3)
        out = quantizer(x)
        ops.follow_(
            x, range_, scale, zero_point, solved, 0.25, rule, -128, 127, observer.symmetric,
            ch_axis=observer.ch_axis,
            mantissa_bits=7 if channels > 1 else 10,
            octaves=12 if channels > 1 else 16,
        )  # fmt: skip
        assert same_bits(quantizer.range, range_)
        assert same_bits(quantizer.scale, scale)
        assert same_bits(quantizer.zero_point, zero_point)
        want = ops.fake_quant(x, scale, zero_point, -128, 127, observer.ch_axis)
        assert same_bits(out, want)
    assert int(quantizer.observer.tally.sum()) == 0  # the statistic is calibration's alone


def test_moving_average_of_three_batches() -> None:
    quantizer = in_state(FakeQuantState.QAT, observer="min_max", averaging_constant=0.01)
    for low, high in [(-1.0, 2.0), (-3.0, 1.0), (-1.0, 4.0)]:
        quantizer(torch.tensor([low, high]))
    assert quantizer.range[0].tolist() == pytest.approx([-1.0198, 2.0101], rel=1e-6)
    assert float(quantizer.scale) == pytest.approx(2.0101 / 127.5, rel=1e-6)


@pytest.mark.parametrize(("constant", "want"), [(0.0, [-1.0, 2.0]), (1.0, [-3.0, 1.0])])
def test_constants_that_freeze_and_that_forget(constant: float, want: list[float]) -> None:
    quantizer = in_state(FakeQuantState.QAT, averaging_constant=constant)
    for low, high in [(-1.0, 2.0), (-3.0, 1.0)]:
        quantizer(torch.tensor([low, high]))
    assert quantizer.range[0].tolist() == want


def test_validation_changes_nothing() -> None:
    quantizer = in_state(FakeQuantState.QAT, observer="percentile")
    quantizer(torch.randn(100))
    quantizer.enter(FakeQuantState.VALIDATION)
    before = snapshot(quantizer)
    x = torch.randn(100) * 10
    out = quantizer(x)
    want = ops.fake_quant(x, quantizer.scale, quantizer.zero_point, -128, 127)
    assert same_bits(out, want)
    assert same_bits(quantizer(x), out)
    assert same(snapshot(quantizer), before)


def test_given_scale_stays_in_every_state() -> None:
    quantizer = FakeQuantize(observer="fixed_scale", scale=0.25)
    assert quantizer.range.tolist() == [[-32.0, 31.75]]
    before = snapshot(quantizer)
    x = torch.tensor([0.3, 100.0])
    for state in FakeQuantState:
        quantizer.state = state
        out = quantizer(x)
        quantizes = state in (FakeQuantState.QAT, FakeQuantState.VALIDATION)
        assert out.tolist() == ([0.25, 31.75] if quantizes else x.tolist())
    quantizer.state = FakeQuantState.FLOAT
    assert same(snapshot(quantizer), before)


def test_gradient_passes_inside_the_grid_only() -> None:
    quantizer = FakeQuantize(observer="fixed_scale", scale=1.0)
    quantizer.enter(FakeQuantState.QAT)
    x = torch.tensor([-129.0, -128.0, 0.0, 127.0, 128.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    quantizer = in_state(FakeQuantState.QAT, observer="percentile").to(dtype)
    out = quantizer(torch.randn(100).to(dtype))
    assert out.dtype == dtype
    assert quantizer.scale.dtype == quantizer.range.dtype == torch.float32
    assert quantizer.zero_point.dtype == torch.int32


def test_autocast_reaches_the_quantizer() -> None:
    layer, quantizer = torch.nn.Linear(4, 4), in_state(FakeQuantState.QAT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(layer(torch.randn(2, 4)))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert quantizer.scale.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("state", [FakeQuantState.CALIBRATION, FakeQuantState.QAT])
def test_activation_checkpointing_observes_once(state: FakeQuantState, use_reentrant: bool) -> None:
    quantizer, plain = (in_state(state, observer="percentile") for _ in range(2))
    layer = torch.nn.Linear(4, 4)
    for _ in range(2):
        x = torch.randn(8, 4, requires_grad=True)
        plain(layer(x))
        out = checkpoint(lambda x: quantizer(layer(x)), x, use_reentrant=use_reentrant)
        out.sum().backward()
    assert same(snapshot(quantizer), snapshot(plain))


def test_state_can_be_set_on_one_quantizer() -> None:
    quantizer = FakeQuantize(observer="percentile")
    quantizer.state = "calibration"
    quantizer(torch.randn(100))
    quantizer.state = FakeQuantState.VALIDATION
    assert quantizer.solved.tolist() == [1]
    assert same_bits(quantizer.range, quantizer.observer.range())
    with pytest.raises(ValueError, match="unknown state 'train'; known: calibration, qat"):
        quantizer.state = "train"
    assert quantizer.state is FakeQuantState.VALIDATION


def test_copies_keep_state_and_are_apart() -> None:
    quantizer = in_state(FakeQuantState.QAT)
    quantizer(torch.randn(9))
    before = snapshot(quantizer)
    twin = copy.deepcopy(quantizer)
    assert same(snapshot(twin), before)
    twin(torch.randn(9) * 5)
    assert same(snapshot(quantizer), before)


def test_loading_no_range_into_validation_is_an_error() -> None:
    quantizer = in_state(FakeQuantState.QAT)
    quantizer(torch.randn(9))
    quantizer.enter(FakeQuantState.VALIDATION)
    with pytest.raises(RuntimeError, match="loaded without a range while in VALIDATION"):
        quantizer.load_state_dict(FakeQuantize().state_dict())


def test_loading_a_range_ends_passing_through() -> None:
    source = in_state(FakeQuantState.QAT)
    x = torch.randn(9)
    want = source(x)
    quantizer = FakeQuantize()
    quantizer.enter(FakeQuantState.VALIDATION, pass_through=True)
    assert quantizer(x) is x
    quantizer.load_state_dict(source.state_dict())
    assert not quantizer.passes_through
    assert same_bits(quantizer(x), want)


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"method": "lsqq"}, ValueError, 'unknown fake-quant "lsqq"; known: fake_quant'),
        ({"method": None}, ValueError, "unknown fake-quant None"),
        ({"observer": "entropy"}, ValueError, 'unknown observer "entropy"; known: min_max'),
        ({"averaging_constant": 1.5}, ValueError, "averaging_constant to be between 0 and 1"),
        ({"averaging_constant": float("nan")}, ValueError, "averaging_constant"),
        ({"averaging_constant": "fast"}, TypeError, "averaging_constant to be a number"),
        ({"optional": 1}, TypeError, "optional to be True or False"),
        ({"bits": 8}, ValueError, 'unknown key "bits"; known: averaging_constant, optional, use'),
        ({"percentile": 99.0}, ValueError, 'unknown key "percentile"'),
    ],
)
def test_bad_keys_are_refused_by_name(
    keys: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        FakeQuantize(**keys)
    assert text in str(caught.value)


def test_repr_tells_the_state() -> None:
    quantizer = in_state(FakeQuantState.QAT, observer="clip", xmin=-2.0)
    assert "fake_quant, qat, averaging_constant=0.01" in repr(quantizer)
    assert "Observer(clip, int8, per_tensor_symmetric, [-128, 127], xmin=-2.0" in repr(quantizer)
