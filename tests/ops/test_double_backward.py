"""Second and third derivatives: those of the straight-through map, composed of torch's own ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from sample_data import DTYPES, sample
from straight_through import (
    composed_fake_quant,
    composed_lsq,
    composed_pact,
    gradient_factor,
)
from torch_ext import ops

GRID = (-128, 127)
LOW, HIGH = -8, 7
Function = Callable[..., Tensor]


def values(count: int) -> Tensor:
    return sample("gauss", count).double() * 2


def ours(x: Tensor, scale: float = 0.1, mask: Any = "rounded") -> Tensor:
    zero_point = torch.zeros(1, dtype=torch.int32)
    return ops.fake_quant(x, torch.tensor([scale]), zero_point, *GRID, mask=mask)


def torchs(x: Tensor, scale: float = 0.1) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, scale, 0, *GRID)


def test_the_second_derivative_of_a_square_is_2():
    for function in (ours, torchs):
        x = torch.randn(5, requires_grad=True)
        (first,) = grad(function(x).square().sum(), x, create_graph=True)
        (second,) = grad(first.sum(), x)
        assert second.tolist() == [2, 2, 2, 2, 2]


@pytest.mark.parametrize("mask", ["rounded", "paper"])
def test_clipped_values_have_no_second_derivative(mask: str):
    x = torch.tensor([-200.0, -1.0, 3.0, 500.0], requires_grad=True)
    (first,) = grad(ours(x, 1.0, mask).pow(3).sum(), x, create_graph=True)
    (second,) = grad(first.sum(), x, create_graph=True)
    assert second.tolist() == [0, -6, 18, 0]
    (third,) = grad(second.sum(), x)
    assert third.tolist() == [0, 6, 6, 0]


def of_order(function: Function, inputs: list[Tensor], order: int) -> list[Tensor]:
    """Derivatives of the inputs, each order that of a random projection of the one before."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    wanted = [t for t in inputs if t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    out = function(*inputs)
    found = [(out + out.square() + out.pow(3) / 3 + out.pow(4) / 10)]
    for _ in range(order):
        total = sum(
            (t.double() * torch.randn(t.shape, dtype=torch.double, generator=generator)).sum()
            for t in found
        )
        found = list(grad(total, wanted, create_graph=True, materialize_grads=True))
    return [t.detach().double() for t in found]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.allclose(a, b, rtol=2e-5, atol=2e-5 * float(b.abs().max() + 1)), a - b


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("learned", [True, False], ids=["learned_zero", "fixed_zero"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_lsq_has_the_derivatives_of_its_composite(axis: int, learned: bool, order: int):
    x = values(6 * 50).reshape(6, 50)
    channels = 1 if axis < 0 else x.shape[axis]
    shape = [1, 1]
    if axis >= 0:
        shape[axis] = channels
    scale = 0.25 * 2.0 ** -(torch.arange(channels) % 3).float() * (-1.0) ** torch.arange(channels)
    zero_point = (torch.arange(channels) % 5 - 2).to(torch.float32 if learned else torch.int32)
    factor = gradient_factor(x.numel() // channels, HIGH)

    def mine(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return ops.lsq(x, s, z, LOW, HIGH, axis)

    def composite(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        return composed_lsq(x, s.view(shape), z.view(shape), LOW, HIGH, factor)

    want = [x, scale.double(), zero_point.double() if learned else zero_point]
    have = of_order(mine, [x, scale, zero_point], order)
    assert_same(have, of_order(composite, want, order))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("low", [0, -7])
@pytest.mark.parametrize("level", [1.5, -1.5])
def test_pact_has_the_derivatives_of_its_composite(level: float, low: int, order: int):
    alpha = torch.tensor([level])
    have = of_order(lambda x, a: ops.pact(x, a, low, 7), [values(200), alpha], order)
    want = of_order(lambda x, a: composed_pact(x, a, low, 7), [values(200), alpha.double()], order)
    assert_same(have, want)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_fake_quant_has_the_derivatives_of_its_composite(order: int):
    x = values(200) * 8
    have = of_order(lambda v: ours(v, 0.125), [x], order)
    assert_same(have, of_order(lambda v: composed_fake_quant(v, 0.125, 0, *GRID), [x], order))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["fake_quant", "lsq", "pact"])
def test_the_second_derivative_has_the_type_of_x(method: str, dtype: torch.dtype):
    x = (values(64).reshape(4, 16) * 2).to(dtype)
    upstream = torch.ones_like(x).requires_grad_()
    v = x.clone().requires_grad_()
    out = {
        "fake_quant": lambda: ours(v),
        "lsq": lambda: ops.lsq(v, torch.full((1,), 0.5), torch.zeros(1, dtype=torch.int32), -8, 7),
        "pact": lambda: ops.pact(v, torch.full((1,), 3.0), -8, 7),
    }[method]()
    (first,) = grad(out, v, upstream, create_graph=True)
    direction = torch.randn_like(first)
    (second,) = grad(first, upstream, direction)
    assert second.dtype == dtype
    assert torch.equal(second, torch.where(first != 0, direction, torch.zeros_like(direction)))


def network(quantize: Function) -> tuple[Function, Tensor]:
    torch.manual_seed(3)
    first, second = torch.randn(6, 8).double(), torch.randn(8, 1).double()
    x = torch.randn(20, 6).double()
    return (lambda w: (quantize(x @ w).tanh() @ second).square().mean()), first


def test_hessian_vector_products_are_those_of_torchs_fake_quant():
    """What HAWQ takes the trace of the Hessian from. A scale of 1/8: no ties, the same levels."""
    vector = torch.randn(6, 8).double()
    found = []
    for quantize in (ours, torchs):
        loss, weight = network(lambda v, quantize=quantize: quantize(v, 0.125))
        weight.requires_grad_()
        (first,) = grad(loss(weight), weight, create_graph=True)
        (product,) = grad((first * vector).sum(), weight)
        found.append(product)
    assert found[0].abs().max() > 0
    assert torch.allclose(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_a_gradient_penalty_is_that_of_torchs_fake_quant():
    """WGAN-GP: the norm of the gradient of the input, differentiated by the weight."""
    torch.manual_seed(5)
    weight, x = torch.randn(6, 8).double(), torch.randn(20, 6).double()
    found = []
    for quantize in (ours, torchs):
        w, v = weight.clone().requires_grad_(), x.clone().requires_grad_()
        score = quantize(v @ w, 0.125).tanh().sum()
        (first,) = grad(score, v, create_graph=True)
        penalty = (first.norm(dim=1) - 1).square().mean()
        penalty.backward()
        found.append(w.grad)
    assert found[0].abs().max() > 0
    assert torch.allclose(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_one_bit_per_element_is_kept_for_the_second_backward_too():
    x = sample("gauss", 8000).requires_grad_()
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = ours(x)
        grad(out, x, torch.ones(8000, requires_grad=True), create_graph=True)
    assert sum(kept.values()) == 1000
