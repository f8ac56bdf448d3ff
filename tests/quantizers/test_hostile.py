"""Hostile input through every observer and quantizer: no crash, no plausible-looking bad number."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from hostile_batches import (
    REFUSED_PER_CHANNEL,
    SCHEMES,
    SEQUENCES,
    as_dtype,
    broken_states,
    finite_values,
    refused,
)
from sample_data import DTYPES
from torch_ext import FakeQuantState, ops

RULES = torch_ext.observers()


def feed(module: torch.nn.Module, name: str, batches: list[Tensor]) -> list[Tensor]:
    """The batches that were taken; a refusal must be allowed, readable, and change nothing."""
    taken = []
    per_channel = "per_channel" in str(getattr(module, "observer", module).qscheme)
    for batch in batches:
        before = {k: v.clone() for k, v in module.state_dict().items()}
        refusal = refused(module, batch)
        if refusal is None:
            taken.append(batch)
            continue
        assert per_channel, refusal
        assert name in REFUSED_PER_CHANNEL, refusal
        assert "expected" in refusal
        after = module.state_dict()
        assert all(torch.equal(after[k], v) for k, v in before.items())
    return taken


def fitting(batches: list[Tensor], observer: torch_ext.Observer) -> list[Tensor]:
    """Those that have the observer's channels."""
    axis, channels = observer.ch_axis, observer.channel_len
    return [b for b in batches if axis < 0 or (b.dim() > axis and b.shape[axis] == channels)]


def assert_sound(scale: Tensor, zero_point: Tensor, observer: torch_ext.Observer) -> None:
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert (1 / scale).isfinite().all()
    assert (zero_point >= observer.quant_min).all()
    assert (zero_point <= observer.quant_max).all()


def assert_usable(batches: list[Tensor], scale: Tensor, zero_point: Tensor, observer: Any) -> None:
    """The parameters quantize what was seen: finite stays finite, NaN stays NaN."""
    for batch in batches:
        x = batch.detach()
        out = ops.fake_quant(
            x, scale, zero_point, observer.quant_min, observer.quant_max, observer.ch_axis
        )
        assert torch.equal(out.isnan(), x.isnan())
        assert (out.isfinite() | x.isnan()).all()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(SEQUENCES))
def test_every_observer(name: str, dtype: torch.dtype, scheme: str):
    batches = as_dtype(SEQUENCES[name](), dtype)
    for rule in RULES:
        observer = torch_ext.Observer(rule, **SCHEMES[scheme])
        taken = feed(observer, name, batches)
        if rule == "fixed_scale":  # it looks at nothing, so it refuses nothing
            taken = fitting(taken, observer)
        found = observer.range()
        assert found.isfinite().all(), rule
        assert (found[:, 0] <= found[:, 1]).all(), rule
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing finite was seen: said, and scale 1
            scale, zero_point = observer.calculate_qparams()
        assert_sound(scale, zero_point, observer)
        assert_usable(taken, scale, zero_point, observer)
        if rule != "fixed_scale":
            seen = observer.tally[:, [0, 3, 4]].sum()
            assert seen == sum(b.numel() for b in taken), rule
            assert observer.tally[:, 0].sum() == finite_values(taken), rule


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(SEQUENCES))
def test_every_quantizer_in_training(name: str, dtype: torch.dtype, scheme: str):
    """Without calibration: the first batch with a finite value sets the range, the rest move it."""
    batches = as_dtype(SEQUENCES[name](), dtype)
    for rule in RULES:
        quantizer = torch_ext.FakeQuantize("fake_quant", rule, **SCHEMES[scheme])
        quantizer.state = FakeQuantState.QAT
        if rule == "fixed_scale":
            batches = fitting(batches, quantizer.observer)
        taken = feed(quantizer, name, batches)
        assert_sound(quantizer.scale, quantizer.zero_point, quantizer.observer)
        assert quantizer.range.isfinite().all(), rule
        assert (quantizer.range[:, 0] <= quantizer.range[:, 1]).all(), rule
        assert_usable(taken, quantizer.scale, quantizer.zero_point, quantizer.observer)
        if rule != "fixed_scale":
            assert bool(quantizer.solved) == (finite_values(taken) > 0), rule


@pytest.mark.parametrize("rule", [r for r in RULES if r != "fixed_scale"])
def test_batches_without_a_finite_value_leave_the_range(rule: str):
    quantizer = torch_ext.FakeQuantize("fake_quant", rule)
    quantizer.state = FakeQuantState.QAT
    quantizer(torch.randn(100))
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    for bad in (torch.empty(0), torch.full((5,), torch.nan), torch.full((5,), torch.inf)):
        quantizer(bad)
        for key, value in quantizer.state_dict().items():
            if "observer" not in key:
                assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("damage", list(broken_states()))
@pytest.mark.parametrize("rule", RULES)
def test_damaged_statistics_give_an_exception_or_a_sound_range(rule: str, damage: str):
    state = broken_states()[damage]
    for symmetric in (True, False):
        refusal = refused(ops.solve, rule, *state, -128, 127, symmetric)
        if refusal is not None:
            assert "expected" in refusal
            continue
        found = ops.solve(rule, *state, -128, 127, symmetric)
        assert found.isfinite().all()
        assert found[0, 0] <= found[0, 1]
        scale, _ = ops.qparams(found, -128, 127, symmetric)
        assert (scale > 0).all()
