"""The moving range of training on the device: every step leaves the CPU's bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import torch_ext
from devices import assert_same_bits, to
from input_zoo import ZOO
from sample_data import DTYPES, sample
from sample_grids import GRIDS
from torch_ext import ops

RULES = torch_ext.observers()


class Quantizer(NamedTuple):
    range: Tensor
    scale: Tensor
    zero_point: Tensor
    solved: Tensor


def fresh(where: torch.device | str, channels: int = 1, solved: int = 0) -> Quantizer:
    return Quantizer(
        torch.tensor([[-1.0, 2.0]]).repeat(channels, 1).to(where),
        torch.full((channels,), 0.5).to(where),
        torch.zeros(channels, dtype=torch.int32).to(where),
        torch.full((1,), solved, dtype=torch.uint8).to(where),
    )


def follow(q: Quantizer, x: Tensor, c: float, rule: str, grid: str, **more: Any) -> None:
    g = GRIDS[grid]
    ops.follow_(x, *q, c, rule, g.quant_min, g.quant_max, g.symmetric, **more)


def assert_steps(
    device: torch.device, batches: list[Tensor], c: float, rule: str, grid: str, **more: Any
) -> None:
    axis = more.get("ch_axis", -1)
    channels = 1 if axis < 0 else batches[0].shape[axis]
    for solved in (0, 1):
        have, want = fresh(device, channels, solved), fresh("cpu", channels, solved)
        for step, batch in enumerate(batches):
            follow(want, batch, c, rule, grid, **more)
            follow(have, to(batch, device), c, rule, grid, **more)
            assert_same_bits(have, want, rule, grid, c, solved, step)


@pytest.mark.sanitizer
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_once(rule: str, device: torch.device):
    batches = [sample("gauss", 700), ZOO["mixed"](500), torch.empty(0)]
    assert_steps(device, batches, 0.25, rule, "int8")
    rows = [sample("heavy", 3 * 200).reshape(3, 200)]
    assert_steps(device, rows, 1.0, rule, "int8", ch_axis=0, mantissa_bits=7, octaves=12)


@pytest.mark.parametrize("c", [0.0, 0.01, 0.25, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", RULES)
def test_steps(rule: str, grid: str, c: float, device: torch.device):
    """A batch without a finite value, then all zeros, then growth, on every grid."""
    batches = [
        torch.full((5,), torch.nan),
        sample("shifted", 900),
        sample("outlier", 900),
        torch.zeros(64),
        ZOO["spread"](300),
    ]
    assert_steps(device, batches, c, rule, grid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_types_and_strides(rule: str, dtype: torch.dtype, device: torch.device):
    x = ZOO["mixed"](1920).reshape(4, 6, 8, 10).to(dtype)
    for view in (x, x.transpose(0, 3), x[:, ::2, 1:, ::3], x[:, :1].expand(4, 5, 8, 10)):
        assert_steps(device, [view], 0.5, rule, "int8")
        assert_steps(device, [view], 0.5, rule, "uint8_affine", ch_axis=1)


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_fit_on_chip_and_rows_that_do_not(rule: str, device: torch.device):
    for length in (1, 1000, 4096, 50_001, 300_001):
        x = ZOO["mixed"](3 * length).reshape(3, length)
        assert_steps(device, [x, x * 2], 0.1, rule, "int8", ch_axis=0, mantissa_bits=7, octaves=12)


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_following_and_quantizing_at_once(rule: str, dtype: torch.dtype, device: torch.device):
    """Rows that one launch keeps on chip (a multiple of 8, aligned), and all others."""
    g = GRIDS["int8_affine"] if "int8_affine" in GRIDS else GRIDS["uint8_affine"]
    for shape in ((5, 24), (40, 576), (3, 25), (2, 70_000), (1, 8)):
        x = ZOO["mixed"](shape[0] * shape[1]).reshape(shape).to(dtype)
        have, want = fresh(device, shape[0]), fresh("cpu", shape[0])
        for c in (0.5, 0.5, 0.0):
            outputs = []
            for q, where in ((want, torch.device("cpu")), (have, device)):
                v = to(x, where).detach().requires_grad_()
                out = ops.follow_fake_quant(
                    v, *q, c, rule, g.quant_min, g.quant_max, g.symmetric, ch_axis=0
                )
                out.backward(torch.ones_like(out))
                outputs.append((out.detach(), v.grad))
            assert_same_bits(have, want, rule, shape, c)
            assert_same_bits(outputs[1], outputs[0], rule, shape, c)


@pytest.mark.parametrize("rule", RULES)
def test_a_channel_without_a_finite_value_keeps_its_own(rule: str, device: torch.device):
    x = torch.stack([sample("gauss", 50), torch.full((50,), torch.nan), sample("relu", 50)])
    q = fresh(device, 3, solved=1)
    follow(q, x.to(device), 1.0, rule, "int8", ch_axis=0)
    if rule != "fixed_scale":
        assert_same_bits(q.range[1], fresh("cpu").range[0])
    assert not torch.equal(q.range[0].cpu(), fresh("cpu").range[0])
    assert_steps(device, [x, x.flip(0)], 0.5, rule, "int8", ch_axis=0)


def test_options_reach_the_device(device: torch.device):
    x = sample("gauss", 3000)
    for rule, options in {
        "percentile": {"percentile": 90.0},
        "clip": {"xmin": -0.5, "xmax": 0.25},
        "clip_std": {"std_scale": 1.0},
        "kl": {"variant": "modelopt"},
        "fixed_scale": {"scale": 0.25},
    }.items():
        assert_steps(device, [x], 1.0, rule, "int8", options=options)
        plain, given = fresh(device), fresh(device)
        follow(plain, x.to(device), 1.0, rule, "int8")
        follow(given, x.to(device), 1.0, rule, "int8", options=options)
        assert not torch.equal(plain.scale, given.scale), rule


@pytest.mark.parametrize("rule", ["min_max", "percentile", "mse"])
def test_training_with_a_gradient(rule: str, device: torch.device):
    """Follow and fake-quantize, batch after batch, with the ranges that result."""
    have, want = fresh(device), fresh("cpu")
    for step in range(10):
        x = sample("heavy", 5000, seed=step)
        upstream = torch.randn(5000)
        outputs = []
        for q, where in ((want, "cpu"), (have, device)):
            v = x.to(where).detach().requires_grad_()
            follow(q, v, 0.1, rule, "uint8_affine")
            out = ops.fake_quant(v, q.scale, q.zero_point, 0, 255)
            out.backward(upstream.to(where))
            outputs.append([out, v.grad])
        assert_same_bits(outputs[1], outputs[0], step)
    assert_same_bits(have, want)
