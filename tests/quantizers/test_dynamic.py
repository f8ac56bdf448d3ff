"""Quantizers whose scales come from the values of each call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from block_values import FORMATS, Quantize, floats, in_groups, int8, nvfp4, uint8_affine
from torch_ext import DynamicFakeQuantize, FakeQuantize, Observer, ops, set_fake_quantize
from torch_ext.quantizers.solve import Solution

KINDS: dict[str, tuple[dict[str, Any], Quantize]] = {
    "int8": ({}, int8),
    "uint8 affine": ({"dtype": "uint8", "qscheme": "per_tensor_affine"}, uint8_affine),
    "float8": ({"dtype": "float8_e4m3"}, floats("float8_e4m3")),
    "float8 e5m2, ceil": (
        {"dtype": torch.float8_e5m2, "power_of_two": True},
        floats("float8_e5m2", "ceil"),
    ),
}
NVFP4 = {"dtype": "float4_e2m1", "group_size": 16, "scale_dtype": "float8_e4m3"}
BUFFERS = {"range", "scale", "zero_point", "solved"}


def values(*shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    x = torch.randn(*shape) * torch.exp2(torch.randint(-8, 8, shape[:-1]).float())[..., None]
    x[0, 0] = 0
    return x


def quantizing(state: str = "validation", **keys: Any) -> FakeQuantize:
    quantizer = FakeQuantize(dynamic=True, **keys)
    quantizer.state = state  # type: ignore[assignment]
    return quantizer


@pytest.mark.parametrize("state", ["qat", "validation"])
@pytest.mark.parametrize("axis", [-1, 1, -3])
@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers(kind: str, group: int | None, axis: int, state: str) -> None:
    keys, quantize = KINDS[kind]
    x = values(4, 16, 5, 8)
    quantizer = quantizing(state, group_size=group, ch_axis=axis, **keys)
    assert torch.equal(quantizer(x), in_groups(x, quantize, axis, group))


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"float8_e4m3", "float8_e5m2"}))
def test_small_floats_in_groups(name: str) -> None:
    x = values(6, 64)
    have = quantizing(dtype=name, group_size=32, power_of_two=True)(x)
    assert torch.equal(have, in_groups(x, floats(name, "ceil"), group=32))
    for keys in ({}, {"dynamic": True}):
        with pytest.raises(ValueError, match=f"expected group_size with {name}, got None"):
            FakeQuantize(dtype=name, **keys)


def test_what_each_state_does() -> None:
    """Nothing to calibrate, nothing kept: the same values give the same result in any order."""
    quantizer = FakeQuantize(dynamic=True)
    assert type(quantizer) is DynamicFakeQuantize
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    x, other = values(3, 8), 100 * values(3, 8)
    results = []
    for state in ("validation", "qat", "calibration", "validation", "float", "qat"):
        quantizer.state = state  # type: ignore[assignment]
        quantizer(other)
        out = quantizer(x)
        if state in ("calibration", "float"):
            assert out is x
        else:
            results.append(out)
            assert torch.equal(quantizer.quantize_only(x), out)
    assert all(torch.equal(out, results[0]) for out in results)
    for name, buffer in quantizer.named_buffers():
        assert torch.equal(buffer, before[name])
    assert quantizer.state_dict() == {}
    assert torch.equal(copy.deepcopy(quantizer)(x), results[0])
    assert "scales of each call, dynamic per token" in repr(quantizer)


def test_loading_between_kinds_is_loud() -> None:
    static, dynamic = FakeQuantize(), FakeQuantize(dynamic=True)
    with pytest.raises(RuntimeError, match=r'Missing key.*"range"'):
        static.load_state_dict(dynamic.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"range"'):
        dynamic.load_state_dict(static.state_dict())


def test_gradient() -> None:
    """Straight through where the rounded value is on the grid; "floor" leaves some beyond it."""
    x = torch.tensor([[4.0, -7.9, 1.0, 0.0]], requires_grad=True)
    quantizing("qat")(x).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 4))  # type: ignore[arg-type]
    x.grad = None
    out = quantizing("qat", dtype="float4_e2m1", group_size=4, scale_rule="floor")(x)
    assert out.tolist() == [[4.0, -6.0, 1.0, 0.0]]
    out.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 1.0, 1.0]]  # type: ignore[union-attr]


def test_a_group_that_is_not_finite() -> None:
    x = values(4, 16)
    x[1, 3], x[2, 9] = torch.inf, torch.nan
    out = quantizing(group_size=8)(x)
    bad = torch.zeros(4, 16, dtype=torch.bool)
    bad[1, :8] = bad[2, 8:] = True
    assert torch.equal(out.isnan(), bad)
    assert torch.equal(out[~bad], in_groups(x, int8, group=8)[~bad])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout(layout: torch.memory_format) -> None:
    x = values(2, 8, 5, 6).contiguous(memory_format=layout)
    out = quantizing(ch_axis=1)(x)
    assert out.stride() == x.stride()
    assert torch.equal(out, in_groups(x, int8, 1))


# ---- a scale of the tensor


def test_tensor_scale() -> None:
    """Calibrated by a rule as a range is; T becomes 448 * 6 in units of it."""
    x = values(40, 64)
    quantizer = FakeQuantize(dynamic=True, observer="percentile", percentile=99.0, **NVFP4)
    with pytest.raises(RuntimeError, match="expected every quantizer to have a range"):
        quantizer.state = "validation"  # type: ignore[assignment]
    quantizer.state = "calibration"  # type: ignore[assignment]
    assert quantizer(x) is x
    quantizer.state = "validation"  # type: ignore[assignment]
    plain = Observer("percentile", percentile=99.0)
    plain(x)
    reach = plain.range().abs().max()
    assert torch.equal(quantizer.scale, (reach / (448 * 6)).view(1))
    assert torch.equal(quantizer(x), in_groups(x, nvfp4(quantizer.scale), group=16))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert before.keys() >= BUFFERS
    quantizer(3 * x)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    other = FakeQuantize(dynamic=True, observer="percentile", **NVFP4)
    other.load_state_dict(quantizer.state_dict())
    other.enter(quantizer.state)
    assert torch.equal(other(x), quantizer(x))


def test_tensor_scale_follows() -> None:
    x = values(8, 32)
    quantizer = quantizing("qat", averaging_constant=0.25, **NVFP4)
    first = quantizer(x)
    assert torch.equal(quantizer.scale, (x.abs().max() / 2688).view(1))
    assert torch.equal(first, in_groups(x, nvfp4(quantizer.scale), group=16))
    quantizer(3 * x)
    want = 1.5 * x.abs().max() / 2688
    torch.testing.assert_close(quantizer.scale, want.view(1))
    assert torch.equal(quantizer.quantize_only(x), in_groups(x, nvfp4(quantizer.scale), group=16))
    set_fake_quantize(quantizer, "validation")
    assert torch.equal(quantizer(x), in_groups(x, nvfp4(quantizer.scale), group=16))


def test_tensor_scale_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread, or who interrupts a step, sees the scale before it or the one after it."""
    quantizer, x = quantizing("qat", averaging_constant=1.0, **NVFP4), values(8, 32)
    quantizer(x)
    before = quantizer.scale.clone()
    seen = []

    def follow(*arguments: Any, **keys: Any) -> None:
        own(*arguments, **keys)
        seen.append(quantizer.scale.clone())

    own = ops.follow_
    monkeypatch.setattr(ops, "follow_", follow)
    quantizer(3 * x)
    assert torch.equal(torch.cat(seen), before)
    assert torch.equal(quantizer.scale, (3 * x.abs().max() / 2688).view(1))
    assert quantizer.zero_point.tolist() == [0]
    count = quantizer.scale._version
    quantizer.take_(Solution(quantizer.range.clone(), torch.ones(1), torch.zeros(1).int()))
    assert quantizer.scale._version == count + 1
    assert torch.equal(quantizer.scale, (3 * x.abs().max() / 2688).view(1))


def test_tensor_scale_of_nothing() -> None:
    quantizer = quantizing("calibration", **NVFP4)
    x = torch.zeros(2, 16)
    quantizer(x)
    with pytest.warns(UserWarning, match="nothing to scale"):
        quantizer.state = "validation"  # type: ignore[assignment]
    assert quantizer.scale.tolist() == [1.0]
    assert torch.equal(quantizer(x), x)
    tiny = torch.full((1, 16), 1e-42)
    quantizer.state = "calibration"  # type: ignore[assignment]
    quantizer(tiny)
    quantizer.state = "validation"  # type: ignore[assignment]
    assert quantizer(tiny).isfinite().all()
    huge = torch.full((1, 16), torch.finfo(torch.float32).max)
    quantizer.state = "calibration"  # type: ignore[assignment]
    quantizer(huge)
    quantizer.state = "validation"  # type: ignore[assignment]
    torch.testing.assert_close(quantizer(huge), huge)


# ---- bad input

REFUSED = {
    "method": ({"method": "lsq"}, "expected method to be fake_quant, got lsq"),
    "rule": ({"observer": "kl"}, "expected name to be min_max with dynamic=True, got kl"),
    "given scale": (
        {**NVFP4, "observer": "fixed_scale"},
        "expected name to be a rule that reads data with scale_dtype, got fixed_scale",
    ),
    "equal levels": ({**NVFP4, "observer": "kl"}, "kl"),
    "group of 0": ({"group_size": 0}, "expected group_size to be between 2 and"),
    "group of 1.5": ({"group_size": 1.5}, "expected group_size to be an integer, got 1.5"),
    "channels": ({"qscheme": "per_channel_symmetric"}, "expected qscheme to be per_tensor_symm"),
    "number of channels": ({"channel_len": 3}, "expected channel_len to be between 1 and 1, got 3"),
    "axis": ({"ch_axis": 99}, "expected ch_axis to be between -64 and 63, got 99"),
    "weight": ({"transient": True}, "expected a quantizer of activations, got transient=True"),
    "histogram": ({"histogram": True}, "expected histogram to be False, got True"),
    "affine float": (
        {"dtype": "float8_e4m3", "qscheme": "per_tensor_affine"},
        "expected qscheme to be symmetric with float8_e4m3, got per_tensor_affine",
    ),
    "even integers": ({"scale_rule": "even"}, "even"),
    "scale dtype": (
        {"group_size": 16, "scale_dtype": "float8_e5m2"},
        "expected scale_dtype to be float8_e4m3 or None, got 'float8_e5m2'",
    ),
    "scale dtype alone": (
        {"scale_dtype": "float8_e4m3"},
        "expected group_size with scale_dtype, got None",
    ),
    "two kinds of scales": (
        {**NVFP4, "power_of_two": True},
        "expected power_of_two to be False with scale_dtype, got True",
    ),
    "text": ({"dynamic": "yes"}, "expected dynamic to be True or False, got 'yes'"),
    "static": (
        {"dynamic": False, "scale_dtype": "float8_e4m3"},
        "expected scale_dtype to be None without dynamic=True, got 'float8_e4m3'",
    ),
    "static groups": ({"dynamic": False, "group_size": 4}, "which is dynamic=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    keys, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        FakeQuantize(**{"dynamic": True, **keys})
    assert message in str(caught.value)


def test_refused_in_the_forward() -> None:
    with pytest.raises(RuntimeError, match="group_size"):
        quantizing(group_size=5)(values(2, 8))
    with pytest.raises(RuntimeError, match="scalar"):
        quantizing()(torch.tensor(1.0))
    for axis in (5, 2, -3):
        with pytest.raises(RuntimeError, match=rf"axis {axis} \(ch_axis\).*got 2 axes.*\[2, 8\]"):
            quantizing(ch_axis=axis)(values(2, 8))


@pytest.mark.parametrize("axis", [-1, 0, 3])
@pytest.mark.parametrize("shape", [(4, 30), (30, 4), ()])
def test_refused_values_change_nothing(shape: tuple[int, ...], axis: int) -> None:
    quantizer = quantizing("qat", ch_axis=axis, **NVFP4)
    quantizer(torch.randn(16, 2, 2, 16))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"group_size|axis|scalar"):
        quantizer(1000 * torch.randn(shape))
    after = quantizer.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
