"""Groups of a weight's values that share a scale, through the whole workflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_ext
from grouped_values import by_numpy
from snapshots import same_bits
from torch_ext import (
    FakeQuantize,
    Observer,
    get_default_qconfig,
    quantization_parameters,
)
from torch_ext.quantizers.parts import groups

WEIGHT = (6, 8, 3, 2)  # of a convolution: [outputs, inputs, height, width]
INT4 = {"dtype": "int4", "group_size": 4}


def quantizer_of(method: Any = "fake_quant", rule: Any = "min_max", **keys: Any) -> FakeQuantize:
    count = int(np.prod(WEIGHT)) // 4
    given = {"channel_len": count, "transient": True, "averaging_constant": 1.0, **INT4, **keys}
    return FakeQuantize(method, rule, **given)


def weight_of(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-6, 4, WEIGHT, generator=generator).float())
    return torch.randn(WEIGHT, generator=generator) * sizes


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("dtype", "ends"), [("int4", (-8, 7)), ("int8", (-128, 127))])
def test_equals_numpy(affine: bool, dtype: str, ends: tuple[int, int]) -> None:
    scheme = "per_channel_affine" if affine else "per_channel_symmetric"
    quantizer = quantizer_of(dtype=dtype, qscheme=scheme)
    quantizer.state = "qat"
    x = weight_of()
    want = by_numpy(x, 4, affine, *ends)
    assert same_bits(quantizer(x), want)
    quantizer.state = "validation"
    assert same_bits(quantizer(x), want)
    # In another memory format the same numbers, in that format.
    turned = x.to(memory_format=torch.channels_last)
    assert same_bits(quantizer(turned), want)
    assert quantizer(turned).stride() == turned.stride()
    assert quantizer(x).stride() == x.stride()


@pytest.mark.parametrize("rule", torch_ext.observers())
@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3"])
def test_rules_solve_each_group(rule: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each group alone, per tensor; in parts of few groups as all at once."""
    if dtype != "int4" and rule in ("kl", "aciq"):
        with pytest.raises((ValueError, RuntimeError), match=rule):
            quantizer_of(rule=rule, dtype=dtype)
        return
    quantizer, x = quantizer_of(rule=rule, dtype=dtype), weight_of(3)
    quantizer.state = "qat"
    out = quantizer(x)
    alone = FakeQuantize(
        "fake_quant", rule, 1.0, dtype=dtype, transient=True, mantissa_bits=7, octaves=12
    )
    alone.state = "qat"
    for g, row in enumerate(x.movedim(1, -1).reshape(-1, 4)[:20]):
        alone.reset_parameters()
        alone(row)
        assert torch.equal(quantizer.range[g], alone.range[0])
        assert torch.equal(quantizer.scale[g], alone.scale[0])
    monkeypatch.setattr(groups, "_AT_ONCE", 5 * 8 * 2 * 12 * 128)
    parts = quantizer_of(rule=rule, dtype=dtype, averaging_constant=0.25)  # not of the first batch
    parts.state = "qat"
    assert same_bits(parts(x), out)
    assert int(parts.solved) == 1
    solution = quantizer.solve_weight(x).solution
    assert solution is not None
    assert torch.equal(solution.range, quantizer.range)


def test_straight_through_gradient() -> None:
    quantizer, x = quantizer_of(rule="percentile", percentile=60.0), weight_of(5)
    quantizer.state = "qat"
    given = x.clone().requires_grad_()
    upstream = torch.randn(WEIGHT)
    quantizer(given).backward(upstream)
    assert given.grad is not None
    scale = groups.spread(quantizer.scale, WEIGHT, 1, 4)
    q = (x / scale).round()
    inside = (q >= -8) & (q <= 7)
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(given.grad, upstream * inside)


def test_lsq_learns_a_scale_for_each_group() -> None:
    """Its gradient is that of lsq on the matrix of groups; the mask is the paper's."""
    quantizer, x = quantizer_of("lsq"), weight_of(6)
    quantizer.state = "qat"
    given = x.clone().requires_grad_()
    quantizer(given).square().sum().backward()
    rows = x.movedim(1, -1).reshape(-1, 4)
    scale = quantizer.scale.detach().double()
    start = 2 * rows.abs().double().mean(1) / 7**0.5
    torch.testing.assert_close(scale, start, rtol=2**-6, atol=0)
    v = rows.double() / scale[:, None]
    q = v.round().clamp(-8, 7)
    inside = (v > -8) & (v < 7)
    upstream = 2 * (q * scale[:, None]).float().double()
    each = torch.where(inside, v.round() - v, q) * upstream
    want = each.sum(1) / (4 * 7) ** 0.5
    (parameter,) = quantization_parameters(quantizer)
    assert parameter.shape == (len(rows),)
    torch.testing.assert_close(parameter.grad, want.float(), rtol=1e-4, atol=1e-5)


def test_given_scale_and_held_range() -> None:
    quantizer = quantizer_of(rule="fixed_scale", scale=0.5)
    assert quantizer.range.shape == (len(quantizer.scale), 2)
    assert bool((quantizer.scale == 0.5).all())
    held = quantizer_of(rule="mse")
    held.state = "qat"
    held(weight_of())
    before = held.range.clone()
    held.hold_range()
    held(weight_of(9))
    assert torch.equal(held.range, before)
    assert int(held.solved) == 2


def test_groups_of_zeros_and_of_non_finite_values() -> None:
    quantizer, x = quantizer_of(), weight_of()
    x[0, :4] = 0
    x[1, 0, 0, 0] = torch.inf
    x[2, :4, 0, 0] = torch.nan
    quantizer.state = "qat"
    out = quantizer(x)
    scale = groups.blocks_of(quantizer.scale, WEIGHT, 1, 4)
    assert bool((scale[0, 0] == 1).all())
    assert float(scale[2, 0, 0, 0]) == 1
    assert torch.equal(out[1, 0, 0, 0], 7 * scale[1, 0, 0, 0])
    assert bool(out[2, :4, 0, 0].isnan().all())
    assert int(out.isnan().sum()) == 4


@pytest.mark.parametrize("method", ["fake_quant", "lsq"])
def test_compiled(method: Any) -> None:
    eager, compiled = quantizer_of(method, "mse"), quantizer_of(method, "mse")
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for state in ("qat", "validation"):
        eager.state = state
        compiled.state = state
        x, y = weight_of().requires_grad_(), weight_of().requires_grad_()
        out = eager(x)
        assert same_bits(run(y).detach(), out.detach())
        out.sum().backward()
        run(y).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, y.grad)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"group_size to be None but for a weight.*dynamic=True"):
        get_default_qconfig(activation_qkwargs={"group_size": 32})
    with pytest.raises(ValueError, match="group_size to be None"):
        get_default_qconfig(weight_fake_quant="pact", weight_qkwargs={"group_size": 32})
    with pytest.raises(ValueError, match="without group_size where a backend"):
        get_default_qconfig(backend="tensorrt", weight_qkwargs={"group_size": 32})
    for size, kind in ((1, ValueError), (0, ValueError), (-4, ValueError), (4.0, TypeError)):
        with pytest.raises(kind, match="expected group_size to be"):
            Observer("min_max", group_size=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="histogram to be False with group_size"):
        Observer("min_max", group_size=4, histogram=True)
    quantizer = quantizer_of()
    quantizer.state = "qat"
    with pytest.raises(RuntimeError, match=r"groups of 4 along axis 1, got shape \[2, 6\]"):
        quantizer(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match=r"groups of 4 along axis 1, got shape \[8\]"):
        quantizer(torch.randn(8))
    with pytest.raises(RuntimeError, match="follow_fake_quant"):
        quantizer(torch.randn(2, 8))
    observer = Observer("min_max", group_size=4, channel_len=2)
    observer(torch.randn(1, 8))
    with pytest.raises(RuntimeError, match="expected group_size to be None, got 4"):
        observer.range()
