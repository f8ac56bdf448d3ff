"""Fake-quant on float formats: against Torch's casts, and against formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_ext import ops

NATIVE = torch.ops.torch_ext
FLOATS = {"float8_e4m3": (torch.float8_e4m3fn, 448.0), "float8_e5m2": (torch.float8_e5m2, 57344.0)}
ZERO = torch.zeros(1, dtype=torch.int32)
INTEGERS_ONLY = ("kl", "aciq")


def numbers(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The finite numbers of a small format from 0 on, as the OCP specifications list them."""
    bits = {"float6_e2m3": (2, 3, 1), "float6_e3m2": (3, 2, 3), "float4_e2m1": (2, 1, 1)}[name]
    exponents, mantissa, bias = bits
    return np.array(
        [
            2.0 ** (1 - bias) * k / 2**mantissa
            if e == 0
            else 2.0 ** (e - bias) * (1 + k / 2**mantissa)
            for e in range(2**exponents)
            for k in range(2**mantissa)
        ]
    )


def cast(x: Tensor, scale: Tensor, name: str) -> Tensor:
    """Torch's cast, after clamping: that of e5m2 gives infinity beyond the largest number."""
    dtype, largest = FLOATS[name]
    wide = x.float()
    return ((wide / scale).clamp(-largest, largest).to(dtype).float() * scale).to(x.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(kind), b[~nan].view(kind))


def hostile(name: str) -> Tensor:
    """All numbers of the format, what is between two of them, and what no format holds."""
    dtype, largest = FLOATS[name]
    all_codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = all_codes[all_codes.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    inf = torch.tensor(torch.inf)
    near = [torch.nextafter(middles, inf), torch.nextafter(middles, -inf)]
    edges = largest * torch.tensor([1.0, 1.03, 1.0357, 1.0714, 1.08, 2.0, 1e10])
    odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38])
    return torch.cat([all_codes, middles, *near, edges, -edges, odd])


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_torchs_cast(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    spread = torch.randn(300_000) * torch.exp2(torch.randint(-20, 18, (300_000,)).float())
    for scale in (1.0, 0.037, 1e-6, 11.5):
        x = torch.cat([hostile(name), spread]).mul(scale).to(dtype)
        s = torch.tensor([scale])
        have = ops.fake_quant(x, s, ZERO, grid=name)
        want = cast(x, s, name)
        # A half type's own largest value: a product beyond it saturates, Torch's is infinite.
        if dtype == torch.float16:
            want = want.clamp(-65504, 65504)
        assert same_bits(have, want), (scale, x[(have != want) & ~x.isnan()][:5])


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_stays_what_it_is(name: str):
    codes = torch.arange(256, dtype=torch.uint8).view(FLOATS[name][0])
    x = codes.float()
    out = ops.fake_quant(x, torch.ones(1), ZERO, grid=name)
    kept = x.isfinite() | x.isnan()
    assert same_bits(out[kept], x[kept])
    assert int(kept.sum()) == (256 if name == "float8_e4m3" else 254)


def test_per_channel():
    x = torch.randn(3, 5, 7) * 30
    scale = torch.tensor([0.1, 0.01, 1.0, 0.5, 2.0])
    out = ops.fake_quant(x, scale, torch.zeros(5, dtype=torch.int32), ch_axis=1, grid="float8_e4m3")
    for c in range(5):
        want = ops.fake_quant(x[:, c].contiguous(), scale[c : c + 1], ZERO, grid="float8_e4m3")
        assert torch.equal(out[:, c], want)


@pytest.mark.parametrize("name", ["float6_e2m3", "float6_e3m2", "float4_e2m1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_formats_give_the_nearest_number(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    table = numbers(name)
    middles = (table[1:] + table[:-1]) / 2
    given = np.concatenate([table, middles, np.nextafter(middles, 9), np.nextafter(middles, 0)])
    x = torch.cat([torch.tensor(given), torch.randn(20_000, dtype=torch.float64) * 4]).to(dtype)
    x = torch.cat([x, -x])
    have = ops.fake_quant(x, torch.ones(1), ZERO, grid=name).double().numpy()
    magnitude = x.double().abs().numpy()
    distance = np.abs(magnitude[:, None] - table[None, :])
    least = distance.min(axis=1)
    # The even one of two, which is the one at an even place.
    nearest = [np.flatnonzero(row == low) for row, low in zip(distance, least, strict=True)]
    want = [
        table[places[places % 2 == 0][0] if len(places) > 1 else places[0]] for places in nearest
    ]
    assert np.array_equal(have, np.copysign(want, x.numpy()))


@pytest.mark.parametrize("name", FLOATS)
def test_straight_through(name: str):
    """The gradient passes where the value is not cut off, by what it rounds to."""
    largest = FLOATS[name][1]
    beyond = largest * (1 + (1 / 28 if name == "float8_e4m3" else 1 / 14))  # halfway to the next
    x = torch.tensor([0.0, 1.0, -largest, largest, beyond * 0.999, beyond * 1.001, 1e9, torch.nan])
    x.requires_grad_()
    ops.fake_quant(x, torch.ones(1), ZERO, grid=name).backward(torch.arange(1.0, 9.0))
    assert x.grad.tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    inner = x.detach().requires_grad_()
    ops.fake_quant(inner, torch.ones(1), ZERO, mask="paper", grid=name).sum().backward()
    assert inner.grad.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", FLOATS)
def test_lsq_gradients(name: str):
    """Those of LSQ's paper in float64, with the format's rounding."""
    torch.manual_seed(1)
    dtype, largest = FLOATS[name]
    x = (torch.randn(4000) * torch.exp2(torch.randint(-9, 3, (4000,)).float())).requires_grad_()
    scale = torch.tensor([2.0 / largest]).requires_grad_()
    grad = torch.randn(4000)
    ops.lsq(x, scale, ZERO, grid=name).backward(grad)
    v = (x.detach() / scale.detach()).double()
    inside = v.abs() < largest
    rounded = v.clamp(-largest, largest).to(dtype).double()
    exact = x.detach().double() / scale.detach().double()
    term = torch.where(inside, rounded - exact, torch.copysign(torch.tensor(largest).double(), v))
    want = (grad.double() * term).sum() / (4000 * largest) ** 0.5
    torch.testing.assert_close(scale.grad.double(), want.view(1), rtol=1e-6, atol=1e-9)
    assert torch.equal(x.grad, torch.where(inside, grad, 0))
    assert same_bits(ops.lsq(x, scale, ZERO, grid=name), cast(x.detach(), scale.detach(), name))


@pytest.mark.parametrize("name", FLOATS)
def test_pact(name: str):
    x = torch.tensor([-9.0, -2.0, 0.3, 2.0, 9.0]).requires_grad_()
    alpha = torch.tensor([3.0]).requires_grad_()
    out = ops.pact(x, alpha, grid=name)
    out.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0]))
    assert x.grad.tolist() == [0, 10, 100, 1000, 0]
    assert alpha.grad.tolist() == [10000 - 1]
    assert same_bits(out.detach(), cast(x.detach(), torch.tensor([3.0 / FLOATS[name][1]]), name))


# ---- rules


@pytest.mark.parametrize("name", FLOATS)
def test_the_scale_takes_the_range_to_the_largest_number(name: str):
    largest = FLOATS[name][1]
    ranges = torch.tensor([[-3.0, 1.0], [0.0, 0.1], [-0.7, 0.0], [0.0, 0.0]])
    scale, zero_point = ops.qparams(ranges, grid=name)
    bounds = ranges.double().abs().amax(1)
    want = torch.where(bounds > 0, bounds / largest, 1).float()
    assert torch.equal(scale, want)
    assert zero_point.tolist() == [0] * 4
    powers, _ = ops.qparams(ranges, grid=f"{name} power_of_two")
    assert torch.equal(torch.frexp(powers).mantissa, torch.full((4,), 0.5))
    assert bool(((powers >= scale) & (powers < 2 * scale) | (scale == 1)).all())


@pytest.mark.parametrize("name", FLOATS)
def test_mse_finds_the_least_error_on_the_format(name: str):
    """Against every threshold of a fine lattice, each by Torch's cast of the data itself."""
    torch.manual_seed(2)
    x = torch.cat([torch.randn(20_000), torch.randn(20) * 40])
    best = ops.mse(x, grid=name).abs().max()
    largest = FLOATS[name][1]

    def error(threshold: float) -> float:
        scale = torch.tensor([threshold / largest])
        return float((cast(x, scale, name) - x).double().square().sum())

    top = float(x.abs().max())
    thresholds = [top * 2 ** (-i / 64) for i in range(256)]
    least = min(map(error, thresholds))
    # The histogram takes values as the lower ends of its bins.
    assert error(float(best)) <= 1.01 * least
    assert error(top / 16) > 1.1 * least


@pytest.mark.parametrize("name", FLOATS)
def test_every_other_rule_solves(name: str):
    torch.manual_seed(3)
    x = torch.randn(5000)
    largest = FLOATS[name][1]
    top = float(x.abs().max())
    assert ops.min_max(x, grid=name).abs().max() == top
    assert ops.percentile(x, grid=name, percentile=100).abs().max() == top
    assert ops.fixed_scale(x, grid=name, scale=0.5).tolist() == [[-largest / 2, largest / 2]]
    mean = float(x.double().abs().mean())
    wide = ops.mean_abs(x, grid=name)[0].double()
    assert wide.tolist() == pytest.approx([-2 * mean * largest**0.5, 2 * mean * largest**0.5], 1e-3)
    mix = ops.mix(x, grid=name)
    error = {
        key: float((ops.fake_quant(x, *ops.qparams(r, grid=name), grid=name) - x).square().sum())
        for key, r in {
            "mix": mix,
            "min_max": ops.min_max(x, grid=name),
            "percentile": ops.percentile(x, grid=name, percentile=99.9),
        }.items()
    }
    assert error["mix"] <= 1.001 * min(error.values())


def test_follow_moves_and_quantizes():
    x = torch.tensor([[0.5, -3.0], [1.0, 2.0]])
    buffers = (torch.zeros(1, 2), torch.ones(1), ZERO.clone(), torch.zeros(1, dtype=torch.uint8))
    out = ops.follow_fake_quant(x, *buffers, 1.0, "min_max", grid="float8_e4m3")
    assert buffers[0].tolist() == [[-3.0, 2.0]]
    assert torch.equal(buffers[1], torch.tensor([3 / 448]))
    assert same_bits(out, cast(x, buffers[1], "float8_e4m3"))


# ---- bad input

REFUSED = {
    "float8_e4m3 affine": "expected grid to be symmetric, as a float format has no zero point, got "
    'affine in grid "float8_e4m3 affine"',
    "float8_e4m3 scale_rule=tvm": "expected scale_rule to be grid, floor or even on a float "
    "format, got tvm",
    "float8_e5m2 rounding=half_away": "expected rounding to be half_even on a float format, got "
    "half_away",
    "float8_e4m3fnuz": "float4_e2m1) and words among symmetric",
    "float8_e4m3,": "got float8_e4m3, in grid",
    "[-448,448] float8_e4m3": "got float8_e4m3 in grid",
}


@pytest.mark.parametrize("grid", REFUSED)
def test_refuses_words_that_do_not_fit(grid: str):
    x, range_ = torch.zeros(4), torch.zeros(1, 2)
    calls: dict[str, Any] = {
        "fake_quant": lambda: ops.fake_quant(x, torch.ones(1), ZERO, grid=grid),
        "lsq": lambda: ops.lsq(x, torch.ones(1), ZERO, grid=grid),
        "pact": lambda: ops.pact(x, torch.ones(1), grid=grid),
        "qparams": lambda: ops.qparams(range_, grid=grid),
        "min_max": lambda: ops.min_max(x, grid=grid),
    }
    for op, call in calls.items():
        with pytest.raises(RuntimeError) as error:
            call()
        first = str(error.value).splitlines()[0]
        assert first.startswith(f"{op}: expected ")
        assert REFUSED[grid] in first


@pytest.mark.parametrize("rule", INTEGERS_ONLY)
def test_rules_of_integers_refuse_with_the_reason(rule: str):
    with pytest.raises(RuntimeError) as error:
        getattr(ops, rule)(torch.randn(100), grid="float8_e4m3")
    first = str(error.value).splitlines()[0]
    assert first.startswith(f"{rule}: expected the grid to be of integers for {rule} (it")
    assert first.endswith("), got float8_e4m3")


def test_refuses_zero_points():
    x, one = torch.zeros(4), torch.ones(1)
    for zero_point in (1, -448, 448):
        with pytest.raises(
            RuntimeError, match="expected zero_point to be 0 on a float format, got"
        ):
            ops.fake_quant(
                x, one, torch.tensor([zero_point], dtype=torch.int32), grid="float8_e4m3"
            )
    with pytest.raises(RuntimeError, match="lsq: expected zero_point to be Int on a float format"):
        ops.lsq(x, one, torch.zeros(1), grid="float8_e4m3")


def test_a_grid_stands_alone():
    x, one, range_ = torch.zeros(4), torch.ones(1), torch.zeros(1, 2)
    for call in (
        lambda: ops.fake_quant(x, one, ZERO, -128, 127, grid="float8_e4m3"),
        lambda: ops.fake_quant(x, one, ZERO, rounding="half_away", grid="float8_e4m3"),
        lambda: ops.lsq(x, one, ZERO, quant_max=3, grid="float8_e4m3"),
        lambda: ops.qparams(range_, symmetric=True, grid="float8_e4m3"),
        lambda: ops.min_max(x, 0, 255, grid="float8_e4m3"),
    ):
        with pytest.raises(TypeError, match="expected grid 'float8_e4m3' alone, got arguments"):
            call()
    for call in (
        lambda: ops.fake_quant(x, one, ZERO),
        lambda: ops.lsq(x, one, ZERO),
        lambda: ops.qparams(range_),
    ):
        with pytest.raises(
            TypeError, match="expected quant_min and quant_max, or grid, got neither"
        ):
            call()


def test_integers_as_a_text_are_those_of_the_arguments():
    x = torch.randn(1000)
    range_ = ops.percentile(x, 0, 255, False)
    assert torch.equal(range_, ops.percentile(x, grid="[0,255] affine"))
    qparams = ops.qparams(range_, 0, 255, False)
    assert all(map(torch.equal, qparams, ops.qparams(range_, grid="[0,255] affine")))
    want = ops.fake_quant(x, *qparams, 0, 255)
    assert torch.equal(want, ops.fake_quant(x, *qparams, grid="[0,255] affine"))


def test_compiles_and_differentiates_twice():
    x = torch.randn(100, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1)

    def f(x: Tensor) -> Tensor:
        return ops.fake_quant(x, one, ZERO, grid="float8_e5m2").sin()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, -f(x).detach())
